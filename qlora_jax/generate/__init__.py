"""Sampling from a model with a key-value cache."""

from qlora_jax.generate.decoded import decoded as decoded
from qlora_jax.generate.sample import SampleConfig as SampleConfig
from qlora_jax.generate.sample import generate as generate
from qlora_jax.generate.stop import Stop as Stop
