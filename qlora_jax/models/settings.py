"""What the fields of a config.json may hold, of all families: one table for all readers.

Bounds are far from every published model, and near enough that what is within them can be
handled: a shape that fits them is compared with the tensors before anything is made of it.
"""

import math
from collections.abc import Mapping
from typing import Any

from qlora_jax.schema import (
    FLAG,
    NULL,
    OBJECT,
    TEXT,
    Kind,
    either,
    listed,
    mapped,
    misfits,
    number,
    shaped,
    whole,
)

MAX_LAYERS = 1000
"""Layers that a model may have; the work of grouping them grows with their square."""

MAX_EXPERTS = 8192
MAX_ROWS = 2**24
"""Tokens that a vocabulary may have."""

_LONGEST = 2**31 - 1

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_WIDTH, _EXPERTS = whole(1, 2**20), whole(1, MAX_EXPERTS)
_HEADS, _FEATURES = whole(1, 2**12), whole(1, 2**13)
_SCALE = number(0, 1e6)

KINDS: dict[str, Kind] = {
    "model_type": TEXT,
    "vocab_size": whole(1, MAX_ROWS),
    "hidden_size": _WIDTH,
    "intermediate_size": _WIDTH,
    "moe_intermediate_size": _WIDTH,
    "num_hidden_layers": whole(1, MAX_LAYERS),
    "num_attention_heads": _HEADS,
    "num_key_value_heads": either(NULL, _HEADS),
    "num_global_key_value_heads": either(NULL, _HEADS),
    "head_dim": either(NULL, _FEATURES),
    "global_head_dim": _FEATURES,
    "per_layer_config": either(
        NULL,
        mapped(shaped({"head_dim": _FEATURES, "num_key_value_heads": _HEADS})),
    ),
    "max_position_embeddings": whole(1, _LONGEST),
    "original_max_position_embeddings": either(NULL, whole(2, _LONGEST)),
    "rms_norm_eps": number(0, 1),
    "layer_norm_eps": number(0, 1),
    "hidden_act": either(NULL, TEXT),
    "hidden_activation": either(NULL, TEXT),
    "attention_bias": either(NULL, FLAG),
    "attention_k_eq_v": either(NULL, FLAG),
    "num_kv_shared_layers": whole(0, MAX_LAYERS),
    "use_double_wide_mlp": either(NULL, FLAG),
    "hidden_size_per_layer_input": whole(0, 2**20),
    "vocab_size_per_layer_input": whole(1, MAX_ROWS),
    "enable_moe_block": either(NULL, FLAG),
    "mlp_bias": either(NULL, FLAG),
    "attention_out_bias": either(NULL, FLAG),
    "use_bias": either(NULL, FLAG),
    "use_qk_norm": either(NULL, FLAG),
    "tie_word_embeddings": either(NULL, FLAG),
    # Windows, and layers that differ
    "sliding_window": either(NULL, whole(1, _LONGEST)),
    "use_sliding_window": either(NULL, FLAG),
    "max_window_layers": whole(0, _LONGEST),
    "sliding_window_pattern": either(NULL, TEXT, whole(0, _LONGEST)),
    "layer_types": either(NULL, listed(TEXT, MAX_LAYERS)),
    "no_rope_layers": either(NULL, listed(either(FLAG, whole(0, 1)), MAX_LAYERS)),
    "no_rope_layer_interval": whole(1, _LONGEST),
    "decoder_sparse_step": whole(1, _LONGEST),
    "mlp_only_layers": either(NULL, listed(whole(0, _LONGEST), MAX_LAYERS)),
    # Experts
    "num_experts": _EXPERTS,
    "num_local_experts": whole(0, MAX_EXPERTS),
    "num_experts_per_tok": whole(0, MAX_EXPERTS),
    "top_k_experts": _EXPERTS,
    "norm_topk_prob": either(NULL, FLAG),
    "n_routed_experts": _EXPERTS,
    "n_shared_experts": whole(0, MAX_EXPERTS),
    "n_group": _EXPERTS,
    "topk_group": _EXPERTS,
    "routed_scaling_factor": _SCALE,
    "first_k_dense_replace": whole(0, MAX_LAYERS),
    "shared_expert_intermediate_size": _WIDTH,
    "qkv_bias": either(NULL, FLAG),
    "clip_qkv": either(NULL, _SCALE),
    "rotary_dim": either(NULL, whole(1, 2**13)),
    "moe_k": _EXPERTS,
    "moe_num_experts": _EXPERTS,
    "moe_num_shared_experts": whole(0, MAX_EXPERTS),
    "moe_layer_start_index": whole(0, MAX_LAYERS),
    "moe_layer_end_index": whole(-1, MAX_LAYERS),
    "moe_layer_interval": whole(1, MAX_LAYERS),
    "swiglu_alpha": _SCALE,
    "swiglu_limit": _SCALE,
    "mlp_layer_types": either(NULL, listed(TEXT, MAX_LAYERS)),
    "moe_layer_freq": _EXPERTS,
    "topk_method": TEXT,
    "scoring_func": TEXT,
    # Latent attention
    "q_lora_rank": either(NULL, _WIDTH),
    "kv_lora_rank": _WIDTH,
    "qk_nope_head_dim": whole(1, 2**13),
    "qk_rope_head_dim": whole(1, 2**13),
    "v_head_dim": whole(1, 2**13),
    "rope_interleave": either(NULL, FLAG),
    # LFM2
    "norm_eps": number(0, 1),
    "conv_L_cache": whole(1, 64),
    "conv_bias": either(NULL, FLAG),
    "block_auto_adjust_ff_dim": either(NULL, FLAG),
    "block_ffn_dim_multiplier": either(NULL, _SCALE),
    "block_multiple_of": whole(1, 2**20),
    "block_ff_dim": _WIDTH,
    "full_attn_idxs": either(NULL, listed(whole(0, _LONGEST), MAX_LAYERS)),
    "tie_embedding": either(NULL, FLAG),
    "num_dense_layers": whole(0, MAX_LAYERS),
    "use_expert_bias": either(NULL, FLAG),
    # Granite 4
    "shared_intermediate_size": whole(0, 2**20),
    "position_embedding_type": either(NULL, TEXT),
    "layers_block_type": either(NULL, listed(TEXT, MAX_LAYERS)),
    "time_step_limit": either(
        NULL, listed(either(number(0, math.inf, least=True), OBJECT))
    ),
    "mamba_n_heads": whole(1, 2**12),
    "mamba_n_groups": whole(1, 2**12),
    "mamba_d_state": whole(1, 2**13),
    "mamba_d_head": either(TEXT, whole(1, 2**13)),
    "mamba_d_conv": whole(1, 64),
    "mamba_expand": whole(1, 64),
    "mamba_conv_bias": either(NULL, FLAG),
    "mamba_proj_bias": either(NULL, FLAG),
    # The gated delta net
    "full_attention_interval": either(NULL, whole(1, _LONGEST)),
    "linear_conv_kernel_dim": either(NULL, whole(1, 64)),
    "linear_num_key_heads": either(NULL, _HEADS),
    "linear_num_value_heads": either(NULL, _HEADS),
    "linear_key_head_dim": either(NULL, _FEATURES),
    "linear_value_head_dim": either(NULL, _FEATURES),
    # Scales
    "embedding_multiplier": _SCALE,
    "attention_multiplier": _SCALE,
    "residual_multiplier": _SCALE,
    "logits_scaling": _SCALE,
    "logit_scale": _SCALE,
    "query_pre_attn_scalar": _SCALE,
    "attn_logit_softcapping": either(NULL, _SCALE),
    "final_logit_softcapping": either(NULL, _SCALE),
    # Rotary positions
    "rope_theta": either(NULL, number(1, 1e12)),
    "rope_local_base_freq": either(NULL, number(1, 1e12)),
    "partial_rotary_factor": either(NULL, number(0, 1)),
    "rope_scaling": either(NULL, OBJECT),
    "rope_parameters": either(NULL, OBJECT),
    "quantization_config": either(NULL, OBJECT),
}
"""Field -> its kind. What is not here no family reads, or reads as true or false alone."""

