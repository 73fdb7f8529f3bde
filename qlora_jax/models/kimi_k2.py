"""Kimi K2: DeepSeek V3 under a name of its own."""

from qlora_jax.models import deepseek_v3

MODEL_TYPE = "kimi_k2"
NAMES = deepseek_v3.NAMES
PARAMETERS = deepseek_v3.PARAMETERS
IGNORED = deepseek_v3.IGNORED
DEFAULTS = deepseek_v3.DEFAULTS
read_config = deepseek_v3.read_config
