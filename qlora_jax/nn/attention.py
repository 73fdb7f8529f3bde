"""Causal attention that holds scores for a block of queries only.

Scores of [batch, heads, seq, seq] never exist: queries go block by block, each block
against all keys, and backward recomputes a block's scores from q, k and v, which are
all it keeps.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

SCORE_BYTES = 64 << 20
"""Float32 scores alive at once; what sets the query block."""


def attention(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    q_positions: Int[Array, "batch seq"],
    k_positions: Int[Array, "batch keys"],
    *,
    window: int | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Softmax attention with grouped keys; a query sees keys at or before its position.

    Args:
      q: Queries, rotated.
      k: Keys, rotated; heads is a multiple of kv_heads.
      v: Values.
      q_positions: Position of each query.
      k_positions: Position of each key; a negative one is never seen (padding, unused
        cache).
      window: Only the last `window` positions are seen; None for all.

    Returns:
      The heads' outputs in q's dtype; softmax and sums are float32.
    """
    batch, seq, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(batch, seq, kv_heads, heads // kv_heads, head_dim)

    @jax.checkpoint
    def block(q: Array, q_positions: Array, k: Array, v: Array) -> Array:
        scores = _batched_dot("bqhgd,bkhd->bhgqk", q, k) * (head_dim**-0.5)
        seen = _seen(q_positions, k_positions, window)[:, None, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
        mixed = _batched_dot("bhgqk,bkhd->bqhgd", weights.astype(q.dtype), v)
        return mixed.astype(q.dtype)

    limit = max(16, SCORE_BYTES // (4 * batch * heads * k.shape[1]))
    if seq <= limit:
        return block(q, q_positions, k, v).reshape(batch, seq, heads, head_dim)
    blocks = -(-seq // limit)
    size = -(-seq // blocks)
    pad = blocks * size - seq

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(batch, blocks, size, *x.shape[2:]).swapaxes(0, 1)

    y = lax.map(lambda args: block(*args, k, v), (split(q), split(q_positions)))
    y = y.swapaxes(0, 1).reshape(batch, blocks * size, heads, head_dim)
    return y[:, :seq]


def _seen(q_positions: Array, k_positions: Array, window: int | None) -> Array:
    q, k = q_positions[:, :, None], k_positions[:, None, :]
    seen = (k <= q) & (k >= 0)
    return seen if window is None else seen & (q - k < window)


def _batched_dot(spec: str, a: Array, b: Array) -> Float[Array, "..."]:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
