"""Dynamic loss scaling for float16: gradients come scaled, bad steps are skipped.

Source: Micikevicius et al., arXiv 1710.03740, section 3.2; growth and backoff as in
torch.amp.GradScaler.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

INITIAL_SCALE = 2.0**15
GROWTH_INTERVAL = 2000
"""Good steps after which the scale doubles."""


class LossScaleState(NamedTuple):
    """State of `dynamic_loss_scale`.

    Attributes:
      scale: What the next loss is to be multiplied by.
      good_steps: Finite steps since the scale last changed.
      skipped: Steps skipped in all.
      inner: State of the inner transform.
    """

    scale: Float[Array, ""]
    good_steps: Int[Array, ""]
    skipped: Int[Array, ""]
    inner: Any


def dynamic_loss_scale(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer for gradients of a scaled loss.

    The caller multiplies the loss by `state.scale`; `update` divides the gradients by
    it. When any is not finite the update is zero, `inner` stays as it was and the scale
    halves; after 2000 good steps in a row it doubles.

    Args:
      inner: Any optax transform.

    Returns:
      A transform whose state is a LossScaleState.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> LossScaleState:
        # Two zeros, not one twice: a buffer cannot be donated twice.
        good, skipped = jnp.int32(0), jnp.zeros((), jnp.int32)
        scale = jnp.float32(INITIAL_SCALE)
        return LossScaleState(scale, good, skipped, inner.init(params))

    def update(updates, state, params=None, **extra):
        updates = jax.tree.map(lambda g: g / state.scale, updates)
        leaves = [jnp.isfinite(g).all() for g in jax.tree.leaves(updates)]
        finite = jnp.stack(leaves).all()
        safe = jax.tree.map(lambda g: jnp.where(finite, g, 0), updates)
        stepped, inner_state = inner.update(safe, state.inner, params, **extra)
        keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
        good = jnp.where(finite, state.good_steps + 1, 0)
        grow = good >= GROWTH_INTERVAL
        scale = jnp.where(
            finite, state.scale * jnp.where(grow, 2.0, 1.0), state.scale / 2
        )
        return jax.tree.map(lambda u: jnp.where(finite, u, 0), stepped), LossScaleState(
            jnp.maximum(scale, 1.0),
            jnp.where(grow, 0, good),
            state.skipped + jnp.where(finite, 0, 1),
            jax.tree.map(keep, inner_state, state.inner),
        )

    return optax.GradientTransformationExtraArgs(init, update)
