"""Log-probabilities of tokens, without ever holding [tokens, vocab] in float32.

All goes over chunks of tokens. `cross_entropy`, a weighted sum, makes each chunk's gradient
in the forward pass, while its logits are there, so that backward multiplies by the
cotangent and recomputes nothing. Source of the idea: Liger-Kernel's fused linear
cross-entropy (arXiv 2410.10989). `token_logprobs` gives each token's own, whose cotangents
come with backward: that makes each chunk's logits again, which is one more product with
the head.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.device import LOGITS_BYTES, limit
from qlora_jax.objectives.base import predicted_weights


def next_tokens(
    batch: Mapping[str, Any],
) -> tuple[Int[Array, "batch seq"], Float[Array, "batch seq"]]:
    """Returns the token that each position predicts, and what predicting it counts.

    Rolled, not cut, so that shapes stay round; the last position of a row, and of each of its
    documents, has weight 0.
    """
    labels = jnp.roll(batch["tokens"], -1, axis=1)
    weights = jnp.roll(predicted_weights(batch).at[:, 0].set(0), -1, axis=1)
    return labels, weights


def cross_entropy(
    head: Any,
    hidden: Float[Array, "batch seq hidden"],
    labels: Int[Array, "batch seq"],
    weights: Float[Array, "batch seq"],
    *,
    label_smoothing: float = 0.0,
) -> Float[Array, ""]:
    """Sums weights * -log p(label) over all tokens.

    Args:
      head: The linear from hidden states to logits; differentiable to its
        nnx.LoRAParam, if it has any, and to `hidden`.
      hidden: What the head takes.
      labels: Token ids, aligned with `hidden` (shifted already, as `next_tokens` gives them).
      weights: What each position counts; 0 leaves it out. Nothing is differentiated to
        them.
      label_smoothing: So much of -log p(label) is replaced by the mean of -log p over all
        tokens of the vocabulary.

    Returns:
      The float32 sum; divide by weights.sum() for the mean.
    """
    graphdef, lora, base = nnx.split(head, nnx.LoRAParam, ...)
    tokens = _in_chunks(head, hidden, labels, weights)
    return _summed(graphdef, label_smoothing, lora, base, *tokens)


def token_logprobs(
    head: Any,
    hidden: Float[Array, "batch seq hidden"],
    labels: Int[Array, "batch seq"],
) -> Float[Array, "batch seq"]:
    """Returns log p(label) of every position, float32, differentiable as `cross_entropy` is.

    Args:
      head: The linear from hidden states to logits.
      hidden: What the head takes.
      labels: Token ids, aligned with `hidden` (shifted already, as `next_tokens` gives them).
    """
    graphdef, lora, base = nnx.split(head, nnx.LoRAParam, ...)
    tokens = _in_chunks(head, hidden, labels)
    each = _each(graphdef, lora, base, *tokens)
    return each.reshape(-1)[: labels.size].reshape(labels.shape)


def top_logprobs(
    head: Any,
    hidden: Float[Array, "batch seq hidden"],
    ids: Int[Array, "batch seq k"],
    temperature: float = 1.0,
) -> Float[Array, "batch seq k"]:
    """Returns log p of several tokens at each position, differentiable as `cross_entropy` is.

    Args:
      head: The linear from hidden states to logits.
      hidden: What the head takes.
      ids: Token ids, aligned with `hidden`.
      temperature: The logits are divided by it.
    """
    graphdef, lora, base = nnx.split(head, nnx.LoRAParam, ...)
    tokens = _in_chunks(head, hidden, ids)
    each = _top(graphdef, temperature, lora, base, *tokens)
    each = each.reshape(-1, ids.shape[-1])
    return each[: ids.size // ids.shape[-1]].reshape(ids.shape)


def _in_chunks(head: Any, hidden: Array, *more: Array) -> list[Array]:
    """Splits what has an entry a token into chunks whose logits fit, (chunks, size, ...)."""
    count = hidden.size // hidden.shape[-1]
    chunks = max(1, -(-count * head.out_features * 4 // limit(LOGITS_BYTES)))
    size = -(-count // chunks)

    def split(x: Array) -> Array:
        shape = x.shape[hidden.ndim - 1 :]
        x = jnp.pad(
            x.reshape(count, *shape),
            [(0, chunks * size - count)] + [(0, 0)] * len(shape),
        )
        return x.reshape(chunks, size, *shape)

    return [split(hidden), *map(split, more)]


def _gradients(graphdef, lora, base, h, label, weight, smoothing=0.0):
    """Returns a chunk's losses, and the gradients of their weighted sum to lora and h."""

    def logits_of(lora, h):
        return nnx.merge(graphdef, lora, base)(h)

    logits, vjp = jax.vjp(logits_of, lora, h)
    nll, log_normalizer = _nll(logits, label, smoothing)
    p = jnp.exp(logits.astype(jnp.float32) - log_normalizer[:, None])
    hit = lax.broadcasted_iota(jnp.int32, p.shape, 1) == label[:, None]
    if smoothing:
        hit = (1 - smoothing) * hit + smoothing / p.shape[1]
    # In the compute dtype: a float32 one would multiply with an upcast head.
    d_logits = ((p - hit.astype(p.dtype)) * weight[:, None]).astype(logits.dtype)
    return nll, *vjp(d_logits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(
    graphdef, smoothing, lora, base, hidden, labels, weights
) -> Float[Array, ""]:
    head = nnx.merge(graphdef, lora, base)

    def body(total, chunk):
        h, label, weight = chunk
        nll, _ = _nll(head(h), label, smoothing)
        return total + jnp.sum(weight * nll), None

    return lax.scan(body, jnp.float32(0), (hidden, labels, weights))[0]


def _summed_fwd(graphdef, smoothing, lora, base, hidden, labels, weights):
    def body(carry, chunk):
        total, d_lora = carry
        nll, d_chunk, d_h = _gradients(
            graphdef, lora, base, *chunk, smoothing=smoothing
        )
        d_lora = jax.tree.map(jnp.add, d_lora, d_chunk)
        return (total + jnp.sum(chunk[2] * nll), d_lora), d_h

    start = (jnp.float32(0), jax.tree.map(jnp.zeros_like, lora))
    (total, d_lora), d_hidden = lax.scan(body, start, (hidden, labels, weights))
    return total, (d_lora, d_hidden)


def _summed_bwd(graphdef, smoothing, residuals, g):
    d_lora, d_hidden = residuals
    d_lora = jax.tree.map(lambda d: (d * g).astype(d.dtype), d_lora)
    return d_lora, None, (d_hidden * g).astype(d_hidden.dtype), None, None


_summed.defvjp(_summed_fwd, _summed_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _each(graphdef, lora, base, hidden, labels) -> Float[Array, "chunks size"]:
    head = nnx.merge(graphdef, lora, base)

    def body(_, chunk):
        h, label = chunk
        return None, -_nll(head(h), label)[0]

    return lax.scan(body, None, (hidden, labels))[1]


def _each_fwd(graphdef, lora, base, hidden, labels):
    residuals = lora, base, hidden, labels
    return _each(graphdef, *residuals), residuals


def _each_bwd(graphdef, residuals, g):
    lora, base, hidden, labels = residuals

    def body(d_lora, chunk):
        _, d_chunk, d_h = _gradients(graphdef, lora, base, *chunk)
        return jax.tree.map(jnp.add, d_lora, d_chunk), d_h

    start = jax.tree.map(jnp.zeros_like, lora)
    d_lora, d_hidden = lax.scan(body, start, (hidden, labels, -g))
    return d_lora, None, d_hidden, None


_each.defvjp(_each_fwd, _each_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _top(graphdef, temperature, lora, base, hidden, ids) -> Array:
    head = nnx.merge(graphdef, lora, base)

    def body(_, chunk):
        h, some = chunk
        logits = head(h).astype(jnp.float32) / temperature
        picked = jnp.take_along_axis(logits, some, axis=1)
        return None, picked - jax.nn.logsumexp(logits, axis=1, keepdims=True)

    return lax.scan(body, None, (hidden, ids))[1]


def _top_fwd(graphdef, temperature, lora, base, hidden, ids):
    residuals = lora, base, hidden, ids
    return _top(graphdef, temperature, *residuals), residuals


def _top_bwd(graphdef, temperature, residuals, g):
    lora, base, hidden, ids = residuals

    def logits_of(lora, h):
        return nnx.merge(graphdef, lora, base)(h)

    def body(d_lora, chunk):
        h, some, g = chunk
        logits, vjp = jax.vjp(logits_of, lora, h)
        p = jax.nn.softmax(logits.astype(jnp.float32) / temperature, axis=1)
        wide = -p * jnp.sum(g, axis=1, keepdims=True)
        wide = wide.at[jnp.arange(len(some))[:, None], some].add(g)
        d_chunk, d_h = vjp((wide / temperature).astype(logits.dtype))
        return jax.tree.map(jnp.add, d_lora, d_chunk), d_h

    start = jax.tree.map(jnp.zeros_like, lora)
    d_lora, d_hidden = lax.scan(body, start, (hidden, ids, g))
    return d_lora, None, d_hidden, None


_top.defvjp(_top_fwd, _top_bwd)


def _nll(
    logits: Float[Array, "tokens vocab"],
    labels: Int[Array, " tokens"],
    smoothing: float = 0.0,
) -> tuple[Float[Array, " tokens"], Float[Array, " tokens"]]:
    """Returns float32 (-log p(label), smoothed; log normalizer) of each token."""
    wide = logits.astype(jnp.float32)
    log_normalizer = jax.nn.logsumexp(wide, axis=-1)
    picked = jnp.take_along_axis(wide, labels[:, None], axis=1)[:, 0]
    if smoothing:
        picked = (1 - smoothing) * picked + smoothing * jnp.mean(wide, axis=1)
    return log_normalizer - picked, log_normalizer
