"""Llama (2, 3, 3.1 and everything saved as LlamaForCausalLM)."""

from typing import Any

from qlora_jax.models import reading

MODEL_TYPE = "llama"

NAMES = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.kernel": "lm_head.weight",
    "layers.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.mlp_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layers.attn.q_proj.kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers.attn.k_proj.kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers.attn.v_proj.kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers.attn.o_proj.kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers.attn.q_proj.bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers.attn.k_proj.bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers.attn.v_proj.bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers.attn.o_proj.bias": "model.layers.{}.self_attn.o_proj.bias",
    "layers.mlp.gate_proj.kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers.mlp.up_proj.kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers.mlp.down_proj.kernel": "model.layers.{}.mlp.down_proj.weight",
}
"""Our path of a parameter -> its Hugging Face name; {} is the layer (and the expert)."""

QK_NORM = {
    "layers.attn.q_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
    "layers.attn.k_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
}
"""More names, of families that norm queries and keys."""

IGNORED = ("rotary_emb.inv_freq",)
"""Endings of tensors that old checkpoints carry and no model needs."""


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    return reading.read(hf)
