"""Qwen3-Next (80B-A3B): delta nets with fused linears, and experts with a shared one."""

from typing import Any

from qlora_jax.models import mixture, qwen2_moe, qwen3_5_text, reading
from qlora_jax.models.spec import ExpertsSpec

MODEL_TYPE = "qwen3_next"
_DELTA = "model.layers.{}.linear_attn"
_APART = tuple(f"layers.attn.in_proj_{part}.kernel" for part in ("qkv", "z", "b", "a"))
NAMES = (
    {ours: name for ours, name in qwen3_5_text.NAMES.items() if ours not in _APART}
    | {
        "layers.attn.in_proj_qkvz.kernel": f"{_DELTA}.in_proj_qkvz.weight",
        "layers.attn.in_proj_ba.kernel": f"{_DELTA}.in_proj_ba.weight",
    }
    | mixture.names()
    | qwen2_moe.SHARED
)
PARAMETERS = mixture.parameters()
IGNORED = qwen3_5_text.IGNORED
DEFAULTS = qwen3_5_text.DEFAULTS | {
    "num_key_value_heads": 2,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 10,
    "num_experts": 512,
    "norm_topk_prob": True,
}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    hf = qwen3_5_text.with_defaults(hf, DEFAULTS)
    experts = ExpertsSpec(
        shared_size=hf["shared_expert_intermediate_size"], shared_gate=True
    )
    return qwen3_5_text.read_hybrid(
        hf,
        fused=True,
        feed_forwards=mixture.layers(hf, mixture.qwen_dense(hf), experts),
        intermediate_size=hf["moe_intermediate_size"],
        num_experts=hf["num_experts"],
        experts_per_token=hf["num_experts_per_tok"],
        normalize_experts=bool(hf["norm_topk_prob"]),
    )
