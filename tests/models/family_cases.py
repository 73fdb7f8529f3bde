"""Tiny models of every family, for goldens that need no stored weights.

Config, weights and tokens of a case all follow from its name and this file alone, so
that the golden files hold logits and no weights. numpy only: the script that makes the
goldens imports it beside torch.
"""

import hashlib
import math
from typing import Any

import numpy as np

VOCAB = 96
SEQ = 40
PADDED = 27
"""Real tokens of the second row where it is padded on the right."""

_GAINS = {
    "q_proj": 1.5,
    "k_proj": 1.5,
    "qkv_proj": 1.5,
    "q_b_proj": 1.5,
    "lm_head": 3.0,
    "gate": 3.0,  # a router: far from equal shares
    "router": 3.0,
}
"""Output size of a linear for inputs of size 1, where it is not 1.2: attention and
logits far from uniform."""
_GAIN = 1.2
_OF_HEADS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")


def _config(model_type: str, **changes: Any) -> dict[str, Any]:
    """Returns a config.json in the spelling of the hub's files."""
    return {
        "model_type": model_type,
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    } | changes


_SHORT = [1.0, 1.05, 1.1, 1.3, 1.6, 2.0, 2.5, 3.0]
_LONG = [1.0, 1.2, 1.7, 2.5, 4.0, 6.0, 9.0, 12.0]
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 1.0,
    "beta_slow": 0.125,
    "original_max_position_embeddings": 16,
}

_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "moe_intermediate_size": 16,
}

