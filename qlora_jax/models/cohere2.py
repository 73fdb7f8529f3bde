"""Command R7B and A: Command R with windows, and no rotary positions where there is none."""

from typing import Any

from qlora_jax.models import cohere, reading

MODEL_TYPE = "cohere2"
NAMES = cohere.NAMES
IGNORED = cohere.IGNORED
DEFAULTS = cohere.DEFAULTS | {
    "rope_theta": 1e4,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    # transformers derives the size of a head, whatever head_dim says.
    hf = DEFAULTS | {key: value for key, value in hf.items() if key != "head_dim"}
    types, problems = reading.full_each(hf, hf["sliding_window_pattern"])
    windowed = reading.SLIDING in (hf.get("layer_types") or types)
    if windowed and hf["sliding_window"] is None:
        problems.append("sliding_window is null, and there are sliding layers")
    return cohere.read_cohere(hf, problems, types=types, full_rope="none")
