"""Reads the optimizer state of runs from before models had a stack for each kind of layer.

All layers of a linear were one stack then. A checkpoint has the leaves of an optimizer's state
in order, so those of such a run are fewer and longer.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from qlora_jax.adapters.names import flatten, unflatten, whole

Shapes = Sequence[tuple[int, ...]]


def older(opt_state: Any, stored: Shapes) -> Any:
    """Returns a state whose leaves are shapes as an older run stored them.

    Args:
      opt_state: A fresh state of the run as it is now.
      stored: The shapes of the leaves of a checkpoint.

    Returns:
      The same optimizer's state of one stack for each linear, in the shapes stored; None if
      the checkpoint is no older state of this run.
    """
    try:
        joined = jax.tree.map(_joined, opt_state, is_leaf=_is_state)
    except AttributeError:  # moments in 8 bits, whose blocks go across layers
        return None
    leaves, structure = jax.tree.flatten(joined)
    if len(leaves) != len(stored):
        return None
    pairs = zip(leaves, stored, strict=True)
    # A stack had the layers without an adapter too, so it may have been longer.
    if any(
        len(x.shape) != len(shape)
        or x.shape[1:] != shape[1:]
        or (x.shape and x.shape[0] > shape[0])
        for x, shape in pairs
    ):
        return None
    return structure.unflatten(
        jax.ShapeDtypeStruct(shape, x.dtype)
        for x, shape in zip(leaves, stored, strict=True)
    )


def regrouped(older_state: Any, fresh: Any) -> Any:
    """Returns an older state, with its arrays, in the stacks that a run has now.

    Args:
      older_state: From `older`, with arrays in place of shapes.
      fresh: A fresh state of the run as it is now.
    """

    def one(now: Any, before: Any) -> Any:
        if not _is_state(now):
            return before
        return unflatten(flatten(before), now, "the optimizer's state")

    return jax.tree.map(one, fresh, older_state, is_leaf=_is_state)


def _is_state(x: Any) -> bool:
    return isinstance(x, nnx.State)


def _joined(x: Any) -> Any:
    shape = lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype)  # noqa: E731
    return jax.eval_shape(whole, x) if _is_state(x) else jax.tree.map(shape, x)
