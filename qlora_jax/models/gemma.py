"""Gemma: norms stored as their difference from 1, scaled embeddings, tanh GELU."""

from collections.abc import Sequence
from typing import Any

from qlora_jax.models import llama, reading

MODEL_TYPE = "gemma"
NAMES = llama.NAMES
IGNORED = llama.IGNORED
DEFAULTS = {
    "head_dim": 256,
    "num_key_value_heads": 16,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    # 'gelu' in old configs means the tanh form too (transformers, GemmaConfig).
    return read_gemma(DEFAULTS | hf | {"hidden_act": "gelu_pytorch_tanh"})


def read_gemma(
    hf: dict[str, Any], problems: Sequence[str] = (), **fields: Any
) -> reading.Read:
    """Reads what all Gemmas share."""
    problems = [*problems]
    if hf.get("use_bidirectional_attention"):
        problems.append("use_bidirectional_attention is true; only causal is supported")
    return reading.read(
        hf,
        problems,
        embedding_scale=hf.get("hidden_size", 1) ** 0.5,
        norm_offset=1.0,
        **fields,
    )
