"""Causal attention that holds scores for a block of queries only.

Scores of [batch, heads, seq, seq] never exist: queries go block by block, each block
against all keys, and backward recomputes a block's scores from q, k and v, which are
all it keeps.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

SCORE_BYTES = 16 << 20
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
    keys, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    # Batch axes first and one matrix each behind them: (batch, kv_heads, rows, head_dim).
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

    def block(q: Array, q_positions: Array) -> Array:
        rows = q.reshape(batch, -1, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
        seen = _seen(q_positions, k_positions, window)[:, None, None]
        y = _attend(rows.reshape(batch, kv_heads, -1, head_dim), k, v, seen)
        y = y.reshape(batch, kv_heads, group, -1, head_dim).transpose(0, 3, 1, 2, 4)
        return y.reshape(batch, -1, heads, head_dim)

    limit = max(16, SCORE_BYTES // (4 * batch * heads * keys))
    if seq <= limit:
        return block(q, q_positions)
    blocks = -(-seq // limit)
    size = -(-seq // blocks)

    def split(x: Array) -> Array:
        pad = [(0, 0), (0, blocks * size - seq)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, pad).reshape(batch, blocks, size, *x.shape[2:])
        return x.swapaxes(0, 1)

    y = lax.map(lambda args: block(*args), (split(q), split(q_positions)))
    y = y.swapaxes(0, 1).reshape(batch, blocks * size, heads, head_dim)
    return y[:, :seq]


def _seen(q_positions: Array, k_positions: Array, window: int | None) -> Array:
    q, k = q_positions[:, :, None], k_positions[:, None, :]
    seen = (k <= q) & (k >= 0)
    return seen if window is None else seen & (q - k < window)


@jax.custom_vjp
def _attend(
    q: Float[Array, "b h gq d"],
    k: Float[Array, "b h k d"],
    v: Float[Array, "b h k d"],
    seen: Bool[Array, "b 1 1 q k"],
) -> Float[Array, "b h gq d"]:
    """Attention of one query block; rows are the queries of each head of a group."""
    weights = _weights(q, k, seen).astype(q.dtype)
    return _dot(weights, v, 3, 2).astype(q.dtype)


def _attend_fwd(q, k, v, seen):
    return _attend(q, k, v, seen), (q, k, v, seen)


def _attend_bwd(residuals, dy):
    # By hand, so that products are of the compute dtype: autodiff of the float32 sums
    # would multiply in float32.
    q, k, v, seen = residuals
    # Barriers, so that exp is not fused into, and redone for, each of its consumers,
    # and transposes are made once rather than inside a product.
    weights = lax.optimization_barrier(_weights(q, k, seen))
    dv = _dot(_transpose(weights.astype(q.dtype)), dy, 3, 2)
    d_weights = _dot(dy, v, 3, 3)
    centre = jnp.sum(d_weights * weights, axis=-1, keepdims=True)
    d_scores = weights * (d_weights - centre) * (q.shape[-1] ** -0.5)
    d_scores = d_scores.astype(q.dtype)
    dq, dk = _dot(d_scores, k, 3, 2), _dot(_transpose(d_scores), q, 3, 2)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


def _transpose(x: Array) -> Array:
    return lax.optimization_barrier(x.swapaxes(-1, -2))


_attend.defvjp(_attend_fwd, _attend_bwd)


def _weights(q: Array, k: Array, seen: Array) -> Float[Array, "b h gq k"]:
    scores = _dot(q, k, 3, 3) * (q.shape[-1] ** -0.5)
    b, h, rows, keys = scores.shape
    scores = scores.reshape(b, h, -1, seen.shape[3], keys)
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
    return weights.reshape(b, h, rows, keys)


def _dot(
    a: Array, b: Array, contract_a: int, contract_b: int
) -> Float[Array, "b h ..."]:
    dims = (((contract_a,), (contract_b,)), ((0, 1), (0, 1)))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
