"""A short convolution between two gates, as LFM2 has it in most layers."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from qlora_jax.models.cache import Context
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.spec import ShortConvSpec
from qlora_jax.nn.delta import Convolution
from qlora_jax.nn.linear import Linear
from qlora_jax.nn.lora import project
from qlora_jax.nn.norm import Norm


class ShortConv(nnx.Module):
    """The convolution of gated inputs, gated: out(c * conv(b * x)), b, c and x by one linear.

    Attributes:
      hidden: Features of a token.
      taps: Tokens that the convolution reaches over.
      in_proj: The linear for both gates and what is convolved.
      conv: The convolution.
      out_proj: The output's linear.
    """

    def __init__(
        self,
        spec: ShortConvSpec,
        config: DecoderConfig,
        linear: Callable[..., Linear],
        norm: Callable[..., Norm],
        normal: Callable[..., Array],
    ):
        del norm
        hidden = self.hidden = config.hidden_size
        self.taps = spec.taps
        self.in_proj = linear(3 * hidden, hidden, spec.bias)
        bias = normal(hidden) if spec.bias else None
        self.conv = Convolution(normal(hidden, 1, spec.taps), bias)
        self.out_proj = linear(hidden, hidden, spec.bias)

    def shared(self, positions: Int[Array, "batch seq"]) -> dict:
        """Returns nothing: positions count in the convolution itself."""
        del positions
        return {}

    def empty_cache(self, batch: int, capacity: int, dtype: jnp.dtype) -> Array:
        """Returns the last inputs of the convolution, of no token."""
        del capacity
        return jnp.zeros((batch, self.taps - 1, self.hidden), dtype)

    @property
    def kept(self) -> dict[str, int]:
        """Features a token that backward keeps, by their checkpoint names."""
        return {"qkv": 3 * self.hidden, "mixed": self.hidden}

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        context: Context,
        cache: Array | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "batch seq hidden"], Array | None]:
        """Mixes; with a cache, from its inputs on, and returns those after."""
        made = checkpoint_name(project(self.in_proj, x, key, 0), "qkv")
        before, after, own = jnp.split(made, 3, axis=-1)
        mixed, inputs = self.conv(before * own, context.places, cache)
        mixed = checkpoint_name(mixed.astype(x.dtype), "mixed")
        y = project(self.out_proj, after * mixed, key, 3)
        return y, None if cache is None else inputs
