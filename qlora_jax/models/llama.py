"""Llama (2, 3, 3.1 and everything saved as LlamaForCausalLM)."""

from typing import Any

from qlora_jax.models.decoder import DecoderConfig
from qlora_jax.nn.rope import RopeScaling

MODEL_TYPE = "llama"

NAMES = {
    "embed_tokens": "model.embed_tokens.weight",
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
"""Our path of a parameter -> its Hugging Face name; {} is the layer."""

IGNORED = ("rotary_emb.inv_freq",)
"""Endings of tensors that old checkpoints carry and no model needs."""

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_ROPE_KINDS = ("default", "linear", "llama3")


def read_config(hf: dict[str, Any]) -> tuple[DecoderConfig | None, list[str]]:
    """Reads a config.json.

    Returns:
      The decoder's config and no problems, or None and every problem found.
    """
    problems = [f"{key} is missing" for key in REQUIRED if key not in hf]
    act = hf.get("hidden_act", "silu")
    if act != "silu":
        problems.append(f"hidden_act is {act!r}, only 'silu' is supported")
    if hf.get("mlp_bias"):
        problems.append("mlp_bias is true; no bias in the feed-forward is supported")
    scaling, theta, rope_problem = read_rope(hf)
    if rope_problem:
        problems.append(rope_problem)
    if problems:
        return None, problems
    heads = hf["num_attention_heads"]
    bias = bool(hf.get("attention_bias", False))
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
        attention_bias=bias,
        output_bias=bias,
        max_position_embeddings=hf.get("max_position_embeddings", 2048),
    ), []


def read_rope(hf: dict[str, Any]) -> tuple[RopeScaling | None, float, str | None]:
    """Reads rotary settings: (scaling, theta, problem). Both of HF's spellings."""
    parameters = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = float(hf.get("rope_theta") or parameters.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in _ROPE_KINDS:
        known = ", ".join(_ROPE_KINDS)
        return None, theta, f"rope_scaling has type {kind!r}; known: {known}"
    if kind == "default":
        return None, theta, None
    fields = {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position": "original_max_position_embeddings",
    }
    if missing := [
        name
        for name in list(fields.values())[: 1 if kind == "linear" else 4]
        if name not in parameters
    ]:
        return None, theta, f"rope_scaling of type {kind!r} lacks {', '.join(missing)}"
    values = {ours: parameters[hf] for ours, hf in fields.items() if hf in parameters}
    return RopeScaling(kind=kind, **values), theta, None


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """Returns a config.json for a decoder that came from no folder."""
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
    return {
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
