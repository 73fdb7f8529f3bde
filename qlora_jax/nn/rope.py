"""Rotary position embedding, half-split as in Hugging Face, with its scalings.

Source: Su et al., arXiv 2104.09864; YaRN, arXiv 2309.00071; LongRoPE, arXiv 2402.13753;
transformers modeling_rope_utils.py for all the scaled frequencies.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Kind = Literal["linear", "dynamic", "llama3", "yarn", "longrope", "proportional"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Says how rotary frequencies change for texts longer than those of pretraining.

    Attributes:
      kind: 'linear' uses factor alone, 'dynamic' factor and original_max_position,
        'proportional' factor and share; 'dynamic' and 'longrope' depend on the length of
        the sequence.
      factor: The factor that the context is stretched by. Frequencies are divided by it:
        all of them for 'linear' and 'proportional', the low ones for 'llama3' and 'yarn'.
      low_freq_factor, high_freq_factor: For 'llama3': frequencies that turn fewer than
        low_freq_factor times within the pretraining length are divided by factor, those
        that turn more than high_freq_factor times stay, the others are blended.
      original_max_position: Pretraining length; for 'dynamic' the length from which on
        frequencies change.
      attention_factor: What cosines and sines are multiplied by (yarn, longrope).
      beta_fast, beta_slow, truncate: For 'yarn': frequencies that turn more than beta_fast
        times within the pretraining length stay, those that turn fewer than beta_slow times
        are divided by factor, the others are blended. truncate rounds both bounds outward
        to whole features.
      short_factor, long_factor: For 'longrope': what each frequency is divided by, in
        sequences up to the pretraining length and in longer ones.
      share: For 'proportional': this part of the frequencies stays, from the highest on;
        the others are 0, so that their features do not turn.
    """

    kind: Kind
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    share: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Says how heads are rotated by their position.

    Attributes:
      theta: The base of the frequencies.
      scaling: How they change for long texts; None for plain RoPE.
      dim: Features of a head that are rotated, the first ones.
      interleaved: Whether feature 2i is rotated with 2i + 1 (GLM-4, Cohere), and not i with
        i + dim / 2.
      backward: Whether heads turn by the negative of the angles (nanochat).
    """

    theta: float = 10000.0
    scaling: RopeScaling | None = None
    dim: int
    interleaved: bool = False
    backward: bool = False


def inverse_frequencies(
    dim: int,
    theta: float,
    scaling: RopeScaling | None,
    length: Int[Array, ""] | int | None = None,
) -> np.ndarray | Float[Array, " half"]:
    """Returns the float32 (dim/2,) rotation speeds, radians a position.

    Args:
      dim: Rotated features of a head.
      theta: The base.
      scaling: None for plain RoPE.
      length: The tokens of the longest sequence, for 'dynamic' and 'longrope'.
    """
    exponents = np.arange(0, dim, 2, dtype=np.float32) / dim
    frequencies = (1.0 / theta**exponents).astype(np.float32)
    if scaling is None:
        return frequencies
    match scaling.kind:
        case "linear":
            return frequencies / np.float32(scaling.factor)
        case "proportional":
            turning = np.arange(dim // 2) < int(scaling.share * dim // 2)
            return np.where(turning, frequencies / np.float32(scaling.factor), 0)
        case "llama3":
            return _llama3(frequencies, scaling)
        case "yarn":
            return _yarn(frequencies, dim, theta, scaling)
        case "dynamic":
            limit = scaling.original_max_position
            reach = jnp.maximum(limit if length is None else length, limit) / limit
            grown = scaling.factor * reach.astype(jnp.float32) - (scaling.factor - 1)
            base = theta * grown ** (dim / (dim - 2))
            return 1.0 / base ** jnp.asarray(exponents)
        case "longrope":
            short, long = (
                jnp.asarray(frequencies / np.asarray(factors, np.float32))
                for factors in (scaling.short_factor, scaling.long_factor)
            )
            longer = (0 if length is None else length) > scaling.original_max_position
            return jnp.where(longer, long, short)
    raise ValueError(f"unknown RoPE scaling {scaling}")


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
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


def _yarn(
    frequencies: np.ndarray, dim: int, theta: float, scaling: RopeScaling
) -> np.ndarray:
    def boundary(rotations: float) -> float:
        """The feature that turns so often within the pretraining length."""
        turns = scaling.original_max_position / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    low, high = boundary(scaling.beta_fast), boundary(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 * (low == high)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    slow = frequencies / np.float32(scaling.factor)
    return (slow * ramp + frequencies * (1 - ramp)).astype(np.float32)


def rotation(
    positions: Int[Array, "batch seq"], rope: Rope
) -> tuple[Float[Array, "batch seq 1 half"], Float[Array, "batch seq 1 half"]]:
    """Returns float32 cosines and sines of every position, (..., dim/2)."""
    length = jnp.max(positions) + 1
    frequencies = inverse_frequencies(rope.dim, rope.theta, rope.scaling, length)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    factor = 1.0 if rope.scaling is None else rope.scaling.attention_factor
    turn = -factor if rope.backward else factor
    return factor * jnp.cos(angles), turn * jnp.sin(angles)


def rotate(
    x: Float[Array, "batch seq heads head_dim"],
    cos_sin: tuple[Float[Array, "batch seq 1 half"], Float[Array, "batch seq 1 half"]],
    interleaved: bool = False,
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotates each head's first features in pairs, in float32.

    Features beyond twice the cosines' size (partial RoPE) stay as they are.

    Args:
      x: Heads.
      cos_sin: Cosine and sine of each pair.
      interleaved: Whether a pair are neighbours; else they are half the rotated features
        apart.
    """
    cos, sin = cos_sin
    half = cos.shape[-1]
    if interleaved:
        pairs, rest = jnp.split(x.astype(jnp.float32), (2 * half,), axis=-1)
        first, second = pairs[..., 0::2], pairs[..., 1::2]
        turned = [first * cos - second * sin, second * cos + first * sin]
        turned = jnp.stack(turned, axis=-1).reshape(pairs.shape)
        return jnp.concatenate([turned, rest], axis=-1).astype(x.dtype)
    first, second, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
