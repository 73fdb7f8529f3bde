"""Reading an adapter folder of ours without a model, to compute with the adapter."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from qlora_jax.adapters.names import WRAPPED_BIAS
from qlora_jax.adapters.value import Adapter
from qlora_jax.config.lora import LoRAConfig
from qlora_jax.errors import AdapterMismatchError, gathered
from qlora_jax.exchange.find import find_adapter
from qlora_jax.exchange.metadata import check_unchanged, read_metadata, restored
from qlora_jax.exchange.peft import is_peft
from qlora_jax.models.settings import MAX_EXPERTS, MAX_LAYERS
from qlora_jax.names import EMBEDDING, Numbered, stack_key

_BY_LAYER = ("lora_a", "lora_b", "magnitude")
"""Parameters that say which layers have them."""


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Reads an adapter as a value, with no model.

    Layers and experts, which have an entry each on disk, are stacked as a Decoder's are.
    Where only some layers have adapters, the stack ends with the last of them, and the
    others are zero. `save_adapter` of the result writes the same folder again.

    Args:
      path: A run folder or an adapter folder.

    Raises:
      AdapterMismatchError: there is none, it cannot be read, layers of one linear have
        different shapes or are missing, or it is a PEFT folder: whose names only a model
        can tell.
    """
    if is_peft(path):
        raise AdapterMismatchError(
            f"{path} is a PEFT adapter, whose names are those of a model; read it with "
            "import_peft(path, model), then Adapter.of(model)"
        )
    folder = find_adapter(path)
    config, metadata = read_metadata(folder)
    flat = restored(folder, metadata)
    base = None if metadata["base"] is None else json.dumps(metadata["base"])
    own = {name: tuple(x) for name, x in metadata.get("layers", {}).items()}
    adapter = Adapter(_stacked(flat, config, own, base, folder), config)
    check_unchanged(folder, metadata)
    return adapter


def _stacked(
    flat: Mapping[str, Array],
    config: LoRAConfig,
    own: Mapping[str, tuple[int, ...]],
    base: str | None,
    folder: Path,
) -> nnx.State:
    """Undoes names.flatten; `own` are the layers of linears that not every layer has."""
    adapted = {
        Numbered.parse(name).path.rpartition(".")[0]
        for name in flat
        if name.endswith(".lora_a")
    }
    found: dict[tuple[Any, ...], dict[tuple[int, ...], Array]] = {}
    entries, problems = [], []
    for name, array in flat.items():
        path, index = _place(name)
        if any(
            number >= most
            for number, most in zip(index, (MAX_LAYERS, MAX_EXPERTS), strict=False)
        ):
            problems.append(f"{name}: no model has so many layers or experts")
            continue
        if path[-1] == "bias" and ".".join(map(str, path[:-1])) in adapted:
            path = (*path[:-1], *WRAPPED_BIAS)
        found.setdefault(path, {})[index] = array
    for path, parts in found.items():
        name, depth = ".".join(map(str, path)), len(next(iter(parts)))
        shapes = {array.shape for array in parts.values()}
        module = ".".join(map(str, path[:-1])).removesuffix(".base")
        only: tuple[int, ...] = ()
        if depth and path[-1] in _BY_LAYER:
            only = own.get(module) or config.layers_of(module)
        elif depth and module in own:  # a bias or kernel, where not all layers have one
            only = tuple(sorted({index[0] for index in parts}))
        stack = tuple(np.max(list(parts), axis=0) + 1) if depth else ()
        missing = [
            index
            for index in np.ndindex(*stack)
            if index not in parts and (not only or index[0] in only)
        ]
        if module in own and not missing and len(shapes) > 1:
            entries += _each_layer(path, parts, base)
            continue
        if len(shapes) > 1 or missing:
            said = " and ".join(map(str, sorted(shapes)))
            problems.append(
                f"{name}: shapes {said} by layer"
                if len(shapes) > 1
                else f"{name}: nothing of {', '.join(map(str, missing))}"
            )
            continue
        whole = np.zeros((*stack, *next(iter(shapes))), np.float32)
        for index, array in parts.items():
            whole[index] = array
        variable = nnx.LoRAParam(jax.numpy.asarray(whole))
        variable.set_metadata(base=base, stack=depth)
        if (path[-1] in _BY_LAYER and path[0] != EMBEDDING) or only:
            variable.set_metadata(layers=only)
        entries.append((path, variable))
    if problems:
        raise AdapterMismatchError(gathered(f"{folder} cannot be stacked", problems))
    return nnx.from_flat_state(entries)


def _each_layer(
    path: tuple[Any, ...], parts: Mapping[tuple[int, ...], Array], base: str | None
) -> list[tuple[tuple[Any, ...], nnx.Variable]]:
    """Returns a stack of one for each layer of a parameter whose layers differ in shape."""
    entries = []
    for layer in sorted({index[0] for index in parts}):
        own = {i: x for i, x in parts.items() if i[0] == layer}
        value = jax.numpy.stack([own[i] for i in sorted(own)])
        lead = [1, *(np.max(list(own), axis=0)[1:] + 1)]
        variable = nnx.LoRAParam(value.reshape(*lead, *value.shape[1:]))
        variable.set_metadata(base=base, stack=len(lead), layers=())
        key = stack_key(range(layer, layer + 1))
        entries.append(((path[0], key, *path[1:]), variable))
    return entries


def _place(name: str) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Returns the path of a dotted name, and the layer and expert that it numbers."""
    path, numbers = Numbered.parse(name)
    return tuple(int(x) if x.isdigit() else x for x in path.split(".")), numbers
