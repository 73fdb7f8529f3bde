"""Rotary settings of a GGUF file: metadata and factors of frequencies."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qlora_jax.nn.rope import RopeScaling, inverse_frequencies
from qlora_jax.sources.gguf.architectures import ARCHITECTURES

FREQS = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
"""Tensors that hold rotary settings: what each frequency is divided by."""


def decimal(value: Any) -> Any:
    """Returns a float32's shortest decimal, which is what it was made from."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def read_rope(
    config: dict[str, Any], meta: dict[str, Any], factors: Mapping[str, np.ndarray]
) -> list[str]:
    """Adds the rotary settings to a config; returns problems."""
    prefix = f"{meta['general.architecture']}.rope."
    rope = {
        key.removeprefix(prefix).removeprefix("scaling."): decimal(value)
        for key, value in meta.items()
        if key.startswith(prefix)
    }
    dim, kind = (
        rope.get("dimension_count", config["head_dim"]),
        rope.get("type", "none"),
    )
    known = ARCHITECTURES[meta["general.architecture"]]
    if known.partial:
        config["partial_rotary_factor"] = dim / config["head_dim"]
    elif dim != config["head_dim"]:
        return [f"{prefix}dimension_count is {dim}, a part of a head; not supported"]
    original = rope.get(
        "original_context_length", config.get("max_position_embeddings")
    )
    values = {
        name: [decimal(float(x)) for x in np.ravel(array)]
        for name, array in factors.items()
    }
    for name, array in values.items():
        if len(array) != dim // 2:
            return [f"{name} has {len(array)} factors, expected {dim // 2}"]
        if not all(0 < x <= 1e6 for x in array):
            return [f"{name} has a factor that no frequency is divided by"]
    if FREQS in values:
        config["rope_scaling"] = _llama3(values[FREQS], config["rope_theta"])
    elif LONG in values and SHORT in values:
        config["original_max_position_embeddings"] = original
        config["rope_scaling"] = {
            "rope_type": "longrope",
            "short_factor": values[SHORT],
            "long_factor": values[LONG],
            "attention_factor": rope.get("attn_factor"),
        }
    elif kind in ("linear", "yarn") and rope.get("factor", 0) not in (0, 1):
        # What llama.cpp multiplies yarn's attention by has changed between its versions.
        # Yarn's own, which is what a file without it is read as.
        own = 0.1 * math.log(max(rope["factor"], 1)) + 1
        if abs(rope.get("yarn_attn_factor", 0) - own) < 1e-4:
            rope.pop("yarn_attn_factor")
        for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
            if rope.get(key, 1.0) != 1.0:
                return [f"{prefix}scaling.{key} is {rope[key]}; not supported"]
        config["rope_scaling"] = {"rope_type": kind, "factor": rope["factor"]}
        if known.latent:
            dims = decimal(10 * rope.get("yarn_log_multiplier", 0.0))
            if not dims:
                return [f"{prefix}scaling.yarn_log_multiplier is missing"]
            config["rope_scaling"] |= {"mscale": dims, "mscale_all_dim": dims}
        if kind == "yarn":
            config["rope_scaling"] |= {
                "original_max_position_embeddings": original,
                "beta_fast": rope.get("yarn_beta_fast", 32.0),
                "beta_slow": rope.get("yarn_beta_slow", 1.0),
            }
    elif kind not in ("none", "linear", "yarn", "longrope"):
        return [f"{prefix}scaling.type is {kind!r}; known: linear, yarn, longrope"]
    return []


def _llama3(values: list[float], theta: float) -> dict[str, Any]:
    """Returns the rope_scaling whose frequencies are divided by these factors.

    A frequency of wavelength w is divided by 1 where w < length / high, by `factor` where
    w > length / low, and between by 1 / (s + (1 - s) / factor) with s = (length / w - low)
    / (high - low): a line in 1 / w, so two of them give high and length. low is 1, as in
    every Llama; only its ratio to the others matters. Factors that are made in no such
    way are kept as they are, in the form of LongRoPE.
    """
    factors, largest = np.array(values), max(values)
    dim, plain = 2 * len(factors), inverse_frequencies(2 * len(factors), theta, None)
    middle = (factors > 1.0001) & (factors < largest * 0.9999)
    if middle.sum() >= 2:
        blend = (1 / factors[middle] - 1 / largest) / (1 - 1 / largest)
        turns = np.asarray(plain, np.float64)[middle] / (2 * math.pi)
        slope, start = np.polyfit(turns, blend, 1)
        if not (math.isfinite(slope) and math.isfinite(start)) or 0 in (start, slope):
            return _as_they_are(values)
        scaling = RopeScaling(
            kind="llama3",
            factor=largest,
            high_freq_factor=round(1 - 1 / float(start), 3),
            original_max_position=round(-slope / start),
        )
        made = plain / inverse_frequencies(dim, theta, scaling)
        if np.allclose(np.asarray(made), factors, rtol=1e-5):
            return {
                "rope_type": "llama3",
                "factor": largest,
                "low_freq_factor": 1.0,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position,
            }
    return _as_they_are(values)


def _as_they_are(values: list[float]) -> dict[str, Any]:
    kept = {"short_factor": values, "long_factor": values, "attention_factor": 1.0}
    return {"rope_type": "longrope", "factor": 1.0} | kept
