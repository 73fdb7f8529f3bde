"""RMSNorm with a frozen weight."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qlora_jax.nn.variables import FrozenParam


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis; statistics in float32.

    Attributes:
      weight: FrozenParam, (..., features).
      eps: Added to the mean square.
    """

    def __init__(self, weight: Array, eps: float):
        self.weight = FrozenParam(weight)
        self.eps = eps

    def __call__(
        self, x: Float[Array, "*batch features"]
    ) -> Float[Array, "*batch features"]:
        """Normalizes in float32 and returns x's dtype."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.eps)
        return (normed * self.weight[...].astype(jnp.float32)).astype(x.dtype)
