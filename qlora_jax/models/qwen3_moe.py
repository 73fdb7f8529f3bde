"""Qwen3 mixture of experts (30B-A3B, 235B-A22B), where some layers may have none."""

from typing import Any

from qlora_jax.models import llama, reading
from qlora_jax.models.fused import parameters
from qlora_jax.models.spec import ExpertsSpec, MLPSpec

MODEL_TYPE = "qwen3_moe"
_MOE = "model.layers.{}.mlp"
NAMES = (
    llama.NAMES
    | llama.QK_NORM
    | {
        "layers.mlp.router.weight": f"{_MOE}.gate.weight",
        "layers.mlp.experts.gate_proj.kernel": f"{_MOE}.experts.{{}}.gate_proj.weight",
        "layers.mlp.experts.up_proj.kernel": f"{_MOE}.experts.{{}}.up_proj.weight",
        "layers.mlp.experts.down_proj.kernel": f"{_MOE}.experts.{{}}.down_proj.weight",
    }
)
PARAMETERS = parameters(
    f"{_MOE}.experts",
    *(
        f"{_MOE}.experts.{{}}.{name}.weight"
        for name in ("gate_proj", "up_proj", "down_proj")
    ),
)
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
    layers, every = hf.get("num_hidden_layers") or 0, hf["decoder_sparse_step"]
    dense = {*(hf.get("mlp_only_layers") or ())}
    dense |= {i for i in range(layers) if (i + 1) % every}
    mlp = MLPSpec(intermediate_size=hf.get("intermediate_size"))
    return reading.read(
        hf,
        feed_forwards=[mlp if i in dense else ExpertsSpec() for i in range(layers)],
        intermediate_size=hf["moe_intermediate_size"],
        qk_norm="head",
        sliding_window=hf["sliding_window"] if hf.get("use_sliding_window") else None,
        num_experts=hf["num_experts"],
        experts_per_token=hf["num_experts_per_tok"],
        normalize_experts=bool(hf["norm_topk_prob"]),
    )
