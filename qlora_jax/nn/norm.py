"""Norms: RMSNorm and LayerNorm with a frozen weight, and RMSNorm without one."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qlora_jax.nn.frozen import Weighted
from qlora_jax.nn.variables import FrozenParam


class RMSNorm(Weighted):
    """x / rms(x) * (offset + weight) over the last axis; statistics in float32.

    Attributes:
      weight: FrozenParam, (..., features).
      eps: Added to the mean square.
      offset: 1 where weights are stored as their difference from 1 (Gemma).
      groups: Parts of the last axis, each of which has its own rms.
    """

    NDIM = 1
    AXES: ClassVar = {"weight": ("hidden",)}

    def __init__(self, weight: Array, eps: float, offset: float = 0.0, groups: int = 1):
        self.weight = FrozenParam(weight)
        self.eps = eps
        self.offset = offset
        self.groups = groups

    def holding(self, weight: Any, bias: Any = None) -> "RMSNorm":
        """Returns the norm of another weight."""
        return type(self)(weight, self.eps, self.offset, self.groups)

    def __call__(
        self, x: Float[Array, "*batch features"]
    ) -> Float[Array, "*batch features"]:
        """Normalizes in float32 and returns x's dtype."""
        weight = self.offset + self.weight[...].astype(jnp.float32)
        parts = x.reshape(*x.shape[:-1], self.groups, -1)
        normed = _of_unit_size(parts, self.eps).reshape(x.shape)
        return (normed * weight).astype(x.dtype)


class LayerNorm(RMSNorm):
    """RMSNorm of x less its mean: LayerNorm without a bias."""

    def __call__(
        self, x: Float[Array, "*batch features"]
    ) -> Float[Array, "*batch features"]:
        """Normalizes in float32 and returns x's dtype."""
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        return super().__call__(centred).astype(x.dtype)


class BareNorm(nnx.Module):
    """x / rms(x) over the last axis: RMSNorm without a weight.

    Attributes:
      eps: Added to the mean square.
    """

    def __init__(self, eps: float):
        self.eps = eps

    def __call__(
        self, x: Float[Array, "*batch features"]
    ) -> Float[Array, "*batch features"]:
        """Normalizes in float32 and returns x's dtype."""
        return _of_unit_size(x, self.eps).astype(x.dtype)


Norm = RMSNorm | BareNorm


def _of_unit_size(x: Array, eps: float) -> Array:
    """Returns x / rms(x), float32."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return wide * jax.lax.rsqrt(mean_square + eps)
