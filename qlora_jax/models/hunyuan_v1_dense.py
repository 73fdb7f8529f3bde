"""Hunyuan dense: a norm on every head of q and k, after they are rotated."""

from typing import Any

from qlora_jax.models import llama, reading

MODEL_TYPE = "hunyuan_v1_dense"
NAMES = llama.NAMES | {
    "layers.attn.q_norm.weight": "model.layers.{}.self_attn.query_layernorm.weight",
    "layers.attn.k_norm.weight": "model.layers.{}.self_attn.key_layernorm.weight",
}
IGNORED = llama.IGNORED
DEFAULTS = {"rms_norm_eps": 1e-5}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    hf = DEFAULTS | hf
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type")
    if kind == "dynamic" and (alpha := rope.get("alpha")):
        # Here "dynamic" depends on no length: alpha stretches the base.
        dim = reading.head_dim(hf)
        theta = rope.get("rope_theta") or hf.get("rope_theta") or 1e4
        grown = alpha ** (dim / (dim - 2)) if dim > 2 else 1.0
        rope = {"rope_theta": theta * grown}
    return reading.read(hf, rope=rope, qk_norm="rotated")
