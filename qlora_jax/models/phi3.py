"""Phi-3 and Phi-4: one linear for q, k and v, one for gate and up; LongRoPE."""

from typing import Any

from qlora_jax.models import llama, reading

MODEL_TYPE = "phi3"
NAMES = llama.NAMES | {
    "layers.attn.qkv_proj.kernel": "model.layers.{}.self_attn.qkv_proj.weight",
    "layers.mlp.gate_up_proj.kernel": "model.layers.{}.mlp.gate_up_proj.weight",
}
IGNORED = llama.IGNORED
DEFAULTS = {
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    hf = DEFAULTS | hf
    rope = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    kind = rope.get("rope_type") or rope.get("type")
    if kind in ("su", "yarn"):  # what early checkpoints call it
        rope["rope_type"] = "longrope"
    return reading.read(
        hf,
        rope=rope,
        partial_rotary=True,
        fused_qkv=True,
        fused_gate_up=True,
        sliding_window=hf.get("sliding_window"),
    )
