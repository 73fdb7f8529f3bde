"""Mamba 2: a short convolution, a state space, and a gated norm."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from qlora_jax.models.cache import Context
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.spec import MambaSpec
from qlora_jax.nn.delta import Convolution, Decay
from qlora_jax.nn.linear import Linear
from qlora_jax.nn.lora import project
from qlora_jax.nn.norm import Norm
from qlora_jax.nn.state_space import state_space
from qlora_jax.nn.vector import Vector

Remembered = tuple[Array, Array]
"""The last inputs of the convolution, (batch, taps - 1, features), and the state, float32,
(batch, heads, state features, head features)."""


class Mamba(nnx.Module):
    """Mamba 2 (arXiv 2405.21060) as Bamba and Granite 4 have it.

    Attributes:
      spec: Its sizes.
      in_proj: The linear for the gate, what is convolved (values, keys, queries), and steps.
      conv: The convolution.
      decay: Decay, of the states; its steps are the factors of values too.
      skip: Vector of the share of its own value that a head's output has (D).
      norm: RMSNorm of what is gated, each group by itself.
      out_proj: The output's linear.
    """

    def __init__(
        self,
        spec: MambaSpec,
        config: DecoderConfig,
        linear: Callable[..., Linear],
        norm: Callable[..., Norm],
        normal: Callable[..., Array],
    ):
        s = self.spec = spec
        hidden, inner = config.hidden_size, s.inner_size
        self.in_proj = linear(inner + s.conv_size + s.heads, hidden, s.bias)
        bias = normal(s.conv_size) if s.conv_bias else None
        self.conv = Convolution(normal(s.conv_size, 1, s.taps), bias)
        self.decay = Decay(normal(s.heads), normal(s.heads))
        self.skip = Vector(normal(s.heads))
        self.norm = norm(inner, groups=s.groups)
        self.out_proj = linear(hidden, inner, s.bias)

    def shared(self, positions: Int[Array, "batch seq"]) -> dict:
        """Returns nothing: positions count in the convolution and the states themselves."""
        del positions
        return {}

    def empty_cache(self, batch: int, capacity: int, dtype: jnp.dtype) -> Remembered:
        """Returns what is remembered of no token; its size is that of any number."""
        del capacity
        s = self.spec
        inputs = jnp.zeros((batch, s.taps - 1, s.conv_size), dtype)
        return inputs, jnp.zeros((batch, s.heads, s.state_dim, s.head_dim), jnp.float32)

    @property
    def kept(self) -> dict[str, int]:
        """Features a token that backward keeps, by their checkpoint names."""
        s = self.spec
        return {"qkv": s.inner_size + s.conv_size + s.heads, "mixed": s.inner_size}

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        context: Context,
        cache: Remembered | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "batch seq hidden"], Remembered | None]:
        """Mixes; with a cache, from its state on, and returns the one after."""
        s, places = self.spec, context.places
        made = checkpoint_name(project(self.in_proj, x, key, 0), "qkv")
        ends = [s.inner_size, s.inner_size + s.conv_size]
        gate, convolved, steps = jnp.split(made, ends, axis=-1)
        inputs, state = (None, None) if cache is None else cache
        convolved, inputs = self.conv(convolved, places, inputs)
        convolved = jax.nn.silu(convolved).astype(x.dtype)
        ends = [s.inner_size, s.inner_size + s.groups * s.state_dim]
        v, k, q = jnp.split(convolved, ends, axis=-1)
        heads = lambda y, n: y.reshape(*x.shape[:2], n, -1)  # noqa: E731
        v, k, q = heads(v, s.heads), heads(k, s.groups), heads(q, s.groups)
        step, decay = self.decay.step(steps), self.decay(steps)
        mixed, state = state_space(q, k, v, decay, step, places, state)
        skip = self.skip.weight[...].astype(jnp.float32)[:, None]
        mixed = checkpoint_name((mixed + skip * v).astype(x.dtype), "mixed")
        mixed = mixed.reshape(*x.shape[:2], -1).astype(jnp.float32)
        mixed = self.norm(mixed * jax.nn.silu(gate.astype(jnp.float32)))
        y = project(self.out_proj, mixed.astype(x.dtype), key, 3)
        return y, None if cache is None else (inputs, state)
