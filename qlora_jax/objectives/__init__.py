"""Objectives: what training minimizes, each a value that the train step takes."""

from qlora_jax.objectives.base import Objective as Objective
from qlora_jax.objectives.base import of_hidden_states as of_hidden_states
from qlora_jax.objectives.find import make_objective as make_objective
from qlora_jax.objectives.logprobs import cross_entropy as cross_entropy
from qlora_jax.objectives.logprobs import next_tokens as next_tokens
from qlora_jax.objectives.logprobs import token_logprobs as token_logprobs
from qlora_jax.objectives.sft import SFT as SFT
