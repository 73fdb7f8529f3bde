"""OLMoE: a mixture with norms over all heads of q and k."""

from typing import Any

from qlora_jax.models import llama, mixture, reading

MODEL_TYPE = "olmoe"
NAMES = llama.NAMES | llama.QK_NORM | mixture.names()
PARAMETERS = mixture.parameters()
IGNORED = llama.IGNORED
DEFAULTS = {
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    hf, problems = DEFAULTS | hf, []
    if hf.get("clip_qkv") is not None:
        problems.append(
            f"clip_qkv is {hf['clip_qkv']}; queries, keys and values are not clipped here"
        )
    return reading.read(
        hf,
        problems,
        qk_norm="all",
        num_experts=hf["num_experts"],
        experts_per_token=hf["num_experts_per_tok"],
        normalize_experts=bool(hf["norm_topk_prob"]),
    )
