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
from qlora_jax.nn.norm import BareNorm, Norm
from qlora_jax.nn.rope import Rope, rotate, rotation
from qlora_jax.nn.vector import Vector

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
      q_norm, k_norm: Norms, where the config has qk_norm.
      v_norm: BareNorm, where the config has value_norm.
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
        self.head_dim = spec.head_dim or c.head_dim
        self.kv_heads = spec.kv_heads or c.num_kv_heads
        q_size, kv_size = self._sizes
        hidden, bias = c.hidden_size, c.attention_bias
        if c.fused_qkv:
            self.qkv_proj = linear(q_size + 2 * kv_size, hidden, bias)
        else:
            self.q_proj = linear(q_size * (1 + c.attention_gate), hidden, bias)
            if spec.takes is None:
                self.k_proj = linear(kv_size, hidden, bias)
            if spec.takes is None and not spec.keys_as_values:
                self.v_proj = linear(kv_size, hidden, bias)
        self.o_proj = linear(hidden, q_size, c.output_bias)
        if c.qk_norm != "none":
            per_head = c.qk_norm != "all"
            self.q_norm = norm(self.head_dim if per_head else q_size)
            if spec.takes is None:
                self.k_norm = norm(self.head_dim if per_head else kv_size)
        self.v_norm = BareNorm(c.rms_norm_eps) if c.value_norm else None
        self.sinks = nnx.data(Vector(normal(c.num_heads)) if c.sinks else None)

    @property
    def _sizes(self) -> tuple[int, int]:
        """Features of all queries of a token, and of all its keys or values."""
        heads, kv_heads = self.config.num_heads, self.kv_heads
        return heads * self.head_dim, kv_heads * self.head_dim

    @property
    def rope(self) -> Rope | None:
        """This is the rotation that the layer gives its queries and keys: its spec's own, or
        the config's. It is None where the spec says "none"."""
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
        c, spec, (q, kv) = self.config, self.spec, self._sizes
        kept = {"q": q, "mixed": q}
        if spec.takes is None:
            kept |= {"k": kv, "v": kv}
        else:
            kv = 0
        if c.attention_gate:
            kept["z"] = q
        unnormed = (q + kv) * (c.qk_norm != "none")
        # Where keys are values, both are normed from the same.
        unnormed += kv * (c.value_norm and not spec.keys_as_values)
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
        made, gate = self._heads(x, context, key)
        q, new = made["q"], cache
        if spec.takes is not None:
            k, v = context.given[spec.takes]
        elif not cache:
            k, v = made["k"], made["v"]
            new = (k, v) if spec.gives else None
        else:
            assert context.length is not None
            put = functools.partial(
                jax.lax.dynamic_update_slice_in_dim,
                start_index=context.length,
                axis=1,
            )
            (old_k, old_v), k, v = cache, made["k"], made["v"]
            k, v = put(old_k, k.astype(old_k.dtype)), put(old_v, v.astype(old_v.dtype))
            new = k, v
        options = {
            "window": spec.window,
            "scale": c.attention_scale,
            "softcap": c.attention_softcap,
            "sinks": None if self.sinks is None else self.sinks.weight[...],
        }
        if cache is None:
            documents = context.documents
            mixed = causal_attention(q, k, v, documents=documents, **options)
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
    ) -> tuple[dict[str, Array], Array | None]:
        """Returns q, k and v, (batch, seq, heads, head_dim), normed and rotated, or q alone
        where the others are taken; and the gate of what is mixed, (batch, seq, heads *
        head_dim), where there is one."""
        c, gate = self.config, None
        made = self._projected(x, key)
        heads = lambda y, n: y.reshape(*x.shape[:2], n, -1)  # noqa: E731
        if c.attention_gate:  # behind each head's query
            both = jnp.split(heads(made["q"], c.num_heads), 2, axis=-1)
            made["q"], gate = (y.reshape(*x.shape[:2], -1) for y in both)
            gate = checkpoint_name(gate, "z")
        if c.qk_norm == "all":
            made |= self._normed(made)
        counts = {"q": c.num_heads, "k": self.kv_heads, "v": self.kv_heads}
        made = {name: heads(y, counts[name]) for name, y in made.items()}
        if self.v_norm is not None and "v" in made:
            # Keys that are values are named with them.
            named = self.spec.keys_as_values
            v = made["v"] if named else checkpoint_name(made["v"], "unnormed")
            made["v"] = self.v_norm(v)
        if c.qk_norm == "head":
            made |= self._normed(made)
        if (rope := self.rope) is not None:
            cos_sin = context.shared[rope]
            turned = {name: made[name] for name in "qk" if name in made}
            made |= {n: rotate(y, cos_sin, rope.interleaved) for n, y in turned.items()}
        if c.qk_norm == "rotated":
            made |= self._normed(made)
        if c.query_growth is not None:
            grown = made["q"] * context.shared[c.query_growth][..., None, None]
            made["q"] = grown.astype(x.dtype)
        return {name: checkpoint_name(y, name) for name, y in made.items()}, gate

    def _normed(self, made: dict[str, Array]) -> dict[str, Array]:
        """Returns queries, and keys where there are any, normed."""
        normed = {}
        for name, norm in (("q", "q_norm"), ("k", "k_norm")):
            if name in made:
                y = made[name]
                if name == "q" or not self.spec.keys_as_values:
                    y = checkpoint_name(y, "unnormed")
                normed[name] = getattr(self, norm)(y)
        return normed

    def _projected(self, x: Array, key: Array | None) -> dict[str, Array]:
        """Returns q, k and v, (batch, seq, features); q alone where the others are taken."""
        if self.config.fused_qkv:
            q_size, kv_size = self._sizes
            qkv = project(self.qkv_proj, x, key, 0)
            parts = jnp.split(qkv, (q_size, q_size + kv_size), axis=-1)
            return dict(zip("qkv", parts, strict=True))
        linears = (getattr(self, f"{name}_proj", None) for name in "qkv")
        made = {
            name: project(linear, x, key, i)
            for i, (name, linear) in enumerate(zip("qkv", linears, strict=True))
            if linear is not None
        }
        if self.spec.keys_as_values and "k" in made:
            made["k"] = made["v"] = checkpoint_name(made["k"], "unnormed")
        return made