_FACTOR = either(NULL, _SCALE)
_FACTORS = either(NULL, listed(_SCALE, 2**13))

ROPE_KINDS: dict[str, Kind] = {
    "rope_type": either(NULL, TEXT),
    "type": either(NULL, TEXT),
    "rope_theta": KINDS["rope_theta"],
    "partial_rotary_factor": KINDS["partial_rotary_factor"],
    "original_max_position_embeddings": KINDS["original_max_position_embeddings"],
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), _FACTOR),
    **dict.fromkeys(("beta_fast", "beta_slow", "attention_factor"), _FACTOR),
    "mscale": either(NULL, number(0, 1e6, least=True)),
    "mscale_all_dim": either(NULL, number(0, 1e6, least=True)),
    "truncate": either(NULL, FLAG),
    "alpha": _FACTOR,  # of Hunyuan
    "llama_4_scaling_beta": _FACTOR,  # of Ministral 3
    "short_factor": _FACTORS,
    "long_factor": _FACTORS,
}
"""Fields of rope_scaling and rope_parameters -> the kinds of values that they may have."""

_WEIGHTS = shaped(
    {
        "num_bits": either(NULL, whole(1, 64)),
        "type": either(NULL, TEXT),
        "strategy": either(NULL, TEXT),
        "group_size": either(NULL, whole(-1, _LONGEST)),
        "block_structure": either(NULL, listed(whole(1, _LONGEST), 2)),
    }
)
"""What compressed-tensors says of the weights of a group of modules."""

