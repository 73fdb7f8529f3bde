"""The head makes logits of hidden states."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qlora_jax.models.layers import scaled


class Head(nnx.Module):
    """A linear whose logits are scaled (Granite) or capped (Gemma 2)."""

    def __init__(self, linear: Any, scale: float, softcap: float | None):
        self.linear = linear
        self.scale = scale
        self.softcap = softcap

    @property
    def out_features(self) -> int:
        """Size of the vocabulary."""
        return self.linear.out_features

    def __call__(
        self, x: Float[Array, "*batch hidden"]
    ) -> Float[Array, "*batch vocab"]:
        """Returns logits in x's dtype."""
        logits = scaled(self.linear(x), self.scale)
        if self.softcap is not None:
            logits = jnp.tanh(logits / self.softcap) * self.softcap
        return logits
