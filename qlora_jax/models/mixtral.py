"""Mixtral: Mistral with a choice of feed-forwards."""

from typing import Any

from qlora_jax.models import llama, reading
from qlora_jax.models.fused import parameters

MODEL_TYPE = "mixtral"
_MOE = "model.layers.{}.block_sparse_moe"
NAMES = llama.NAMES | {
    "layers.mlp.router.weight": f"{_MOE}.gate.weight",
    "layers.mlp.experts.gate_proj.kernel": f"{_MOE}.experts.{{}}.w1.weight",
    "layers.mlp.experts.down_proj.kernel": f"{_MOE}.experts.{{}}.w2.weight",
    "layers.mlp.experts.up_proj.kernel": f"{_MOE}.experts.{{}}.w3.weight",
}
PARAMETERS = parameters(
    "model.layers.{}.mlp.experts",
    *(f"{_MOE}.experts.{{}}.{name}.weight" for name in ("w1", "w3", "w2")),
)
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
