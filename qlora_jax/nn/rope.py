"""Rotary position embedding, half-split as in Hugging Face, with llama3 scaling.

Source: Su et al., arXiv 2104.09864; transformers modeling_rope_utils.py for the scaled
frequencies.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How frequencies change beyond the pretraining length ('linear' or 'llama3')."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


def inverse_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None
) -> np.ndarray:
    """Returns the float32 (head_dim/2,) rotation speeds, radians a position."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    frequencies = (1.0 / theta**exponents).astype(np.float32)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / np.float32(scaling.factor)
    wavelengths = 2 * math.pi / frequencies
    low = scaling.original_max_position / scaling.low_freq_factor
    high = scaling.original_max_position / scaling.high_freq_factor
    blend = (scaling.original_max_position / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    scaled = np.where(wavelengths > low, frequencies / scaling.factor, frequencies)
    middle = (wavelengths <= low) & (wavelengths >= high)
    return np.where(middle, blended, scaled).astype(np.float32)


def rotation(
    positions: Int[Array, "batch seq"], frequencies: np.ndarray
) -> tuple[Float[Array, "batch seq 1 half"], Float[Array, "batch seq 1 half"]]:
    """Returns float32 cosines and sines of every position."""
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "batch seq heads head_dim"],
    cos_sin: tuple[Float[Array, "batch seq 1 half"], Float[Array, "batch seq 1 half"]],
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotates the first half of each head against the second, in float32."""
    cos, sin = cos_sin
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
