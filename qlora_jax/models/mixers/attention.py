"""Grouped-query attention with rotary positions."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from qlora_jax.models.cache import Context
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.spec import AttentionSpec
from qlora_jax.nn.attention import attention, causal_attention
from qlora_jax.nn.linear import Linear
from qlora_jax.nn.lora import project
from qlora_jax.nn.norm import Norm
from qlora_jax.nn.rope import Rope, rotate, rotation
from qlora_jax.nn.vector import Vector

KeysValues = tuple[Array, Array]
"""Keys, rotated, and values: (batch, capacity, kv_heads, head_dim) each."""


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions.

    Attributes:
      spec: What of it differs between layers.
      config: What all layers share.
      q_proj, k_proj, v_proj, o_proj: Its linears; or qkv_proj in place of the first three.
      q_norm, k_norm: Norms, where the config has qk_norm.
      sinks: Vector of a score for each head, where the config has sinks; else None.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        config: DecoderConfig,
        linear: Callable[..., Linear],
        norm: Callable[..., Norm],
        normal: Callable[..., Array],
    ):
        c = self.config = config
        self.spec = spec
        q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        hidden, bias = c.hidden_size, c.attention_bias
        if c.fused_qkv:
            self.qkv_proj = linear(q_size + 2 * kv_size, hidden, bias)
        else:
            self.q_proj = linear(q_size * (1 + c.attention_gate), hidden, bias)
            self.k_proj = linear(kv_size, hidden, bias)
            self.v_proj = linear(kv_size, hidden, bias)
        self.o_proj = linear(hidden, q_size, c.output_bias)
        if c.qk_norm != "none":
            per_head = c.qk_norm != "all"
            self.q_norm = norm(c.head_dim if per_head else q_size)
            self.k_norm = norm(c.head_dim if per_head else kv_size)
        self.sinks = nnx.data(Vector(normal(c.num_heads)) if c.sinks else None)

    @property
    def rope(self) -> Rope | None:
        """How heads are rotated; None if they are not."""
        rope = self.spec.rope
        if rope == "none":
            return None
        return self.config.rope if rope == "global" else rope

    def shared(self, positions: Int[Array, "batch seq"]) -> dict[Any, Any]:
        """Returns the rotations of its kind of rotary positions, and how queries grow."""
        made: dict[Any, Any] = {}
        if self.rope is not None:
            made[self.rope] = rotation(positions, self.rope)
        if (growth := self.config.query_growth) is not None:
            beta, length = growth
            times = jnp.maximum(positions, 0) // length  # padding is at -1
            made[growth] = 1 + beta * jnp.log1p(times.astype(jnp.float32))
        return made

    def empty_cache(self, batch: int, capacity: int, dtype: jnp.dtype) -> KeysValues:
        """Returns room for the keys and values of `capacity` tokens a row."""
        c = self.config
        shape = (batch, capacity, c.num_kv_heads, c.head_dim)
        # Two buffers, not one twice: a caller may donate the cache.
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    @property
    def kept(self) -> dict[str, int]:
        """Features a token that backward keeps, by their checkpoint names."""
        c = self.config
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        kept = {"q": q, "k": kv, "v": kv, "mixed": q} | (
            {"z": q} if c.attention_gate else {}
        )
        return kept if c.qk_norm == "none" else kept | {"unnormed": q + kv}

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        context: Context,
        cache: KeysValues | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "batch seq hidden"], KeysValues | None]:
        """Attends; with a cache, over its keys and the new ones, which are returned."""
        c, spec = self.config, self.spec
        q, k, v, gate = self._heads(x, key)
        if (rope := self.rope) is not None:
            cos_sin = context.shared[rope]
            q, k = (rotate(y, cos_sin, rope.interleaved) for y in (q, k))
        if c.qk_norm == "rotated":
            q, k = self._normed(q, k)
        if c.query_growth is not None:
            grown = q * context.shared[c.query_growth][..., None, None]
            q = grown.astype(q.dtype)
        q, k, v = (checkpoint_name(*y) for y in ((q, "q"), (k, "k"), (v, "v")))
        options = {
            "window": spec.window,
            "scale": c.attention_scale,
            "softcap": c.attention_softcap,
            "sinks": None if self.sinks is None else self.sinks.weight[...],
        }
        new = None
        if cache is None:
            mixed = causal_attention(q, k, v, **options)
        else:
            seen, length = context.seen_positions, context.length
            assert seen is not None and length is not None
            put = functools.partial(
                jax.lax.dynamic_update_slice_in_dim, start_index=length, axis=1
            )
            old_k, old_v = cache
            k, v = put(old_k, k.astype(old_k.dtype)), put(old_v, v.astype(old_v.dtype))
            new = k, v
            mixed = attention(q, k, v, context.positions, seen, **options)
        mixed = checkpoint_name(mixed.reshape(*x.shape[:2], -1), "mixed")
        if gate is not None:
            mixed = mixed * jax.nn.sigmoid(gate)
        return project(self.o_proj, mixed, key, 3), new

    def _heads(
        self, x: Array, key: Array | None
    ) -> tuple[Array, Array, Array, Array | None]:
        """Returns q, k and v, (batch, seq, heads, head_dim), before they are rotated; and
        the gate of what is mixed, (batch, seq, heads * head_dim), where there is one."""
        c, gate = self.config, None
        q, k, v = self._projected(x, key)
        heads = lambda y, n: y.reshape(*x.shape[:2], n, -1)  # noqa: E731
        if c.attention_gate:  # behind each head's query
            q, gate = jnp.split(heads(q, c.num_heads), 2, axis=-1)
            q, gate = (y.reshape(*x.shape[:2], -1) for y in (q, gate))
            gate = checkpoint_name(gate, "z")
        if c.qk_norm == "all":
            q, k = self._normed(q, k)
        q, k = heads(q, c.num_heads), heads(k, c.num_kv_heads)
        if c.qk_norm == "head":
            q, k = self._normed(q, k)
        return q, k, heads(v, c.num_kv_heads), gate

    def _normed(self, q: Array, k: Array) -> tuple[Array, Array]:
        q, k = (checkpoint_name(y, "unnormed") for y in (q, k))
        return self.q_norm(q), self.k_norm(k)

    def _projected(self, x: Array, key: Array | None) -> list[Array]:
        c = self.config
        if not c.fused_qkv:
            projections = (self.q_proj, self.k_proj, self.v_proj)
            return [project(one, x, key, i) for i, one in enumerate(projections)]
        q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        qkv = project(self.qkv_proj, x, key, 0)
        return jnp.split(qkv, (q_size, q_size + kv_size), axis=-1)
