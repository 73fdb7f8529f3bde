"""Mamba 2's state space in chunks.

A head has a state of (key features, value features). At each token the state decays, the
token's value is written to it under the token's key, and the token's query reads it:

    S = exp(log_decay) S + key (step value)^T;    y = S^T query

(Mamba 2, arXiv 2405.21060, in whose words keys are B, queries C, values x and steps dt.) Within
a chunk of tokens that is attention without a softmax, whose scores decay; between chunks the
state goes on. Documents, padding and memory are as in delta.py.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qlora_jax.nn.delta import Chunks, Decays, in_chunks


def state_space(
    q: Float[Array, "batch seq groups keys"],
    k: Float[Array, "batch seq groups keys"],
    v: Float[Array, "batch seq heads values"],
    log_decay: Float[Array, "batch seq heads"],
    step: Float[Array, "batch seq heads"],
    positions: Int[Array, "batch seq"],
    state: Float[Array, "batch heads keys values"] | None = None,
) -> tuple[
    Float[Array, "batch seq heads values"], Float[Array, "batch heads keys values"]
]:
    """Goes over all tokens; memory is linear in their number.

    Args:
      q, k: Queries and keys. A group serves heads / groups heads in a row.
      v: Values.
      log_decay: At most 0.
      step: The factor of what a token writes.
      positions: 0 where a document begins, -1 for padding.
      state: What the tokens before have left, float32; None for none.

    Returns:
      Outputs in the dtype of the values, and the state after the last token.
    """
    return in_chunks(_some, q, k, v, log_decay, step, positions, state)


def _some(state: Array, some: Chunks) -> tuple[Array, Array]:
    """Goes over one group of chunks; returns the state after it and its outputs."""
    q, k, v = (x.astype(jnp.float32) for x in some[:3])
    between, since, until, through = Decays.of(some)
    k, q = k[:, :, :, None], q[:, :, :, None]  # an axis for the heads of each
    written = some.rate[..., None] * v
    within = ((q @ k.swapaxes(-1, -2)) * between) @ written
    added = (k * until).swapaxes(-1, -2) @ written

    def chunk(state: Array, parts: Any) -> tuple[Array, Array]:
        added, through = parts
        return state * through[..., None, None] + added, state

    last, before = lax.scan(chunk, state, (added, through))
    return last, (within + (q * since) @ before).astype(some.v.dtype)
