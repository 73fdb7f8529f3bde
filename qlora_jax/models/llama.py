"""Llama (2, 3, 3.1 and everything saved as LlamaForCausalLM)."""

from typing import Any

from qlora_jax.errors import CheckpointError
from qlora_jax.models import reading
from qlora_jax.models.config import DecoderConfig

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


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """Returns a config.json for a decoder that came from no folder.

    Raises:
      CheckpointError: it is no Llama, Mistral or Qwen2.
    """
    rope: dict[str, Any] | None = None
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope = {
            "rope_type": scaling.kind,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    kind, architecture = MODEL_TYPE, "LlamaForCausalLM"
    if config.sliding_window is not None:
        kind, architecture = "mistral", "MistralForCausalLM"
    elif config.attention_bias and not config.output_bias:
        kind, architecture = "qwen2", "Qwen2ForCausalLM"
    written = {
        "architectures": [architecture],
        "model_type": kind,
        "sliding_window": config.sliding_window,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "attention_bias": config.attention_bias,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    from qlora_jax.models import FAMILIES

    if FAMILIES[kind].read_config(written)[0] != config:
        raise CheckpointError(
            "the model's shape is of no family whose config.json can be written from "
            "nothing (llama, mistral, qwen2); give the folder it came from as source="
        )
    return written
