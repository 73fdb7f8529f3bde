"""Latent attention: keys and values of all heads are made of one small vector a token."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from qlora_jax.models.cache import Context
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.spec import LatentSpec
from qlora_jax.nn.attention import attention, causal_attention
from qlora_jax.nn.linear import Linear
from qlora_jax.nn.lora import project
from qlora_jax.nn.norm import Norm
from qlora_jax.nn.rope import rotate, rotation

Latents = tuple[Array, Array]
"""What keys and values are made of, normed, (batch, capacity, latent_rank), and what of keys
is rotated, (batch, capacity, rotary features)."""

_EPS = 1e-6
"""Both norms add it to the mean square, whatever the other norms of the model add, as in
transformers and in DeepSeek's own code."""


class LatentAttention(nnx.Module):
    """Latent attention (DeepSeek V2, arXiv 2405.04434).

    A cache holds latents, and keys and values are made of all of them at each step, so that
    what kv_b_proj is, and an adapter of it, is the same in training and in decoding.

    Attributes:
      spec: Its sizes.
      config: What all layers share; head_dim is that of queries and keys.
      q_proj: The queries' linear; or q_a_proj, q_a_norm and q_b_proj, which make them of a
        smaller vector.
      kv_a_proj_with_mqa: The linear for latents and the part of keys that is rotated.
      kv_a_norm: Norm of latents.
      kv_b_proj: The linear that makes keys and values of them.
      o_proj: The output's linear.
    """

    def __init__(
        self,
        spec: LatentSpec,
        config: DecoderConfig,
        linear: Callable[..., Linear],
        norm: Callable[..., Norm],
        normal: Callable[..., Array],
    ):
        del normal
        c = self.config = config
        self.spec = spec
        hidden, bias, rank = c.hidden_size, c.attention_bias, spec.latent_rank
        q_size = c.num_heads * c.head_dim
        if spec.query_rank is None:
            self.q_proj = linear(q_size, hidden, False)
        else:
            self.q_a_proj = linear(spec.query_rank, hidden, bias)
            self.q_a_norm = norm(spec.query_rank, eps=_EPS)
            self.q_b_proj = linear(q_size, spec.query_rank, False)
        self.kv_a_proj_with_mqa = linear(rank + c.rope.dim, hidden, bias)
        self.kv_a_norm = norm(rank, eps=_EPS)
        both = c.head_dim - c.rope.dim + spec.value_dim
        self.kv_b_proj = linear(c.num_heads * both, rank, False)
        self.o_proj = linear(hidden, c.num_heads * spec.value_dim, c.output_bias)

    def shared(self, positions: Int[Array, "batch seq"]) -> dict[Any, Any]:
        """Returns the rotations."""
        return {self.config.rope: rotation(positions, self.config.rope)}

    def empty_cache(self, batch: int, capacity: int, dtype: jnp.dtype) -> Latents:
        """Returns room for the latents of `capacity` tokens a row."""
        sizes = self.spec.latent_rank, self.config.rope.dim
        latents, rotated = (jnp.zeros((batch, capacity, n), dtype) for n in sizes)
        return latents, rotated

    @property
    def kept(self) -> dict[str, int]:
        """Features a token that backward keeps, by their checkpoint names."""
        c, s = self.config, self.spec
        q, v = c.num_heads * c.head_dim, c.num_heads * s.value_dim
        unnormed = (s.query_rank or 0) + s.latent_rank
        return {"q": q, "k": q, "v": v, "mixed": v, "unnormed": unnormed}

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        context: Context,
        cache: Latents | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "batch seq hidden"], Latents | None]:
        """Attends; with a cache, over its latents and the new ones, which are returned."""
        c = self.config
        q = self._queries(x, context, key)
        latents, rotated = self._latents(x, context, key)
        new = None
        if cache is None:
            k, v = self._expanded(latents, rotated, key)
            documents, scale = context.documents, c.attention_scale
            mixed = causal_attention(q, k, v, documents=documents, scale=scale)
        else:
            seen, length = context.seen_positions, context.length
            assert seen is not None and length is not None
            put = functools.partial(
                lax.dynamic_update_slice_in_dim, start_index=length, axis=1
            )
            latents = put(cache[0], latents.astype(cache[0].dtype))
            rotated = put(cache[1], rotated.astype(cache[1].dtype))
            new = latents, rotated
            k, v = self._expanded(latents, rotated, key)
            mixed = attention(q, k, v, context.positions, seen, scale=c.attention_scale)
        mixed = checkpoint_name(mixed.reshape(*x.shape[:2], -1), "mixed")
        return project(self.o_proj, mixed, key, 3), new

    def _queries(self, x: Array, context: Context, key: Array | None) -> Array:
        """Returns queries, rotated, (batch, seq, heads, head_dim)."""
        c = self.config
        if self.spec.query_rank is None:
            q = project(self.q_proj, x, key, 0)
        else:
            low = checkpoint_name(project(self.q_a_proj, x, key, 0), "unnormed")
            q = project(self.q_b_proj, self.q_a_norm(low), key, 1)
        q = q.reshape(*x.shape[:2], c.num_heads, c.head_dim)
        plain, turned = jnp.split(q, [c.head_dim - c.rope.dim], axis=-1)
        turned = rotate(turned, context.shared[c.rope], c.rope.interleaved)
        return checkpoint_name(jnp.concatenate([plain, turned], axis=-1), "q")

    def _latents(self, x: Array, context: Context, key: Array | None) -> Latents:
        """Returns what a cache holds of some tokens."""
        c = self.config
        both = project(self.kv_a_proj_with_mqa, x, key, 2)
        low, turned = jnp.split(both, [self.spec.latent_rank], axis=-1)
        low = checkpoint_name(low, "unnormed")
        one_head = turned[:, :, None]
        turned = rotate(one_head, context.shared[c.rope], c.rope.interleaved)
        return self.kv_a_norm(low), turned[:, :, 0]

    def _expanded(self, latents: Array, rotated: Array, key: Array | None) -> Latents:
        """Returns keys and values, (batch, tokens, heads, features of each)."""
        c = self.config
        both = project(self.kv_b_proj, latents, key, 7)
        both = both.reshape(*latents.shape[:2], c.num_heads, -1)
        plain, v = jnp.split(both, [c.head_dim - c.rope.dim], axis=-1)
        every = (*plain.shape[:3], c.rope.dim)
        turned = jnp.broadcast_to(rotated[:, :, None], every)
        k = jnp.concatenate([plain, turned], axis=-1)
        return checkpoint_name(k, "k"), checkpoint_name(v, "v")