QUANTIZATION_KINDS: dict[str, Kind] = {
    "quant_method": either(NULL, TEXT),
    "load_in_4bit": either(NULL, FLAG),
    "bnb_4bit_quant_type": TEXT,
    "bnb_4bit_use_double_quant": either(NULL, FLAG),
    "llm_int8_skip_modules": either(NULL, listed(TEXT)),
    "int8_tables": listed(TEXT),
    "linears": either(NULL, OBJECT),
    "mxfp4": either(NULL, OBJECT),
    "modules_to_not_convert": either(NULL, listed(TEXT)),
    # Of folders that other libraries quantized (sources/encoded)
    "bits": either(NULL, number(0, 64)),
    "group_size": either(NULL, whole(-1, _LONGEST)),
    **dict.fromkeys(
        ("format", "checkpoint_format", "version", "backend", "pack_dtype"),
        either(NULL, TEXT),
    ),
    **dict.fromkeys(("scale_fmt", "expert_dtype"), either(NULL, TEXT)),
    **dict.fromkeys(("zero_point", "is_marlin_format"), either(NULL, FLAG)),
    "weight_block_size": either(NULL, listed(whole(1, _LONGEST), 2)),
    "quantization_status": either(NULL, TEXT),
    "sparsity_config": either(NULL, OBJECT),
    "transform_config": either(NULL, OBJECT),
    "config_groups": either(NULL, mapped(shaped({"weights": either(NULL, _WEIGHTS)}))),
}
"""Fields of quantization_config, and of the `linears` in ours -> the kinds of values that they
may have."""

LAYER_ROPES = ("full_attention", "sliding_attention")
"""Objects that rope_parameters has where kinds of layers differ in it."""


def of_some_families(name: str) -> bool:
    """Whether a field is one that families may lack, and of which null is no value."""
    every = ("model_type", "max_position_embeddings", "rms_norm_eps", *REQUIRED)
    return name in KINDS and name not in every and not KINDS[name].fits(None)


def present(hf: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config.json without the fields that are null, where null says nothing.

    transformers writes null for what a model has not, fields of other families among them.
    Where null is a value, as of a sliding_window, its kind says so; what the family itself or
    every family has cannot be null, in transformers either.

    Args:
      hf: The object of config.json.
      own: The fields that the family has beside those of all.
    """
    return {
        name: value
        for name, value in hf.items()
        if value is not None or name in own or not of_some_families(name)
    }


def missing(hf: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for each size that a config.json lacks."""
    return [f"{name} is missing" for name in REQUIRED if hf.get(name) is None]


def misfitting(hf: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for each field of a config.json that cannot be what it is."""
    absent = {name for name in REQUIRED if hf.get(name) is None}
    problems = misfits({k: v for k, v in hf.items() if k not in absent}, KINDS)
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := hf.get(name), dict):
            problems += misfits(rope, ROPE_KINDS, within=f"{name}.")
            inner = {key: rope[key] for key in LAYER_ROPES if key in rope}
            if mapped(OBJECT).fits(inner):
                for key, values in inner.items():
                    within = f"{name}.{key}."
                    problems += misfits(values, ROPE_KINDS, within=within)
            else:
                problems.append(f"{name} has a kind of layers that is no object")
    return problems


def misfitting_quantization(hf: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for each field of quantization_config that cannot be what it is."""
    stored, within = hf.get("quantization_config"), "quantization_config."
    if not isinstance(stored, dict):
        return misfits(hf, {"quantization_config": KINDS["quantization_config"]})
    problems = misfits(stored, QUANTIZATION_KINDS, within=within)
    if isinstance(linears := stored.get("linears"), dict):
        problems += misfits(linears, QUANTIZATION_KINDS, within=f"{within}linears.")
    return problems