CASES: dict[str, dict[str, Any]] = {
    "llama_llama3": _config(
        "llama",
        hidden_size=64,
        head_dim=24,
        max_position_embeddings=128,
        rope_theta=500.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "llama_linear": _config(
        "llama",
        attention_bias=True,
        rope_scaling={"type": "linear", "factor": 3.0},
        tie_word_embeddings=True,
    ),
    "llama_dynamic": _config(
        "llama",
        max_position_embeddings=24,
        rope_theta=500.0,
        rope_scaling={"rope_type": "dynamic", "factor": 2.0},
    ),
    "llama_yarn": _config(
        "llama",
        head_dim=16,
        max_position_embeddings=128,
        rope_theta=500.0,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 1.0,
            "beta_slow": 0.125,
            "original_max_position_embeddings": 32,
        },
        tie_word_embeddings=True,
    ),
    "llama_yarn_mscale": _config(
        "llama",
        head_dim=16,
        max_position_embeddings=128,
        rope_theta=500.0,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 2.0,
            "beta_slow": 0.25,
            "mscale": 1.5,
            "mscale_all_dim": 0.5,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral": _config("mistral", num_key_value_heads=1, sliding_window=8),
    "mistral_full": _config(
        "mistral", head_dim=24, sliding_window=None, rope_theta=1e6
    ),
    "qwen2": _config(
        "qwen2",
        use_sliding_window=False,
        sliding_window=8,
        max_window_layers=1,
        tie_word_embeddings=True,
    ),
    "qwen2_window": _config(
        "qwen2",
        num_hidden_layers=4,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=2,
    ),
    "qwen3": _config("qwen3", head_dim=24, rope_theta=1e6, tie_word_embeddings=True),
    "qwen3_window": _config(
        "qwen3",
        head_dim=16,
        num_hidden_layers=3,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
    ),
    "qwen3_5_text": _config(
        "qwen3_5_text",
        head_dim=16,
        num_hidden_layers=6,
        full_attention_interval=3,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=12,
        rope_parameters={"rope_theta": 500.0, "partial_rotary_factor": 0.5},
    ),
    "qwen3_5_text_types": _config(
        "qwen3_5_text",
        head_dim=32,
        num_hidden_layers=4,
        layer_types=["linear_attention", *["full_attention"] * 2, "linear_attention"],
        linear_conv_kernel_dim=3,
        linear_num_key_heads=3,
        linear_num_value_heads=3,
        linear_key_head_dim=16,
        linear_value_head_dim=8,
        attention_bias=True,
        tie_word_embeddings=True,
    ),
    "gemma": _config("gemma", head_dim=24, num_key_value_heads=1, hidden_act="gelu"),
    "gemma2": _config(
        "gemma2",
        head_dim=24,
        num_hidden_layers=4,
        hidden_activation="gelu_pytorch_tanh",
        sliding_window=8,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=6.0,
    ),
    "gemma3_text": _config(
        "gemma3_text",
        head_dim=16,
        num_hidden_layers=5,
        sliding_window=8,
        sliding_window_pattern=3,
        query_pre_attn_scalar=12,
        rope_theta=5000.0,
        rope_local_base_freq=100.0,
        rope_scaling={"rope_type": "linear", "factor": 4.0},
    ),
    "gemma4_text": _config(
        "gemma4_text",
        head_dim=16,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=8,
        num_global_key_value_heads=1,
        global_head_dim=24,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        use_bidirectional_attention="vision",
        final_logit_softcapping=6.0,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.5,
                "rope_theta": 500.0,
            },
        },
    ),
    "gemma4_text_moe": _config(
        "gemma4_text",
        head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=8,
        global_head_dim=24,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=16,
    ),
    "gemma4_text_told": _config(
        "gemma4_text",
        head_dim=16,
        num_hidden_layers=7,
        layer_types=["sliding_attention", *["sliding_attention", "full_attention"] * 3],
        sliding_window=8,
        global_head_dim=24,
        num_kv_shared_layers=4,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB + 4,
        attention_bias=True,
    ),
    "phi3": _config("phi3", sliding_window=10, original_max_position_embeddings=64),
    "phi3_partial": _config(
        "phi3",
        hidden_size=64,
        partial_rotary_factor=0.5,
        original_max_position_embeddings=64,
    ),
    "phi3_longrope": _config(
        "phi3",
        hidden_size=64,
        original_max_position_embeddings=16,
        rope_scaling={
            "type": "longrope",
            "short_factor": _SHORT,
            "long_factor": _LONG,
        },
    ),
    "phi3_longrope_partial": _config(
        "phi3",
        hidden_size=64,
        partial_rotary_factor=0.75,
        original_max_position_embeddings=32,
        max_position_embeddings=128,
        rope_scaling={
            "type": "longrope",
            "short_factor": _SHORT[:6],
            "long_factor": _LONG[:6],
        },
        tie_word_embeddings=True,
    ),
    "smollm3": _config("smollm3", num_hidden_layers=4, no_rope_layer_interval=2),
    "smollm3_window": _config(
        "smollm3",
        num_hidden_layers=3,
        head_dim=16,
        no_rope_layers=[1, 0, 0],
        use_sliding_window=True,
        sliding_window=8,
        tie_word_embeddings=False,
    ),
    "olmo2": _config("olmo2", hidden_size=64),
    "olmo3": _config(
        "olmo3",
        num_hidden_layers=3,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": YARN | {"rope_theta": 500.0},
        },
    ),
    "seed_oss": _config("seed_oss", head_dim=16, attention_out_bias=True),
    "ministral3": _config(
        "ministral3",
        head_dim=16,
        rope_parameters=YARN | {"rope_theta": 500.0, "llama_4_scaling_beta": 0.4},
    ),
    "hunyuan_v1_dense": _config(
        "hunyuan_v1_dense",
        head_dim=16,
        rope_scaling={"type": "dynamic", "factor": 1.0, "alpha": 50.0},
        tie_word_embeddings=True,
    ),
    "exaone4": _config("exaone4", sliding_window=8, sliding_window_pattern=2),
    "glm": _config("glm", head_dim=16),
    "glm4": _config("glm4", head_dim=16, attention_bias=False),
    "ernie4_5": _config("ernie4_5", head_dim=16, rope_theta=500.0),
    "cohere": _config("cohere", logit_scale=0.5, attention_bias=True),
    "cohere2": _config("cohere2", sliding_window=8, sliding_window_pattern=2),
    "helium": _config("helium", head_dim=8, attention_bias=True),
    "lfm2": _config(
        "lfm2",
        num_hidden_layers=3,
        norm_eps=1e-3,
        full_attn_idxs=[1],
        conv_bias=True,
        block_ffn_dim_multiplier=1.2,
        block_multiple_of=64,
        rope_theta=500.0,
    ),
    "lfm2_moe": _config(
        "lfm2_moe",
        num_hidden_layers=3,
        layer_types=["conv", "conv", "full_attention"],
        conv_L_cache=4,
        num_dense_layers=1,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        routed_scaling_factor=1.5,
        tie_embedding=False,
    ),
    "nanochat": _config("nanochat", final_logit_softcapping=5.0),
    "arcee": _config("arcee", head_dim=16),
    "granite": _config(
        "granite",
        hidden_size=64,
        embedding_multiplier=5.0,
        attention_multiplier=0.4,
        residual_multiplier=0.7,
        logits_scaling=3.0,
        tie_word_embeddings=True,
    ),
    "granitemoehybrid": _config(
        "granitemoehybrid",
        num_hidden_layers=3,
        layer_types=["mamba", "attention", "mamba"],
        intermediate_size=24,
        shared_intermediate_size=40,
        num_local_experts=4,
        num_experts_per_tok=2,
        mamba_n_heads=8,
        mamba_n_groups=2,
        mamba_d_state=12,
        position_embedding_type="nope",
        embedding_multiplier=5.0,
        attention_multiplier=0.4,
        residual_multiplier=0.7,
        logits_scaling=3.0,
    ),
    "granitemoehybrid_dense": _config(
        "granitemoehybrid",
        layer_types=["mamba", "attention"],
        shared_intermediate_size=40,
        num_local_experts=0,
        num_experts_per_tok=0,
        mamba_n_heads=4,
        mamba_d_state=16,
        mamba_d_conv=3,
        mamba_conv_bias=False,
        mamba_proj_bias=True,
        position_embedding_type="rope",
        tie_word_embeddings=True,
    ),
    "mixtral": _config(
        "mixtral",
        intermediate_size=24,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=12,
    ),
    "qwen3_moe": _config(
        "qwen3_moe",
        head_dim=16,
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=16,
        norm_topk_prob=True,
        tie_word_embeddings=True,
    ),
    "qwen3_moe_raw": _config(
        "qwen3_moe",
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        norm_topk_prob=False,
        use_sliding_window=True,
        sliding_window=8,
    ),
    "qwen3_moe_dense": _config(
        "qwen3_moe",
        head_dim=16,
        num_hidden_layers=3,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        norm_topk_prob=True,
        mlp_only_layers=[0],
    ),
    "qwen3_moe_step": _config(
        "qwen3_moe",
        head_dim=16,
        num_hidden_layers=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        norm_topk_prob=True,
        decoder_sparse_step=2,
    ),
    "qwen2_moe": _config(
        "qwen2_moe",
        num_hidden_layers=3,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        mlp_only_layers=[1],
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=2,
    ),
    "qwen3_next": _config(
        "qwen3_next",
        head_dim=16,
        num_hidden_layers=4,
        full_attention_interval=2,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=12,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        rope_theta=500.0,
    ),
    "qwen3_5_moe_text": _config(
        "qwen3_5_moe_text",
        head_dim=16,
        num_hidden_layers=2,
        full_attention_interval=2,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=12,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        rope_theta=500.0,
    ),
    "olmoe": _config("olmoe", hidden_size=64, num_experts=4, num_experts_per_tok=2),
    "glm4_moe": _config(
        "glm4_moe",
        head_dim=16,
        num_hidden_layers=3,
        attention_bias=True,
        use_qk_norm=True,
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=16,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.5,
    ),
    "deepseek_v3": _config(
        "deepseek_v3",
        **_LATENT,
        rms_norm_eps=1e-2,
        num_hidden_layers=3,
        attention_bias=True,
        q_lora_rank=24,
        n_routed_experts=8,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=3,
        first_k_dense_replace=1,
        routed_scaling_factor=1.5,
        rope_scaling=YARN | {"mscale": 0.8, "mscale_all_dim": 1.2},
    ),
    "deepseek_v3_plain": _config(
        "deepseek_v3",
        **_LATENT,
        q_lora_rank=None,
        rope_interleave=False,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=0,
        norm_topk_prob=False,
    ),
    "deepseek_v2": _config(
        "deepseek_v2",
        **_LATENT,
        num_hidden_layers=3,
        q_lora_rank=None,
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=3,
        topk_method="group_limited_greedy",
        first_k_dense_replace=1,
        routed_scaling_factor=1.5,
        rope_theta=500.0,
    ),
    "glm4_moe_lite": _config(
        "glm4_moe_lite",
        **_LATENT,
        num_hidden_layers=3,
        q_lora_rank=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        mlp_layer_types=["dense", "sparse", "dense"],
    ),
    "minimax_m2": _config(
        "minimax_m2",
        head_dim=16,
        rotary_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "ernie4_5_moe": _config(
        "ernie4_5_moe",
        head_dim=16,
        num_hidden_layers=3,
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=16,
        moe_num_shared_experts=2,
    ),
    "gpt_oss": _config(
        "gpt_oss",
        head_dim=16,
        num_hidden_layers=3,
        num_local_experts=4,
        num_experts_per_tok=2,
        intermediate_size=24,
        sliding_window=8,
        swiglu_limit=1.5,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 2.0,
            "beta_slow": 0.25,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
    ),
}
"""Name of a case -> its config.json."""


