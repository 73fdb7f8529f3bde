"""Command R: LayerNorm, and attention and feed-forward side by side.

Neighbouring features are rotated with each other.
"""

from collections.abc import Sequence
from typing import Any

from qlora_jax.models import llama, reading

MODEL_TYPE = "cohere"
NAMES = llama.NAMES
IGNORED = llama.IGNORED
DEFAULTS = {
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "rope_theta": 5e5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    return read_cohere(DEFAULTS | hf)


def read_cohere(
    hf: dict[str, Any], problems: Sequence[str] = (), **fields: Any
) -> reading.Read:
    """Reads what Command R, R7B and A share."""
    problems = [*problems]
    if hf.get("use_qk_norm"):
        problems.append(
            "use_qk_norm is true (Command R+); no LayerNorm with weights for each head is "
            "supported"
        )
    return reading.read(
        hf,
        problems,
        norms="parallel",
        norm_kind="layer",
        rms_norm_eps=hf["layer_norm_eps"],
        rope_interleaved=True,
        logit_scale=hf["logit_scale"],
        **fields,
    )
