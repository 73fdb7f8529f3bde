"""The on-disk form of an adapter: flat dotted names, one entry a layer.

`{"layers.0.attn.q_proj.lora_a": (in, rank) array, ...}` against the in-memory State,
whose layers are stacked.
"""

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from qlora_jax.config.lora import LoRAConfig
from qlora_jax.errors import AdapterMismatchError, gathered
from qlora_jax.names import (
    Index,
    Numbered,
    is_stacked,
    layers_at,
    plain,
    stack_key,
)

M = TypeVar("M")
WRAPPED_BIAS = ("base", "bias")


def stacked_names(path: tuple, variable: nnx.Variable) -> dict[str, tuple[int, ...]]:
    """Returns {dotted name: index in the array} of a parameter or a stack of them.

    A stack of layers is numbered behind `layers`, one of experts behind `experts`. Layers
    without adapter, which the variable's metadata leave out of `layers`, have no name. The
    bias of an adapted linear has the linear's name.
    """
    shape = variable.get_value().shape
    metadata = variable.get_metadata()
    depth, only = metadata.get("stack", len(shape) - 2), metadata.get("layers", ())
    stack = shape[:depth]
    if path[-2:] == WRAPPED_BIAS:
        path = (*path[:-2], path[-1])
    if not is_stacked(path) or not stack:
        return {plain(path): ()}
    places = {Numbered.at(path, index): index for index in np.ndindex(*stack)}
    return {
        str(place): index
        for place, index in places.items()
        if not only or place.numbers[0] in only
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
      where: The adapter's name or path, for the error.

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


def at_place(modules: Mapping[tuple, M]) -> Callable[[str, Index], tuple[M, Index]]:
    """Returns a function that finds one layer of a linear among stacks of them.

    Args:
      modules: The linears by path, as keys.

    Returns:
      find(path without the key of a stack, layer and expert) -> (module, index in its
      stack). It raises KeyError with the numbered name of one that is not there.
    """
    stacks: dict[str, list[tuple[range | None, M]]] = {}
    for path, module in modules.items():
        stacks.setdefault(plain(path), []).append((layers_at(path), module))

    def find(path: str, index: Index) -> tuple[M, Index]:
        for layers, module in stacks.get(path, []):
            if layers is None:
                return module, index
            if index[0] in layers:
                return module, (layers.index(index[0]), *index[1:])
        raise KeyError(str(Numbered(path, index)))

    return find


def explicit_layers(lora: nnx.State, config: LoRAConfig) -> dict[str, list[int]]:
    """Returns the layers of each linear of which a config does not tell them.

    That is so where layers are of several kinds: not each has every linear, or of one shape.
    """
    found: dict[str, set[int]] = {}
    for path, variable in nnx.to_flat_state(lora):
        layers = _layers_of(path, variable)
        if layers is None or path[-1] != "lora_a":
            continue
        only = variable.get_metadata().get("layers") or ()
        told = layers_at(path) is None and (
            not only or {*only} == {*config.layers_of(_module(path))}
        )
        if not told:
            found.setdefault(_module(path), set()).update(only or layers)
    return {module: sorted(layers) for module, layers in found.items()}


def whole(lora: nnx.State, apart: Collection[str] = ()) -> nnx.State:
    """Returns an adapter whose layers are grouped as those of any other.

    Adapters of models whose layers are stacked differently, and ones that were read without
    a model, can so be computed with together. Each parameter becomes one stack, from layer 0
    on; layers without a part are zero, and `layers` in the metadata says which have one.

    Args:
      lora: The State of a model's adapter, or one that this function returned.
      apart: Linears whose layers are of several shapes (`uneven`): each layer of them
        becomes a stack of its own.
    """
    entries: list[tuple[tuple, nnx.Variable]] = []
    found: dict[tuple, list[tuple[range, nnx.Variable]]] = {}
    for path, variable in nnx.to_flat_state(lora):
        layers = _layers_of(path, variable)
        key = layers_at(path)
        if layers is None or (key is None and _module(path) not in apart):
            entries.append((path, variable))
        else:
            own = (path[0], *path[2 if key is not None else 1 :])
            found.setdefault(own, []).append((layers, variable))
    for path, stacks in found.items():
        if _module(path) in apart:
            entries += [
                ((path[0], stack_key(range(i, i + 1)), *path[1:]), one)
                for i, one in _by_layer(stacks)
            ]
        else:
            entries.append((path, _joined(stacks)))
    return nnx.from_flat_state(entries)


def uneven(loras: Iterable[nnx.State]) -> set[str]:
    """Returns the linears whose layers are not of one shape, whatever their rank."""
    sizes: dict[tuple[str, str], set[tuple[int, ...]]] = {}
    for lora in loras:
        for path, variable in nnx.to_flat_state(lora):
            if _layers_of(path, variable) is not None:
                shape = variable.get_value().shape[1:]
                key = _module(path), str(path[-1])
                sizes.setdefault(key, set()).add(_without_rank(path, shape))
    return {module for (module, _), found in sizes.items() if len(found) > 1}


def _module(path: tuple) -> str:
    """Returns the linear that a parameter is of, without the key of its stack."""
    return plain(path[:-2] if path[-2:] == WRAPPED_BIAS else path[:-1])


def _without_rank(path: tuple, shape: tuple[int, ...]) -> tuple[int, ...]:
    if path[-1] == "lora_a":
        return shape[:-1]
    return (*shape[:-2], shape[-1]) if path[-1] == "lora_b" else shape


def _layers_of(path: tuple, variable: nnx.Variable) -> range | None:
    """Returns the layers that a stack holds; None of what is no stack of layers."""
    shape = variable.get_value().shape
    if not is_stacked(path) or not variable.get_metadata().get("stack", len(shape) - 2):
        return None
    return layers_at(path) or range(shape[0])


def _by_layer(
    stacks: Iterable[tuple[range, nnx.Variable]],
) -> Iterator[tuple[int, nnx.Variable]]:
    """Yields the layers that have a part, and it, as a stack of one."""
    for layers, variable in stacks:
        only = variable.get_metadata().get("layers") or layers
        for i, number in enumerate(layers):
            if number in only:
                one = variable.replace(variable.get_value()[i : i + 1])
                one.set_metadata(layers=())
                yield number, one


def _joined(stacks: list[tuple[range, nnx.Variable]]) -> nnx.Variable:
    """Returns one variable of all layers, of what each of several stacks holds."""
    _, one = stacks[0]
    parts = dict(_by_layer(stacks))
    array = jnp.zeros(
        (max(parts) + 1, *one.get_value().shape[1:]), one.get_value().dtype
    )
    values = jnp.concatenate([part.get_value() for part in parts.values()])
    joined = one.replace(array.at[jnp.asarray(list(parts))].set(values))
    # Named even where it is all of them: another adapter's stack may be longer.
    joined.set_metadata(layers=tuple(sorted(parts)))
    return joined
