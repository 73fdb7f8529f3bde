"""Granite: Llama with multipliers on embeddings, scores, residuals and logits."""

from typing import Any

from qlora_jax.models import llama, reading

MODEL_TYPE = "granite"
NAMES = llama.NAMES
IGNORED = llama.IGNORED


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    return reading.read(hf, **multipliers(hf))


def multipliers(hf: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of DecoderConfig that Granite's multipliers are."""
    return {
        "embedding_scale": hf.get("embedding_multiplier", 1.0),
        "attention_scale": hf.get("attention_multiplier", 1.0),
        "residual_scale": hf.get("residual_multiplier", 1.0),
        "logit_scale": 1 / hf.get("logits_scaling", 1.0),
    }
