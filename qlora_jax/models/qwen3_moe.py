"""Qwen3 mixture of experts (30B-A3B, 235B-A22B), where some layers may have none."""

from typing import Any

from qlora_jax.models import llama, mixture, reading
from qlora_jax.models.spec import ExpertsSpec

MODEL_TYPE = "qwen3_moe"
NAMES = llama.NAMES | llama.QK_NORM | mixture.names()
PARAMETERS = mixture.parameters()
IGNORED = llama.IGNORED
DEFAULTS = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    if "num_local_experts" in hf:
        hf = {"num_experts": hf["num_local_experts"]} | hf
    hf = DEFAULTS | hf
    return reading.read(
        hf,
        feed_forwards=mixture.layers(hf, mixture.qwen_dense(hf), ExpertsSpec()),
        intermediate_size=hf["moe_intermediate_size"],
        qk_norm="head",
        sliding_window=hf["sliding_window"] if hf.get("use_sliding_window") else None,
        num_experts=hf["num_experts"],
        experts_per_token=hf["num_experts_per_tok"],
        normalize_experts=bool(hf["norm_topk_prob"]),
    )
