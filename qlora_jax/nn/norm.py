"""RMSNorm with a frozen weight or none, and a frozen scale of a layer."""

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
        weight = self.offset + self.weight[...].astype(jnp.float32)
        return (_normed(x, self.eps) * weight).astype(x.dtype)


class Scale(Weighted):
    """x * weight, of one number.

    Attributes:
      weight: FrozenParam, (..., 1).
    """

    NDIM = 1
    AXES: ClassVar = {"weight": ("one",)}

    def __init__(self, weight: Array):
        self.weight = FrozenParam(weight)

    @property
    def can_train(self) -> bool:
        """Scales never train: to transformers they are buffers."""
        return False

    def holding(self, weight: Any, bias: Any = None) -> "Scale":
        """Returns the scale of another weight."""
        return Scale(weight)

    def __call__(
        self, x: Float[Array, "*batch features"]
    ) -> Float[Array, "*batch features"]:
        """Scales in x's dtype."""
        return x * self.weight[...].astype(x.dtype)


def rms_normed(
    x: Float[Array, "*batch features"], eps: float
) -> Float[Array, "*batch features"]:
    """Returns x / rms(x) over the last axis, in x's dtype: RMSNorm without a weight."""
    return _normed(x, eps).astype(x.dtype)


def _normed(x: Array, eps: float) -> Array:
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return wide * jax.lax.rsqrt(mean_square + eps)