_HEADS = {"helium": 40, "deepseek_v3": 128, "glm4_moe_lite": 20}
"""Families -> heads that go with the heads of keys and values that they take."""

_NEEDED = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "lfm2_moe": {"layer_types": ["conv"] * 12},
    "granitemoehybrid": {"mamba_n_heads": 16},
}
"""Families -> what they have no default of."""

_HIDDEN = {"glm4_moe": 128, "glm4_moe_lite": 80}
"""Families -> a size of the stream where 64 is none: GLM-4.5 rotates half of a head."""


def sizes(family: str) -> dict[str, Any]:
    """Returns all that a config.json must have; what families take for the rest is a golden."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": _HIDDEN.get(family, 64),
        "intermediate_size": 48,
        "num_hidden_layers": 12,
        "num_attention_heads": _HEADS.get(family, 32),
        **_NEEDED.get(family, {}),
    }


SHORTER = {"llama_dynamic": 20, "phi3_longrope": 16, "phi3_longrope_partial": 32}
"""Cases whose frequencies depend on the length -> a length that scaling leaves alone."""


def weight(case: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the float32 tensor of a case, by its name on disk."""
    x = _uniform(f"{case}/{name}", shape)
    part = name.split(".")[-2]
    family = CASES[case]["model_type"]
    if part.rstrip("_12").endswith("norm"):
        # Larger for q and k, so that normed scores are far from equal.
        center = 1.5 if part in _OF_HEADS else 1.0
        # Gemma 4 does not divide scores by the root of a head's features.
        center -= 1.0 * (family == "gemma4_text" and part in ("q_norm", "k_norm"))
        # Those of Gemma multiply by 1 + weight, and Qwen3.5's but for the delta net's.
        center -= family.startswith("gemma") and family != "gemma4_text"
        center -= family == "qwen3_5_text" and "linear_attn" not in name
        return (center + 0.25 * x).astype(np.float32)
    if name.endswith(("layer_scalar", "per_expert_scale")):
        return (0.8 + 0.1 * x).astype(np.float32)
    if name.endswith("router.scale"):  # divided by the root of the hidden size
        return (15 + 3 * x).astype(np.float32)
    if name.endswith("bias"):
        return (0.3 * x).astype(np.float32)
    if part == "embed_tokens":
        # Gemma multiplies them by sqrt(hidden), Granite by its multiplier.
        size = (
            0.2 if family.startswith("gemma") or family.startswith("granite") else 0.5
        )
        return (size * x).astype(np.float32)
    return (_GAINS.get(part, _GAIN) / math.sqrt(shape[-1]) * x).astype(np.float32)


def tokens(case: str, length: int | None = None) -> np.ndarray:
    """Returns int32 (2, length) token ids, the first of SEQ."""
    uniform = _uniform(f"{case}/tokens", (2, SEQ), 1.0)
    return (3 + (uniform + 1) / 2 * (VOCAB - 3)).astype(np.int32)[:, :length]


def padded_tokens(case: str) -> np.ndarray:
    """Returns `tokens` with zeros in the second row from PADDED on."""
    ids = tokens(case)
    ids[1, PADDED:] = 0
    return ids


def positions(length: int) -> list[int]:
    """Returns the positions whose logits a golden holds."""
    return [1, length // 2, length - 1]


def _uniform(key: str, shape: tuple[int, ...], limit: float = math.sqrt(3)):
    """Returns float64 values in [-limit, limit), of variance 1 by default.

    From the raw bits of PCG64, which numpy keeps the same between versions (what its
    distributions make of them may change).
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "big")
    raw = np.random.PCG64(seed).random_raw(math.prod(shape))
    return (2 * limit * ((raw >> np.uint64(11)) * 2.0**-53) - limit).reshape(shape)
