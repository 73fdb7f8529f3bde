"""Mistral: Llama with an optional sliding window."""

from typing import Any

from qlora_jax.models import llama, reading

MODEL_TYPE = "mistral"
NAMES = llama.NAMES
IGNORED = llama.IGNORED
DEFAULTS = {
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "max_position_embeddings": 131072,
}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    hf = DEFAULTS | hf
    return reading.read(hf, sliding_window=hf["sliding_window"])
