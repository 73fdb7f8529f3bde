"""Cross-entropy that never holds [tokens, vocab] in float32.

The loss goes over chunks of tokens; the forward pass makes each chunk's gradient while
its logits are there, so backward multiplies by the cotangent and recomputes nothing.
Source of the idea: Liger-Kernel's fused linear cross-entropy (arXiv 2410.10989).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.device import LOGITS_BYTES, limit


def cross_entropy(
    head: Any,
    hidden: Float[Array, "batch seq hidden"],
    labels: Int[Array, "batch seq"],
    weights: Float[Array, "batch seq"],
) -> Float[Array, ""]:
    """Sums weights * -log p(label) over all tokens.

    Args:
      head: The linear from hidden states to logits; differentiable to its
        nnx.LoRAParam, if it has any, and to `hidden`.
      hidden: What the head takes.
      labels: Token ids, aligned with `hidden` (shifted already).
      weights: What each position counts; 0 leaves it out.

    Returns:
      The float32 sum; divide by weights.sum() for the mean.
    """
    graphdef, lora, base = nnx.split(head, nnx.LoRAParam, ...)
    count = labels.size
    chunks = max(1, -(-count * head.out_features * 4 // limit(LOGITS_BYTES)))
    size = -(-count // chunks)

    def split(x: Array, *shape: int) -> Array:
        x = jnp.pad(
            x.reshape(count, *shape),
            [(0, chunks * size - count)] + [(0, 0)] * len(shape),
        )
        return x.reshape(chunks, size, *shape)

    tokens = split(hidden, hidden.shape[-1]), split(labels), split(weights)
    return _chunked(graphdef, lora, base, *tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(graphdef, lora, base, hidden, labels, weights) -> Float[Array, ""]:
    head = nnx.merge(graphdef, lora, base)

    def body(total, chunk):
        h, label, weight = chunk
        nll, _ = _nll(head(h), label)
        return total + jnp.sum(weight * nll), None

    return lax.scan(body, jnp.float32(0), (hidden, labels, weights))[0]


def _chunked_fwd(graphdef, lora, base, hidden, labels, weights):
    def body(carry, chunk):
        total, d_lora = carry
        h, label, weight = chunk

        def logits_of(lora, h):
            return nnx.merge(graphdef, lora, base)(h)

        logits, vjp = jax.vjp(logits_of, lora, h)
        nll, log_normalizer = _nll(logits, label)
        p = jnp.exp(logits.astype(jnp.float32) - log_normalizer[:, None])
        hit = lax.broadcasted_iota(jnp.int32, p.shape, 1) == label[:, None]
        # In the compute dtype: a float32 one would multiply with an upcast head.
        d_logits = ((p - hit) * weight[:, None]).astype(logits.dtype)
        d_chunk, d_h = vjp(d_logits)
        d_lora = jax.tree.map(jnp.add, d_lora, d_chunk)
        return (total + jnp.sum(weight * nll), d_lora), d_h

    start = (jnp.float32(0), jax.tree.map(jnp.zeros_like, lora))
    (total, d_lora), d_hidden = lax.scan(body, start, (hidden, labels, weights))
    return total, (d_lora, d_hidden)


def _chunked_bwd(graphdef, residuals, g):
    d_lora, d_hidden = residuals
    d_lora = jax.tree.map(lambda d: (d * g).astype(d.dtype), d_lora)
    return d_lora, None, (d_hidden * g).astype(d_hidden.dtype), None, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def _nll(
    logits: Float[Array, "tokens vocab"], labels: Int[Array, " tokens"]
) -> tuple[Float[Array, " tokens"], Float[Array, " tokens"]]:
    """Returns float32 (-log p(label), log normalizer) of each token."""
    wide = logits.astype(jnp.float32)
    log_normalizer = jax.nn.logsumexp(wide, axis=-1)
    picked = jnp.take_along_axis(wide, labels[:, None], axis=1)[:, 0]
    return log_normalizer - picked, log_normalizer
