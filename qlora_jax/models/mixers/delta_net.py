"""The gated delta net: a short convolution, the gated delta rule, and a gated norm."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from qlora_jax.models.cache import Context
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.spec import DeltaSpec
from qlora_jax.nn.delta import Convolution, Decay, gated_delta_rule
from qlora_jax.nn.linear import Linear
from qlora_jax.nn.lora import project
from qlora_jax.nn.norm import Norm

Remembered = tuple[Array, Array]
"""The last inputs of the convolution, (batch, taps - 1, features), and the state of the rule,
(batch, value heads, key features, value features), float32."""


class DeltaNet(nnx.Module):
    """The gated delta net (arXiv 2412.06464) as Qwen3.5 has it.

    Attributes:
      spec: Its sizes.
      in_proj_qkv: The linear for queries, keys and values together.
      in_proj_z, in_proj_b, in_proj_a: Those for the output's gate, the rates and the decays.
      in_proj_qkvz, in_proj_ba: What is in the place of these four where the spec is fused.
      conv: Convolution of queries, keys and values.
      decay: Decay, of the states.
      norm: RMSNorm of each head's output, before the gate.
      out_proj: The output's linear.
    """

    def __init__(
        self,
        spec: DeltaSpec,
        config: DecoderConfig,
        linear: Callable[..., Linear],
        norm: Callable[..., Norm],
        normal: Callable[..., Array],
    ):
        self.spec = spec
        hidden = config.hidden_size
        if spec.fused:
            size = spec.qkv_size + spec.value_size
            self.in_proj_qkvz = linear(size, hidden, False)
            self.in_proj_ba = linear(2 * spec.value_heads, hidden, False)
        else:
            self.in_proj_qkv = linear(spec.qkv_size, hidden, False)
            self.in_proj_z = linear(spec.value_size, hidden, False)
            self.in_proj_b = linear(spec.value_heads, hidden, False)
            self.in_proj_a = linear(spec.value_heads, hidden, False)
        self.conv = Convolution(normal(spec.qkv_size, 1, spec.taps))
        self.decay = Decay(normal(spec.value_heads), normal(spec.value_heads))
        self.norm = norm(spec.value_dim, offset=0.0)
        self.out_proj = linear(hidden, spec.value_size, False)

    def shared(self, positions: Int[Array, "batch seq"]) -> dict:
        """Returns nothing: positions count in the convolution and the rule themselves."""
        del positions
        return {}

    def empty_cache(self, batch: int, capacity: int, dtype: jnp.dtype) -> Remembered:
        """Returns what is remembered of no token; its size is that of any number."""
        del capacity
        s = self.spec
        inputs = jnp.zeros((batch, s.taps - 1, s.qkv_size), dtype)
        shape = (batch, s.value_heads, s.key_dim, s.value_dim)
        return inputs, jnp.zeros(shape, jnp.float32)

    @property
    def kept(self) -> dict[str, int]:
        """Features a token that backward keeps, by their checkpoint names."""
        s = self.spec
        return {
            **({"qkv": s.qkv_size + s.value_size} if s.fused else {}),
            **({} if s.fused else {"qkv": s.qkv_size, "z": s.value_size}),
            "rates": 2 * s.value_heads,
            "mixed": s.value_size,
        }

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        context: Context,
        cache: Remembered | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "batch seq hidden"], Remembered | None]:
        """Mixes; with a cache, from its state on, and returns the one after."""
        s, places = self.spec, context.places
        qkv, z, b, a = self._projected(x, key)
        inputs, state = (None, None) if cache is None else cache
        qkv, inputs = self.conv(qkv, places, inputs)
        qkv = jax.nn.silu(qkv).astype(x.dtype)
        q, k, v = jnp.split(qkv, [s.key_size, 2 * s.key_size], axis=-1)
        heads = lambda y, n: y.reshape(*x.shape[:2], n, -1)  # noqa: E731
        rate = jax.nn.sigmoid(b.astype(jnp.float32))
        mixed, state = gated_delta_rule(
            heads(q, s.key_heads),
            heads(k, s.key_heads),
            heads(v, s.value_heads),
            self.decay(a),
            rate,
            places,
            state,
        )
        mixed = checkpoint_name(mixed, "mixed")
        gate = jax.nn.silu(heads(z, s.value_heads).astype(jnp.float32))
        mixed = (self.norm(mixed) * gate).astype(x.dtype)
        y = project(self.out_proj, mixed.reshape(*x.shape[:2], -1), key, 7)
        return y, None if cache is None else (inputs, state)

    def _projected(self, x: Array, key: Array | None) -> tuple[Array, ...]:
        """Returns what the convolution goes over, and the inputs of gate, rate and decay."""
        s = self.spec
        if not s.fused:
            linears = self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a
            names = "qkv", "z", "rates", "rates"
            made = [project(one, x, key, i) for i, one in enumerate(linears)]
            return tuple(map(checkpoint_name, made, names))
        both = checkpoint_name(project(self.in_proj_qkvz, x, key, 0), "qkv")
        rates = checkpoint_name(project(self.in_proj_ba, x, key, 2), "rates")
        # All of a key head together: its query, key, values and gates; its rates and decays.
        by_head = lambda y: y.reshape(*x.shape[:2], s.key_heads, -1)  # noqa: E731
        values = s.value_size // s.key_heads
        ends = [s.key_dim, 2 * s.key_dim, 2 * s.key_dim + values]
        q, k, v, z = jnp.split(by_head(both), ends, axis=-1)
        b, a = jnp.split(by_head(rates), 2, axis=-1)
        q, k, v, z, b, a = (y.reshape(*x.shape[:2], -1) for y in (q, k, v, z, b, a))
        return jnp.concatenate([q, k, v], axis=-1), z, b, a
