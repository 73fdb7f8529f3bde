"""Ministral 3: Mistral with YaRN, whose queries grow with their position."""

from typing import Any

from qlora_jax.models import llama, reading

MODEL_TYPE = "ministral3"
NAMES = llama.NAMES
IGNORED = llama.IGNORED
DEFAULTS = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 262144,
}
_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    hf = DEFAULTS | hf
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or _ROPE
    beta, length = (
        rope.get(name)
        for name in ("llama_4_scaling_beta", "original_max_position_embeddings")
    )
    problems = []
    if beta is None or length is None:
        problems.append(
            "rope_parameters lacks llama_4_scaling_beta or original_max_position_embeddings, "
            "by which queries grow"
        )
    return reading.read(
        hf,
        problems,
        rope=rope,
        sliding_window=hf.get("sliding_window"),
        query_growth=(beta, length),
    )
