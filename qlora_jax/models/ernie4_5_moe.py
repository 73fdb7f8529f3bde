"""ERNIE 4.5 mixtures (21B-A3B, 300B-A47B): shared experts, and a correction of the choice."""

from typing import Any

from qlora_jax.models import ernie4_5, llama, mixture, reading
from qlora_jax.models.spec import ExpertsSpec

MODEL_TYPE = "ernie4_5_moe"
NAMES = (
    llama.NAMES
    | mixture.names()
    | mixture.correction(f"{mixture.MLP}.moe_statics.e_score_correction_bias")
    | mixture.shared(f"{mixture.MLP}.shared_experts")
)
PARAMETERS = mixture.parameters()
IGNORED = llama.IGNORED
DEFAULTS = ernie4_5.DEFAULTS | {
    "num_key_value_heads": 4,
    "head_dim": None,
    "moe_intermediate_size": 1536,
    "moe_k": 6,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    for ours, theirs in (
        ("moe_num_experts", "num_experts"),
        ("moe_k", "num_experts_per_tok"),
    ):
        if theirs in hf:
            hf = {ours: hf[theirs]} | hf
    hf = DEFAULTS | hf
    wide, count = hf["moe_intermediate_size"], hf.get("num_hidden_layers") or 0
    end = hf["moe_layer_end_index"]
    inside = range(hf["moe_layer_start_index"], count if end == -1 else end + 1)
    dense = {
        i for i in range(count) if i not in inside or (i + 1) % hf["moe_layer_interval"]
    }
    experts = ExpertsSpec(correction=2, shared_size=wide * hf["moe_num_shared_experts"])
    return reading.read(
        hf,
        ernie4_5.problems(hf),
        rope_interleaved=True,
        feed_forwards=mixture.layers(hf, dense, experts),
        intermediate_size=wide,
        num_experts=hf["moe_num_experts"],
        experts_per_token=hf["moe_k"],
    )
