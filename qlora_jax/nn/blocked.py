"""Attention in whole sequences on a CPU: block by block, and only where something is seen.

A block of queries meets the blocks of keys from the first that any of its queries sees up to
its own, so that neither keys behind a query, nor those before a window, nor other documents of
a packed row are multiplied. The softmax is gathered over blocks, and backward makes scores
again from q, k and v (FlashAttention, arXiv 2205.14135 and 2307.08691). The loops have as many
turns as the data say; a GPU would wait for the host at each of them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.products import dot

BLOCK = 128
"""Positions of a block, at most. On a CPU with two cores 96 to 192 are as fast, forward and
backward of 4 x 736 tokens with 9 heads of 64; 64 takes a third longer."""

_UNSEEN = -1e30


class Scoring(NamedTuple):
    """These settings of a model say how a score is made of a query and a key, as `attention`
    takes them. They are static: another value compiles another program.

    Attributes:
      window: A query sees so many positions, its own counted; None is all before it.
      scale: The factor of the product of query and key.
      softcap: Scores s become softcap * tanh(s / softcap) (Gemma 2); None leaves them.
    """

    window: int | None
    scale: float
    softcap: float | None


def blocked_attention(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch seq kv_heads head_dim"],
    v: Float[Array, "batch seq kv_heads value_dim"],
    documents: Int[Array, "batch seq"] | None,
    sinks: Float[Array, " heads"] | None,
    scoring: Scoring,
) -> Float[Array, "batch seq heads value_dim"]:
    """Returns what `causal_attention` does, and takes what that takes."""
    batch, seq, heads, head_dim = q.shape
    kv_heads, value_dim = v.shape[2:]
    group = heads // kv_heads
    count = -(-seq // BLOCK)
    size = -(-seq // count)
    padded = count * size

    def cut(x: Array) -> Float[Array, "blocks batch heads size features"]:
        x = jnp.pad(x, [(0, 0), (0, padded - seq), (0, 0), (0, 0)])
        x = x.reshape(batch, count, size, *x.shape[2:])
        return x.transpose(1, 0, 3, 2, 4)

    rows = cut(q).reshape(count, batch, kv_heads, group * size, head_dim)
    reach = jnp.broadcast_to(jnp.arange(padded, dtype=jnp.int32), (batch, padded))
    if documents is not None:
        own = jnp.pad(documents, [(0, 0), (0, padded - seq)])
        reach = jnp.minimum(reach, own)
    if scoring.window is not None:
        reach = jnp.minimum(reach, scoring.window - 1)
    reach = reach.reshape(batch, count, size).swapaxes(0, 1)
    if sinks is not None:
        wide = sinks.astype(jnp.float32).reshape(kv_heads, group)
        sinks = jnp.repeat(wide, size, axis=1)
    y = _blocked(rows, cut(k), cut(v), reach, sinks, scoring)
    y = y.reshape(count, batch, kv_heads, group, size, value_dim)
    y = y.transpose(1, 0, 4, 2, 3, 5).reshape(batch, padded, heads, value_dim)
    return y[:, :seq]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blocked(
    q: Float[Array, "n b h gq d"],
    k: Float[Array, "n b h k d"],
    v: Float[Array, "n b h k e"],
    reach: Int[Array, "n b q"],
    sinks: Float[Array, "h gq"] | None,
    scoring: Scoring,
) -> Float[Array, "n b h gq e"]:
    """Returns the attention of n blocks; rows are the queries of each head of a group.

    `reach` says how many positions before its own each query sees.
    """
    return _forward(q, k, v, reach, sinks, scoring)[0]


def _forward(
    q: Array,
    k: Array,
    v: Array,
    reach: Array,
    sinks: Array | None,
    scoring: Scoring,
) -> tuple[Float[Array, "n b h gq e"], tuple[Array, Array]]:
    """Returns the outputs, and of each softmax its largest score and what it is divided by,
    both (n, b, h, gq). The logarithm that stands for both elsewhere would be less exact."""
    first, shape = _first_seen(reach), q.shape[1:-1]

    def rows(i: Array) -> tuple[Array, tuple[Array, Array]]:
        def turn(j: Array, carry: Any) -> Any:
            most, total, y = carry
            scores, _ = _scores(q[i], k[j], i, j, reach[i], scoring)
            higher = jnp.maximum(most, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - higher[..., None])
            kept = jnp.exp(most - higher)
            total = total * kept + jnp.sum(weights, axis=-1)
            made = dot(weights.astype(q.dtype), v[j], 3, 2, batch=2)
            return higher, total, y * kept[..., None] + made

        most = jnp.full(shape, _UNSEEN, jnp.float32)
        total = jnp.zeros(shape, jnp.float32)
        if sinks is not None:  # each begins as a score whose value is nothing
            most, total = jnp.broadcast_to(sinks, shape), total + 1
        y = jnp.zeros((*shape, v.shape[-1]), jnp.float32)
        most, total, y = lax.fori_loop(first[i], i + 1, turn, (most, total, y))
        return (y / total[..., None]).astype(q.dtype), (most, total)

    return lax.map(rows, jnp.arange(len(q)))


def _blocked_fwd(q, k, v, reach, sinks, scoring):
    y, softmax = _forward(q, k, v, reach, sinks, scoring)
    return y, (q, k, v, reach, sinks, y, softmax)


def _blocked_bwd(scoring, residuals, dy):
    q, k, v, reach, sinks, y, (most, total) = residuals
    first = _first_seen(reach)
    centre = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)

    def rows(carry: Any, i: Array) -> Any:
        def turn(j: Array, carry: Any) -> Any:
            dq, dk, dv = carry
            scores, slope = _scores(q[i], k[j], i, j, reach[i], scoring)
            weights = jnp.exp(scores - most[i][..., None]) / total[i][..., None]
            d_weights = dot(dy[i], v[j], 3, 3, batch=2)
            d_scores = weights * (d_weights - centre[i][..., None]) * slope
            d_scores = d_scores.astype(q.dtype)
            dq = dq + dot(d_scores, k[j], 3, 2, batch=2)
            dk = _added(dk, j, dot(d_scores, q[i], 2, 2, batch=2))
            dv = _added(dv, j, dot(weights.astype(q.dtype), dy[i], 2, 2, batch=2))
            return dq, dk, dv

        dq = jnp.zeros(q.shape[1:], jnp.float32)
        dq, *carry = lax.fori_loop(first[i], i + 1, turn, (dq, *carry))
        return tuple(carry), dq.astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (dk, dv), dq = lax.scan(rows, zeros, jnp.arange(len(q)))
    d_sinks = None
    if sinks is not None:
        d_sinks = -jnp.sum(jnp.exp(sinks - most) / total * centre, axis=(0, 1))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, d_sinks


_blocked.defvjp(_blocked_fwd, _blocked_bwd)


def _first_seen(reach: Int[Array, "n b q"]) -> Int[Array, " n"]:
    """Returns the first block of keys that each block of queries sees."""
    count, _, size = reach.shape
    own = jnp.arange(count * size, dtype=jnp.int32).reshape(count, 1, size)
    return jnp.min(own - reach, axis=(1, 2)) // size


def _scores(
    q: Float[Array, "b h gq d"],
    k: Float[Array, "b h k d"],
    i: Array,
    j: Array,
    reach: Int[Array, "b q"],
    scoring: Scoring,
) -> tuple[Float[Array, "b h gq k"], Array | float]:
    """Returns the scores of the block of queries i and that of keys j, and what a score's
    derivative is multiplied by."""
    scores, slope = dot(q, k, 3, 3, batch=2) * scoring.scale, scoring.scale
    if scoring.softcap is not None:
        capped = jnp.tanh(scores / scoring.softcap)
        scores, slope = scoring.softcap * capped, scoring.scale * (1 - capped**2)
    size = k.shape[2]
    places = jnp.arange(size, dtype=jnp.int32)
    apart = (i - j) * size + places[:, None] - places
    seen = (apart >= 0) & (apart <= reach[:, :, None])
    b, h, rows, keys = scores.shape
    each = scores.reshape(b, h, -1, size, keys)
    each = jnp.where(seen[:, None, None], each, _UNSEEN)
    return each.reshape(b, h, rows, keys), slope


def _added(x: Array, j: Array, more: Array) -> Array:
    return lax.dynamic_update_index_in_dim(x, x[j] + more, j, 0)
