"""Mistral: Llama with an optional sliding window."""

import dataclasses
from typing import Any

from qlora_jax.models import llama
from qlora_jax.models.decoder import DecoderConfig

MODEL_TYPE = "mistral"
NAMES = llama.NAMES
IGNORED = llama.IGNORED


def read_config(hf: dict[str, Any]) -> tuple[DecoderConfig | None, list[str]]:
    """Reads a config.json: (config, problems)."""
    config, problems = llama.read_config(hf)
    if config is None:
        return None, problems
    return dataclasses.replace(config, sliding_window=hf.get("sliding_window")), []
