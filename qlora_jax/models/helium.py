"""Helium: Llama whose neighbouring features are rotated with each other, and eps is 1e-8."""

from typing import Any

from qlora_jax.models import llama, reading

MODEL_TYPE = "helium"
NAMES = llama.NAMES
IGNORED = llama.IGNORED
DEFAULTS = {
    "num_key_value_heads": 20,
    "head_dim": 128,
    "rms_norm_eps": 1e-8,
    "rope_theta": 1e5,
    "max_position_embeddings": 4096,
}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    return reading.read(DEFAULTS | hf, output_bias=False, rope_interleaved=True)
