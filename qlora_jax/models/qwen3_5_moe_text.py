"""Qwen3.5 mixture (35B-A3B), text: the layers of Qwen3.5, and experts with a shared one.

Files hold the experts of a layer together. Folders have it inside of a multimodal model
(wrappers.py).
"""

from typing import Any

from qlora_jax.models import mixture, qwen2_moe, qwen3_5_text, reading
from qlora_jax.models.spec import ExpertsSpec

MODEL_TYPE = "qwen3_5_moe_text"
NAMES = qwen3_5_text.NAMES | mixture.names() | qwen2_moe.SHARED
FUSED = mixture.parameters()
IGNORED = qwen3_5_text.IGNORED
DEFAULTS = qwen3_5_text.DEFAULTS | {
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 8,
    "num_experts": 256,
}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    hf = qwen3_5_text.with_defaults(hf, DEFAULTS)
    experts = ExpertsSpec(
        shared_size=hf["shared_expert_intermediate_size"], shared_gate=True
    )
    return qwen3_5_text.read_hybrid(
        hf,
        feed_forwards=mixture.layers(hf, (), experts),
        intermediate_size=hf["moe_intermediate_size"],
        num_experts=hf["num_experts"],
        experts_per_token=hf["num_experts_per_tok"],
    )
