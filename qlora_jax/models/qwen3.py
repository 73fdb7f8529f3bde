"""Qwen3: a norm on every head of q and k."""

from typing import Any

from qlora_jax.models import llama, qwen2, reading

MODEL_TYPE = "qwen3"
NAMES = llama.NAMES | llama.QK_NORM
IGNORED = llama.IGNORED
DEFAULTS = qwen2.DEFAULTS | {"head_dim": 128}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    hf = DEFAULTS | hf
    return reading.read(hf, qk_norm="head", types=reading.qwen_types(hf))
