"""EXAONE 4: norms after attention and feed-forward, and on every head of q and k.

Where layers have windows, the others have no rotary positions.
"""

from typing import Any

from qlora_jax.models import olmo2, reading

MODEL_TYPE = "exaone4"
NAMES = olmo2.NAMES
IGNORED = olmo2.IGNORED
DEFAULTS = {
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
}


def read_config(hf: dict[str, Any]) -> reading.Read:
    """Reads a config.json: (config, problems)."""
    hf = DEFAULTS | hf
    pattern, windows = hf["sliding_window_pattern"], hf["sliding_window"] is not None
    layers = hf.get("num_hidden_layers") or 0
    if not windows:
        types, problems = [reading.FULL] * layers, []
    elif isinstance(pattern, str) and pattern and not set(pattern) - {*"LG"}:
        kinds = {"L": reading.SLIDING, "G": reading.FULL}
        types = [kinds[pattern[i % len(pattern)]] for i in range(layers)]
        problems = []
    else:
        types, problems = reading.full_each(hf, pattern)
    return reading.read(
        hf,
        problems,
        norms="post",
        qk_norm="head",
        attention_bias=False,
        output_bias=False,
        types=types,
        full_rope="none" if windows else "global",
    )
