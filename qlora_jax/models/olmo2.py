"""OLMo 2: norms after attention and feed-forward, and over all heads of q and k."""

from typing import Any

from qlora_jax.models import gemma2, llama, reading

MODEL_TYPE = "olmo2"
NAMES = gemma2.NAMES | llama.QK_NORM
IGNORED = llama.IGNORED


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    return reading.read({"rms_norm_eps": 1e-5} | hf, norms="post", qk_norm="all")
