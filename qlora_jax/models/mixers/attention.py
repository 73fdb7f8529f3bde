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
from qlora_jax.nn.norm import RMSNorm, rms_normed
from qlora_jax.nn.rope import Rope, rotate, rotation

KeysValues = tuple[Array, Array]
"""Keys, rotated, and values: (batch, capacity, kv_heads, head_dim) each."""


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions.

    Attributes:
      spec: What of it differs between layers.
      config: What all layers share.
      head_dim: Features of a head.
      kv_heads: Heads of keys and values.
      q_proj, k_proj, v_proj, o_proj: Its linears; or qkv_proj in place of the first three.
        Where keys are values there is no v_proj, and neither k_proj where those of an
        earlier layer are taken.
      q_norm, k_norm: RMSNorm, where the config has qk_norm.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        config: DecoderConfig,
        linear: Callable[..., Linear],
        norm: Callable[..., RMSNorm],
        normal: Any = None,
    ):
        del normal
        c = self.config = config
        self.spec = spec
        self.head_dim = spec.head_dim or c.head_dim
        self.kv_heads = spec.kv_heads or c.num_kv_heads
        q_size, kv_size = self._sizes
        hidden, bias = c.hidden_size, c.attention_bias
        if c.fused:
            self.qkv_proj = linear(q_size + 2 * kv_size, hidden, bias)
        else:
            self.q_proj = linear(q_size * (1 + c.attention_gate), hidden, bias)
            if spec.takes is None:
                self.k_proj = linear(kv_size, hidden, bias)
            if spec.takes is None and not spec.keys_as_values:
                self.v_proj = linear(kv_size, hidden, bias)
        self.o_proj = linear(hidden, q_size, c.output_bias)
        if c.qk_norm != "none":
            per_head = c.qk_norm == "head"
            self.q_norm = norm(self.head_dim if per_head else q_size)
            if spec.takes is None:
                self.k_norm = norm(self.head_dim if per_head else kv_size)

    @property
    def _sizes(self) -> tuple[int, int]:
        """Features of all queries of a token, and of all its keys or values."""
        heads, kv_heads = self.config.num_heads, self.kv_heads
        return heads * self.head_dim, kv_heads * self.head_dim

    @property
    def rope(self) -> Rope | None:
        """How heads are rotated; None if they are not."""
        rope = self.spec.rope
        if rope == "none":
            return None
        return self.config.rope if rope == "global" else rope

    def shared(self, positions: Int[Array, "batch seq"]) -> dict[Any, Any]:
        """Returns the rotations of its kind of rotary positions."""
        return {} if self.rope is None else {self.rope: rotation(positions, self.rope)}

    def empty_cache(
        self, batch: int, capacity: int, dtype: jnp.dtype
    ) -> KeysValues | tuple[()]:
        """Returns room for the keys and values of `capacity` tokens a row; none where those
        of another layer are taken."""
        if self.spec.takes is not None:
            return ()
        shape = (batch, capacity, self.kv_heads, self.head_dim)
        # Two buffers, not one twice: a caller may donate the cache.
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    @property
    def kept(self) -> dict[str, int]:
        """Features a token that backward keeps, by their checkpoint names."""
        c, (q, kv) = self.config, self._sizes
        kept = {"q": q, "mixed": q}
        if self.spec.takes is None:
            kept |= {"k": kv, "v": kv}
        else:
            kv = 0
        if c.attention_gate:
            kept["z"] = q
        unnormed = (q + kv) * (c.qk_norm != "none")
        # Where keys are values, both are normed from the same.
        unnormed += kv * (c.value_norm and not self.spec.keys_as_values)
        return kept | {"unnormed": unnormed} if unnormed else kept

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        context: Context,
        cache: KeysValues | tuple[()] | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "batch seq hidden"], KeysValues | tuple[()] | None]:
        """Attends; with a cache, over its keys and the new ones, which are returned."""
        c, spec = self.config, self.spec
        q, own, gate = self._heads(x, context, key)
        new = cache
        if own is None:
            assert spec.takes is not None
            k, v = context.given[spec.takes]
        elif not cache:
            k, v = own
            new = own if spec.gives else None
        else:
            assert context.length is not None
            put = functools.partial(
                jax.lax.dynamic_update_slice_in_dim,
                start_index=context.length,
                axis=1,
            )
            (old_k, old_v), (k, v) = cache, own
            k, v = put(old_k, k.astype(old_k.dtype)), put(old_v, v.astype(old_v.dtype))
            new = k, v
        options = {
            "window": spec.window,
            "scale": c.attention_scale,
            "softcap": c.attention_softcap,
        }
        if cache is None:
            mixed = causal_attention(q, k, v, **options)
        else:
            seen = context.seen_positions
            assert seen is not None
            mixed = attention(q, k, v, context.positions, seen, **options)
        mixed = checkpoint_name(mixed.reshape(*x.shape[:2], -1), "mixed")
        if gate is not None:
            mixed = mixed * jax.nn.sigmoid(gate)
        return project(self.o_proj, mixed, key, 3), new

    def _heads(
        self, x: Array, context: Context, key: Array | None
    ) -> tuple[Array, KeysValues | None, Array | None]:
        """Returns q, and k and v, (batch, seq, heads, head_dim), normed and rotated; no k and v
        where those of another layer are taken. The last is the gate of what is mixed,
        (batch, seq, heads * head_dim), where there is one."""
        c, gate = self.config, None
        q, k, v = self._projected(x, key)
        heads = lambda y, n: y.reshape(*x.shape[:2], n, -1)  # noqa: E731
        if c.attention_gate:  # behind each head's query
            q, gate = jnp.split(heads(q, c.num_heads), 2, axis=-1)
            q, gate = (y.reshape(*x.shape[:2], -1) for y in (q, gate))
            gate = checkpoint_name(gate, "z")

        def shaped(y: Array, count: int, norm: str) -> Array:
            if c.qk_norm == "all":
                y = getattr(self, norm)(y)
            y = heads(y, count)
            if c.qk_norm == "head":
                y = getattr(self, norm)(y)
            if self.rope is None:
                return y
            return rotate(y, context.shared[self.rope], self.rope.interleaved)

        unnormed = lambda y: checkpoint_name(y, "unnormed")  # noqa: E731
        if c.qk_norm != "none":
            q, k = unnormed(q), None if k is None else unnormed(k)
        q = checkpoint_name(shaped(q, c.num_heads, "q_norm"), "q")
        if k is None:
            return q, None, gate
        if v is None:
            v = k
        elif c.value_norm:
            v = unnormed(v)
        v = heads(v, self.kv_heads)
        if c.value_norm:
            v = rms_normed(v, c.rms_norm_eps)
        k = checkpoint_name(shaped(k, self.kv_heads, "k_norm"), "k")
        return q, (k, checkpoint_name(v, "v")), gate

    def _projected(self, x: Array, key: Array | None) -> list[Any]:
        """Returns q, k and v; None for v where keys are values, and for both where those of
        another layer are taken."""
        if not self.config.fused:
            names = ("q_proj", "k_proj", "v_proj")
            linears = [getattr(self, name, None) for name in names]
            return [
                None if one is None else project(one, x, key, i)
                for i, one in enumerate(linears)
            ]
        q_size, kv_size = self._sizes
        qkv = project(self.qkv_proj, x, key, 0)
        return jnp.split(qkv, (q_size, q_size + kv_size), axis=-1)
