"""LFM2 mixture (8B-A1B): the layers of LFM2, and sigmoid scores with a correction."""

from typing import Any

from qlora_jax.models import lfm2, mixture, reading
from qlora_jax.models.spec import ExpertsSpec

MODEL_TYPE = "lfm2_moe"
NAMES = (
    lfm2.NAMES
    | mixture.names(lfm2.MLP, lfm2.LINEARS)
    | mixture.correction(f"{lfm2.MLP}.expert_bias")
)
PARAMETERS = mixture.parameters(lfm2.MLP, lfm2.LINEARS, lfm2.MLP)
IGNORED = lfm2.IGNORED
DEFAULTS = lfm2.SHARED | {
    "moe_intermediate_size": 1792,
    "num_dense_layers": 2,
    "num_experts_per_tok": 4,
    "num_experts": 32,
    "use_expert_bias": True,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    hf = DEFAULTS | hf
    experts = ExpertsSpec(
        score="sigmoid",
        correction=1 if hf["use_expert_bias"] else 0,
        scale=hf["routed_scaling_factor"],
        sum_offset=1e-6,
    )
    return lfm2.read_hybrid(
        hf,
        feed_forwards=mixture.layers(hf, range(hf["num_dense_layers"]), experts),
        intermediate_size=hf["moe_intermediate_size"],
        num_experts=hf["num_experts"],
        experts_per_token=hf["num_experts_per_tok"],
        normalize_experts=bool(hf["norm_topk_prob"]),
    )
