"""RMSNorm with a frozen weight."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.nn.frozen import Weighted
from qlora_jax.nn.variables import FrozenParam


class RMSNorm(Weighted):
    """x / rms(x) * (offset + weight) over the last axis; statistics in float32.

    Attributes:
      weight: FrozenParam, (..., features).
      eps: Added to the mean square.
      offset: 1 where weights are stored as their difference from 1 (Gemma).
    """

    NDIM = 1
    AXES: ClassVar = {"weight": ("hidden",)}

    def __init__(self, weight: Array, eps: float, offset: float = 0.0):
        self.weight = FrozenParam(weight)
        self.eps = eps
        self.offset = offset

    def holding(self, weight: Any, bias: Any = None) -> "RMSNorm":
        """Returns the norm of another weight."""
        return RMSNorm(weight, self.eps, self.offset)

    def __call__(
        self, x: Float[Array, "*batch features"]
    ) -> Float[Array, "*batch features"]:
        """Normalizes in float32 and returns x's dtype."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.eps)
        weight = self.offset + self.weight[...].astype(jnp.float32)
        return (normed * weight).astype(x.dtype)
