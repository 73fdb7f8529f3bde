"""GLM-4 (0414): GLM with norms before and after attention and feed-forward."""

from typing import Any

from qlora_jax.models import glm, reading

MODEL_TYPE = "glm4"
NAMES = glm.NAMES | {
    "layers.attn_post_norm.weight": "model.layers.{}.post_self_attn_layernorm.weight",
    "layers.mlp_post_norm.weight": "model.layers.{}.post_mlp_layernorm.weight",
}
IGNORED = glm.IGNORED
DEFAULTS = glm.DEFAULTS


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    return glm.read_glm(hf, norms="both")
