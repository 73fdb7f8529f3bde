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

STACK = "layers"


def dotted(path: tuple) -> str:
    """Returns a path of nnx as a dotted name."""
    return ".".join(map(str, path))


def _is_stack(path: tuple, array: Array) -> bool:
    return str(path[0]) == STACK and array.ndim == 3


def flatten(lora: nnx.State) -> dict[str, Array]:
    """Returns {dotted name: array} with stacked layers taken apart."""
    flat = {}
    for path, variable in nnx.to_flat_state(lora):
        array = variable.get_value()
        if _is_stack(path, array):
            rest = ".".join(map(str, path[1:]))
            flat |= {f"{STACK}.{i}.{rest}": array[i] for i in range(array.shape[0])}
        else:
            flat[".".join(map(str, path))] = array
    return flat


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

    def fill(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        array = variable.get_value()
        if _is_stack(path, array):
            rest = ".".join(map(str, path[1:]))
            value = jnp.stack(
                [
                    jnp.asarray(flat[f"{STACK}.{i}.{rest}"])
                    for i in range(array.shape[0])
                ]
            )
        else:
            value = jnp.asarray(flat[".".join(map(str, path))])
        return variable.replace(value.astype(array.dtype))

    entries = [(path, fill(path, v)) for path, v in nnx.to_flat_state(lora)]
    return nnx.from_flat_state(entries)
