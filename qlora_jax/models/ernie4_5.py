"""ERNIE 4.5, dense: Llama whose neighbouring features are rotated with each other."""

from typing import Any

from qlora_jax.models import llama, reading

MODEL_TYPE = "ernie4_5"
NAMES = llama.NAMES
IGNORED = llama.IGNORED
DEFAULTS = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    return reading.read(DEFAULTS | hf, problems(hf), rope_interleaved=True)


def problems(hf: dict[str, Any]) -> list[str]:
    """Returns what ERNIE may have and a decoder here has not."""
    if not hf.get("use_bias"):
        return []
    return ["use_bias is true; no bias in the feed-forward is supported"]
