"""Causal attention that holds scores for a block of queries only.

Scores of [batch, heads, seq, seq] never exist: queries go block by block, each block
against all keys, and backward recomputes a block's scores from q, k and v, which are
all it keeps. Whole sequences go through cuDNN's fused attention on NVIDIA GPUs, and on CPUs
against those blocks of keys alone that are seen (blocked.py).
"""

import functools
import logging
import os
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.device import SCORE_BYTES, current_device, limit
from pallas_kernels.products import dot
from qlora_jax.errors import ConfigError
from qlora_jax.nn import blocked

logger = logging.getLogger(__name__)

Implementation = Literal["xla", "cudnn"]
VARIABLE = "QLORA_JAX_ATTENTION"
"""Environment variable that names the implementation for whole sequences."""


def causal_attention(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch seq kv_heads head_dim"],
    v: Float[Array, "batch seq kv_heads value_dim"],
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    documents: Int[Array, "batch seq"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "batch seq heads value_dim"]:
    """Softmax attention in whole sequences: token i sees the tokens up to i.

    Args:
      q, k, v, window, scale, softcap, sinks: See `attention`; padding belongs to the right.
      documents: Where rows hold several documents, how many tokens of its own are before
        each token; it sees those alone. None where each row is one.
      implementation: 'xla' is `attention`, and on a CPU `blocked_attention` of long rows;
        'cudnn' is jax.nn.dot_product_attention's, for 16-bit heads on an NVIDIA GPU of sm_80
        or later. None takes cuDNN's where it runs; $QLORA_JAX_ATTENTION names one for all.

    Returns:
      The heads' outputs in q's dtype.

    Raises:
      ConfigError: the named implementation cannot run, with the reason.
    """
    name, _ = choose_attention(
        q.shape,
        k.shape[2],
        q.dtype,
        window,
        softcap,
        implementation,
        sinks=sinks is not None,
        value_dim=v.shape[3],
        packed=documents is not None,
    )
    if name == "cudnn":
        return _cudnn(q, k, v, window, scale)
    if current_device().platform == "cpu" and q.shape[1] > blocked.BLOCK:
        own = q.shape[3] ** -0.5 if scale is None else scale
        scoring = blocked.Scoring(window, own, softcap)
        return blocked.blocked_attention(q, k, v, documents, sinks, scoring)
    positions = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
    options: Any = {"window": window, "scale": scale, "softcap": softcap}
    options |= {"sinks": sinks, "reach": documents}
    return attention(q, k, v, positions, positions, **options)


def choose_attention(
    shape: tuple[int, ...],
    kv_heads: int,
    dtype: jnp.dtype,
    window: int | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
    sinks: bool = False,
    value_dim: int | None = None,
    packed: bool = False,
) -> tuple[str, str]:
    """Returns what `causal_attention` runs for q of a shape, and why."""
    implementation = implementation or os.environ.get(VARIABLE)
    if implementation not in (None, "xla", "cudnn"):
        raise ConfigError(
            f"attention {implementation!r} (or ${VARIABLE}) is unknown; expected xla or "
            "cudnn"
        )
    if implementation == "xla":
        return "xla", "asked for"
    device = current_device()
    if device.platform != "gpu":
        reason = f"cudnn needs an NVIDIA GPU, this is {device.platform}"
    elif softcap is not None:
        reason = "cudnn has no softcap"
    elif sinks:
        reason = "cudnn has no sinks"
    elif packed:
        reason = "jax.nn's cudnn attention does not tell documents of a row apart"
    elif value_dim not in (None, shape[3]):
        reason = (
            f"cudnn wants values as wide as queries, here {value_dim} and {shape[3]}"
        )
    else:
        reason = _cudnn_refuses(shape, kv_heads, jnp.dtype(dtype).name, window)
    if reason is None:
        _log_choice("cudnn", "fused")
        return "cudnn", "fused"
    if implementation == "cudnn":
        raise ConfigError(f"attention 'cudnn' cannot run: {reason}")
    _log_choice("xla", reason)
    return "xla", reason


def _cudnn(
    q: Array, k: Array, v: Array, window: int | None, scale: float | None = None
) -> Array:
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


@functools.cache
def _cudnn_refuses(
    shape: tuple[int, ...], kv_heads: int, dtype: str, window: int | None
) -> str | None:
    """Traces forward and backward, where jax checks what this cuDNN and card support."""
    q = jax.ShapeDtypeStruct(shape, dtype)
    k = jax.ShapeDtypeStruct((*shape[:2], kv_heads, shape[3]), dtype)

    def total(q, k, v):
        return jnp.sum(_cudnn(q, k, v, window).astype(jnp.float32))

    try:
        jax.eval_shape(jax.grad(total, argnums=(0, 1, 2)), q, k, k)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"cudnn refuses: {error}"
    return None


@functools.cache
def _log_choice(name: str, why: str) -> None:
    logger.info("attention runs %r (%s)", name, why)


def attention(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads value_dim"],
    q_positions: Int[Array, "batch seq"],
    k_positions: Int[Array, "batch keys"],
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    reach: Int[Array, "batch seq"] | None = None,
) -> Float[Array, "batch seq heads value_dim"]:
    """Softmax attention with grouped keys; a query sees keys at or before its position.

    Args:
      q: Queries, rotated.
      k: Keys, rotated; heads is a multiple of kv_heads.
      v: Values; a head's may be of another size than its query.
      q_positions: Position of each query.
      k_positions: Position of each key; a negative one is never seen (padding, unused
        cache).
      window: Only the last `window` positions are seen; None for all.
      scale: The factor of the scores; None for head_dim**-0.5.
      softcap: Scores s become softcap * tanh(s / softcap) (Gemma 2); None leaves them.
      sinks: A score for each head that takes its part of the softmax and gives nothing
        (gpt-oss; arXiv 2309.17453 has it as a token); None for none.
      reach: How many positions before its own each query sees at most; None for all.

    Returns:
      The heads' outputs in q's dtype; softmax and sums are float32.
    """
    batch, seq, heads, head_dim = q.shape
    keys, kv_heads, value_dim = v.shape[1:]
    group = heads // kv_heads
    scale = head_dim**-0.5 if scale is None else scale
    # Batch axes first and one matrix each behind them: (batch, kv_heads, rows, head_dim).
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(kv_heads, group, 1, 1)

    def block(q: Array, q_positions: Array, reach: Array | None) -> Array:
        rows = q.reshape(batch, -1, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
        seen = _seen(q_positions, k_positions, window, reach)[:, None, None]
        rows = rows.reshape(batch, kv_heads, -1, head_dim)
        y = _attend(rows, k, v, seen, sinks, scale, softcap)
        y = y.reshape(batch, kv_heads, group, -1, value_dim).transpose(0, 3, 1, 2, 4)
        return y.reshape(batch, -1, heads, value_dim)

    most = max(16, limit(SCORE_BYTES) // (4 * batch * heads * keys))
    if seq <= most:
        return block(q, q_positions, reach)
    blocks = -(-seq // most)
    size = -(-seq // blocks)

    def split(x: Array) -> Array:
        pad = [(0, 0), (0, blocks * size - seq)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, pad).reshape(batch, blocks, size, *x.shape[2:])
        return x.swapaxes(0, 1)

    each = split(q), split(q_positions), None if reach is None else split(reach)
    y = lax.map(lambda args: block(*args), each)
    y = y.swapaxes(0, 1).reshape(batch, blocks * size, heads, value_dim)
    return y[:, :seq]


def _seen(
    q_positions: Array, k_positions: Array, window: int | None, reach: Array | None
) -> Array:
    q, k = q_positions[:, :, None], k_positions[:, None, :]
    seen = (k <= q) & (k >= 0)
    if reach is not None:
        seen &= q - k <= reach[:, :, None]
    return seen if window is None else seen & (q - k < window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(
    q: Float[Array, "b h gq d"],
    k: Float[Array, "b h k d"],
    v: Float[Array, "b h k e"],
    seen: Bool[Array, "b 1 1 q k"],
    sinks: Float[Array, "h g 1 1"] | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "b h gq e"]:
    """Attention of one query block; rows are the queries of each head of a group."""
    weights = _weights(q, k, seen, sinks, scale, softcap)[0].astype(q.dtype)
    return dot(weights, v, 3, 2, batch=2).astype(q.dtype)


def _attend_fwd(q, k, v, seen, sinks, scale, softcap):
    y = _attend(q, k, v, seen, sinks, scale, softcap)
    return y, (q, k, v, seen, sinks)


def _attend_bwd(scale, softcap, residuals, dy):
    # By hand, so that products are of the compute dtype: autodiff of the float32 sums
    # would multiply in float32.
    q, k, v, seen, sinks = residuals
    # Barriers, so that exp is not fused into, and redone for, each of its consumers,
    # and transposes are made once rather than inside a product.
    weights, slope, sunk = _weights(q, k, seen, sinks, scale, softcap)
    weights = lax.optimization_barrier(weights)
    dv = dot(_transpose(weights.astype(q.dtype)), dy, 3, 2, batch=2)
    d_weights = dot(dy, v, 3, 3, batch=2)
    centre = jnp.sum(d_weights * weights, axis=-1, keepdims=True)
    d_scores = (weights * (d_weights - centre) * slope).astype(q.dtype)
    dq = dot(d_scores, k, 3, 2, batch=2)
    dk = dot(_transpose(d_scores), q, 3, 2, batch=2)
    d_sinks = None
    if (
        sinks is not None
    ):  # whose values are nothing, so that the centre alone moves them
        centre = centre.reshape(sunk.shape)
        d_sinks = -jnp.sum(sunk * centre, axis=(0, 3))[..., None]
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, d_sinks


def _transpose(x: Array) -> Array:
    return lax.optimization_barrier(x.swapaxes(-1, -2))


_attend.defvjp(_attend_fwd, _attend_bwd)


def _weights(
    q: Array,
    k: Array,
    seen: Array,
    sinks: Array | None,
    scale: float,
    softcap: float | None,
) -> tuple[Float[Array, "b h gq k"], Array | float, Any]:
    """Returns the softmax, what a score's derivative is multiplied by, and the part of each
    softmax that a sink takes, (b, h, g, q, 1)."""
    scores = dot(q, k, 3, 3, batch=2) * scale
    slope = scale
    if softcap is not None:
        capped = jnp.tanh(scores / softcap)
        scores, slope = softcap * capped, scale * (1 - capped**2)
    b, h, rows, keys = scores.shape
    scores = scores.reshape(b, h, -1, seen.shape[3], keys)
    scores, sunk = jnp.where(seen, scores, -1e30), None
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        most = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks)
        weights, sunk = jnp.exp(scores - most), jnp.exp(sinks - most)
        total = jnp.sum(weights, axis=-1, keepdims=True) + sunk
        weights, sunk = weights / total, sunk / total
    return weights.reshape(b, h, rows, keys), slope, sunk
