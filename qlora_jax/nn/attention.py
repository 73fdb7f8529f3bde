"""Causal attention that holds scores for a block of queries only.

Scores of [batch, heads, seq, seq] never exist: queries go block by block, each block
against all keys, and backward recomputes a block's scores from q, k and v, which are
all it keeps.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

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

    def block(q: Array, q_positions: Array) -> Array:
        seen = _seen(q_positions, k_positions, window)[:, None, None]
        return _attend(q, k, v, seen)

    limit = max(16, SCORE_BYTES // (4 * batch * heads * k.shape[1]))
    if seq <= limit:
        return block(q, q_positions).reshape(batch, seq, heads, head_dim)
    blocks = -(-seq // limit)
    size = -(-seq // blocks)
    pad = blocks * size - seq

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(batch, blocks, size, *x.shape[2:]).swapaxes(0, 1)

    y = lax.map(lambda args: block(*args), (split(q), split(q_positions)))
    y = y.swapaxes(0, 1).reshape(batch, blocks * size, heads, head_dim)
    return y[:, :seq]


def _seen(q_positions: Array, k_positions: Array, window: int | None) -> Array:
    q, k = q_positions[:, :, None], k_positions[:, None, :]
    seen = (k <= q) & (k >= 0)
    return seen if window is None else seen & (q - k < window)


@jax.custom_vjp
def _attend(
    q: Float[Array, "b q h g d"],
    k: Float[Array, "b k h d"],
    v: Float[Array, "b k h d"],
    seen: Bool[Array, "b 1 1 q k"],
) -> Float[Array, "b q h g d"]:
    """Attention of one query block; h key heads, each with g query heads."""
    weights = _weights(q, k, seen).astype(q.dtype)
    return _batched_dot("bhgqk,bkhd->bqhgd", weights, v).astype(q.dtype)


def _attend_fwd(q, k, v, seen):
    return _attend(q, k, v, seen), (q, k, v, seen)


def _attend_bwd(residuals, dy):
    # By hand, so that products are of the compute dtype: autodiff of the float32 sums
    # would multiply in float32.
    q, k, v, seen = residuals
    weights = _weights(q, k, seen)
    dv = _batched_dot("bhgqk,bqhgd->bkhd", weights.astype(q.dtype), dy)
    d_weights = _batched_dot("bqhgd,bkhd->bhgqk", dy, v)
    centre = jnp.sum(d_weights * weights, axis=-1, keepdims=True)
    d_scores = weights * (d_weights - centre) * (q.shape[-1] ** -0.5)
    d_scores = d_scores.astype(q.dtype)
    dq = _batched_dot("bhgqk,bkhd->bqhgd", d_scores, k)
    dk = _batched_dot("bhgqk,bqhgd->bkhd", d_scores, q)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _weights(q: Array, k: Array, seen: Array) -> Float[Array, "b h g q k"]:
    scores = _batched_dot("bqhgd,bkhd->bhgqk", q, k) * (q.shape[-1] ** -0.5)
    return jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)


def _batched_dot(spec: str, a: Array, b: Array) -> Float[Array, "..."]:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
