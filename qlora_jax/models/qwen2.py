"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

import dataclasses
from typing import Any

from qlora_jax.models import llama
from qlora_jax.models.decoder import DecoderConfig

MODEL_TYPE = "qwen2"
NAMES = llama.NAMES
IGNORED = llama.IGNORED


def read_config(hf: dict[str, Any]) -> tuple[DecoderConfig | None, list[str]]:
    """Reads a config.json: (config, problems)."""
    config, problems = llama.read_config(hf)
    if hf.get("use_sliding_window"):
        problems.append("use_sliding_window is true; only full attention is supported")
    if config is None or problems:
        return None, problems
    return dataclasses.replace(config, attention_bias=True, output_bias=False), []
