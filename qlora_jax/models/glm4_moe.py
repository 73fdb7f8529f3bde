"""GLM-4.5, 4.6 and 4.7: sigmoid scores with a correction, groups, and a shared expert.

The first layers have no experts, and half of a head is rotated. What predicts several tokens is
left out.
"""

from typing import Any

from qlora_jax.models import llama, mixture, reading
from qlora_jax.models.spec import ExpertsSpec

MODEL_TYPE = "glm4_moe"
NAMES = (
    llama.NAMES
    | llama.QK_NORM
    | mixture.names()
    | mixture.correction(f"{mixture.MLP}.gate.e_score_correction_bias")
    | mixture.shared(f"{mixture.MLP}.shared_experts")
)
PARAMETERS = mixture.parameters()
IGNORED = llama.IGNORED
DEFAULTS = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 128,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "use_qk_norm": False,
}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    hf = DEFAULTS | hf
    experts = corrected_experts(hf)
    return reading.read(
        hf,
        mixture.group_problems(hf),
        partial_rotary=True,
        feed_forwards=mixture.layers(hf, range(hf["first_k_dense_replace"]), experts),
        intermediate_size=hf["moe_intermediate_size"],
        output_bias=False,
        qk_norm="head" if hf["use_qk_norm"] else "none",
        num_experts=hf["n_routed_experts"],
        experts_per_token=hf["num_experts_per_tok"],
        normalize_experts=bool(hf["norm_topk_prob"]),
    )


def corrected_experts(hf: dict[str, Any]) -> ExpertsSpec:
    """Returns the experts of GLM-4.5 and DeepSeek V3; of a config.json with defaults."""
    return ExpertsSpec(
        score="sigmoid",
        correction=1,
        groups=hf["n_group"],
        top_groups=hf["topk_group"],
        scale=hf["routed_scaling_factor"],
        shared_size=hf["moe_intermediate_size"] * hf["n_shared_experts"],
    )
