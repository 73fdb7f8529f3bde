"""Qwen2 mixture of experts (Qwen1.5-MoE, Qwen2-57B-A14B): a shared expert with a gate."""

from typing import Any

from qlora_jax.models import llama, mixture, reading
from qlora_jax.models.spec import ExpertsSpec

MODEL_TYPE = "qwen2_moe"
SHARED = mixture.shared(
    f"{mixture.MLP}.shared_expert", f"{mixture.MLP}.shared_expert_gate.weight"
)
NAMES = llama.NAMES | mixture.names() | SHARED
PARAMETERS = mixture.parameters()
IGNORED = llama.IGNORED
DEFAULTS = {
    "num_key_value_heads": 16,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "qkv_bias": True,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    hf = DEFAULTS | hf
    count, last = hf.get("num_hidden_layers") or 0, hf["max_window_layers"]
    windows = bool(hf.get("use_sliding_window"))
    types = [
        reading.SLIDING if windows and i % 2 == 0 and i < last else reading.FULL
        for i in range(count)
    ]
    experts = ExpertsSpec(
        shared_size=hf["shared_expert_intermediate_size"], shared_gate=True
    )
    return reading.read(
        hf | {"sliding_window": hf["sliding_window"] if windows else None},
        types=types,
        feed_forwards=mixture.layers(hf, mixture.qwen_dense(hf), experts),
        intermediate_size=hf["moe_intermediate_size"],
        attention_bias=bool(hf["qkv_bias"]),
        output_bias=False,
        num_experts=hf["num_experts"],
        experts_per_token=hf["num_experts_per_tok"],
        normalize_experts=bool(hf["norm_topk_prob"]),
    )
