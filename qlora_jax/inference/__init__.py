"""Sampling from a model with a key-value cache."""

from qlora_jax.inference.decoded import decoded as decoded
from qlora_jax.inference.sample import SampleConfig as SampleConfig
from qlora_jax.inference.sample import generate as generate
from qlora_jax.inference.stop import Stop as Stop
