"""Arcee (AFM): Llama with a squared ReLU in place of the gate."""

from typing import Any

from qlora_jax.models import llama, reading

MODEL_TYPE = "arcee"
NAMES = llama.NAMES
IGNORED = llama.IGNORED
DEFAULTS = {
    "hidden_act": "relu2",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    return reading.read(DEFAULTS | hf, gated=False)
