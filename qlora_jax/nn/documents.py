"""Documents that share a row: where each begins, and what that means for its tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def places_of(
    positions: Int[Array, "*batch seq"] | None,
    segment_ids: Int[Array, "*batch seq"] | None,
) -> Int[Array, "*batch seq"] | None:
    """Returns how many tokens of its own document are before each token.

    Args:
      positions: These begin at 0 in each document.
      segment_ids: Tokens of one document have one number, and are together; 0 is padding.
        They count where both are given.

    Returns:
      int32 (..., seq), or None where neither is given: each row is one document then.
    """
    if segment_ids is None:
        return positions
    begins = jnp.diff(segment_ids, axis=-1, prepend=segment_ids[..., :1] - 1) != 0
    numbers = jnp.arange(segment_ids.shape[-1], dtype=jnp.int32)
    first = jnp.where(begins, numbers, 0)
    return numbers - jax.lax.cummax(first, axis=first.ndim - 1)
