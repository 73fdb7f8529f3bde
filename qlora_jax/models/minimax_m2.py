"""MiniMax M2: sigmoid scores with a correction; norms over all heads of q and k."""

from typing import Any

from qlora_jax.models import llama, mixture, reading
from qlora_jax.models.spec import ExpertsSpec

MODEL_TYPE = "minimax_m2"
_MOE, _LINEARS = "model.layers.{}.block_sparse_moe", ("w1", "w3", "w2")
NAMES = (
    llama.NAMES
    | llama.QK_NORM
    | mixture.names(_MOE, _LINEARS)
    | mixture.correction(f"{_MOE}.e_score_correction_bias")
)
PARAMETERS = mixture.parameters(_MOE, _LINEARS)
IGNORED = llama.IGNORED
DEFAULTS = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 196608,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e6,
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    if "num_experts" in hf:
        hf = {"num_local_experts": hf["num_experts"]} | hf
    hf = DEFAULTS | hf
    if (rotated := hf.get("rotary_dim")) is not None:
        hf = {"partial_rotary_factor": rotated / reading.head_dim(hf)} | hf
    experts = ExpertsSpec(score="sigmoid", correction=1)
    return reading.read(
        hf,
        partial_rotary=True,
        feed_forwards=mixture.layers(hf, (), experts),
        qk_norm="all",
        attention_bias=False,
        output_bias=False,
        num_experts=hf["num_local_experts"],
        experts_per_token=hf["num_experts_per_tok"],
    )
