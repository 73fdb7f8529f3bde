"""The on-disk form of an adapter: flat dotted names, one entry a layer.

`{"layers.0.attn.q_proj.lora_a": (in, rank) array, ...}` against the in-memory State,
whose layers are stacked.
"""

import difflib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from qlora_jax.errors import AdapterMismatchError, gathered
from qlora_jax.names import Numbered, dotted, is_stacked

WRAPPED_BIAS = ("base", "bias")


def stacked_names(path: tuple, variable: nnx.Variable) -> dict[str, tuple[int, ...]]:
    """Returns {dotted name: index in the array} of a parameter or a stack of them.

    A stack of layers is numbered behind `layers`, one of experts behind `experts`; layers
    without adapter have no name. The bias of an adapted linear has the linear's name.
    """
    shape = variable.get_value().shape
    metadata = variable.get_metadata()
    depth, only = metadata.get("stack", len(shape) - 2), metadata.get("layers", ())
    stack = shape[:depth]
    if path[-2:] == WRAPPED_BIAS:
        path = (*path[:-2], path[-1])
    if not is_stacked(path) or not stack:
        return {dotted(path): ()}
    return {
        str(Numbered(dotted(path), index)): index
        for index in np.ndindex(*stack)
        if not only or index[0] in only
    }


def flatten(lora: nnx.State) -> dict[str, Array]:
    """Returns {dotted name: array} with stacked layers taken apart."""
    flat = {}
    for path, variable in nnx.to_flat_state(lora):
        array = variable.get_value()
        flat |= {name: array[i] for name, i in stacked_names(path, variable).items()}
    return flat


def check_names(
    flat: Mapping[str, Array | np.ndarray], lora: nnx.State, where: str = "adapter"
) -> None:
    """Checks that dotted names and shapes are those of a State, which may be abstract.

    Raises:
      AdapterMismatchError: any name is missing, unexpected or misshapen; all are named.
    """
    wanted = jax.eval_shape(flatten, lora)
    problems = []
    for name, array in wanted.items():
        if name not in flat:
            problems.append(f"{name}: missing from the adapter")
        elif flat[name].shape != array.shape:
            problems.append(
                f"{name}: shape {flat[name].shape}, the model has {array.shape}"
            )
    for name in flat:
        if name not in wanted:
            near = difflib.get_close_matches(name, wanted, n=1)
            hint = f" (nearest: {near[0]})" if near else ""
            problems.append(f"{name}: no such adapter parameter in the model{hint}")
    if problems:
        raise AdapterMismatchError(
            gathered(f"{where} does not fit this model", problems)
        )


def unflatten(
    flat: Mapping[str, Array | np.ndarray], lora: nnx.State, where: str = "adapter"
) -> nnx.State:
    """Fills a State of the same structure from dotted names.

    Args:
      flat: What `flatten` gave.
      lora: A State with the wanted paths, shapes and dtypes.
      where: Of the adapter, for the error.

    Raises:
      AdapterMismatchError: any name is missing, unexpected or misshapen; all are named.
    """
    check_names(flat, lora, where)

    def fill(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        array = variable.get_value()
        names = stacked_names(path, variable)
        parts = [jnp.asarray(flat[name], array.dtype) for name in names]
        index = tuple(np.array(list(names.values())).T)
        if not index:
            return variable.replace(parts[0])
        return variable.replace(array.at[index].set(jnp.stack(parts)))

    entries = [(path, fill(path, v)) for path, v in nnx.to_flat_state(lora)]
    return nnx.from_flat_state(entries)
