"""GLM-4 (9B of 2024): neighbouring features of half a head are rotated with each other."""

from typing import Any

from qlora_jax.models import llama, reading

MODEL_TYPE = "glm"
NAMES = llama.NAMES | {
    "layers.mlp.gate_up_proj.kernel": "model.layers.{}.mlp.gate_up_proj.weight",
}
IGNORED = llama.IGNORED
DEFAULTS = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1.5625e-07,
    "max_position_embeddings": 131072,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    return read_glm(hf)


def read_glm(hf: dict[str, Any], **fields: Any) -> reading.Read:
    """Reads what both GLM-4s share."""
    return reading.read(
        DEFAULTS | hf,
        partial_rotary=True,
        output_bias=False,
        rope_interleaved=True,
        fused_gate_up=True,
        **fields,
    )
