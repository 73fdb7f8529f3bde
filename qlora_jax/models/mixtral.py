"""Mixtral: Mistral with a choice of feed-forwards."""

from typing import Any

from qlora_jax.models import llama, mixture, reading

MODEL_TYPE = "mixtral"
_MOE, _LINEARS = "model.layers.{}.block_sparse_moe", ("w1", "w3", "w2")
NAMES = llama.NAMES | mixture.names(_MOE, _LINEARS)
PARAMETERS = mixture.parameters(_MOE, _LINEARS)
IGNORED = llama.IGNORED
DEFAULTS = {
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "max_position_embeddings": 131072,
}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    hf = DEFAULTS | hf
    return reading.read(
        hf,
        sliding_window=hf.get("sliding_window"),
        num_experts=hf["num_local_experts"],
        experts_per_token=hf.get("num_experts_per_tok", 2),
    )
