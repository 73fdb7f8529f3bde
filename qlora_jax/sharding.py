"""Spreads a model over the devices of a mesh: modules name axes, one table says where they go.

    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    model = shard(model, mesh)                  # before `split`
    batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))

A weight is cut by its rows, and its codes and block scales with it. What is computed is the
same; XLA puts in the communication. The products have to be XLA's: load with
implementation="xla" where a GPU kernel would be chosen, as no compiler can cut one of those.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.formats import PackedWeight
from qlora_jax.errors import ConfigError
from qlora_jax.names import EXPERTS, is_stacked
from qlora_jax.nn.frozen import Adapted, Weighted

M = TypeVar("M", bound=nnx.Module)

RULES: Mapping[str, str] = {"out": "model", "vocab": "model", "experts": "model"}
"""The mesh axis that each named axis of an array is cut along; other axes stay whole. A new
kind of parallelism is another table: {"out": ("data", "model")} spreads the base over both."""


def shard(
    model: M, mesh: Mesh, rules: Mapping[str, str | tuple[str, ...]] = RULES
) -> M:
    """Returns a model with its arrays spread over a mesh.

    Args:
      model: A model of our modules, with or without an adapter. It is left as it was.
      mesh: The devices, with the axes that `rules` names.
      rules: The mesh axis, or axes, of each named axis. An axis whose size they do not
        divide stays whole, as does one behind another that has taken the same mesh axis.

    Raises:
      ConfigError: the mesh lacks an axis that the rules name, or has one that is not Auto.
    """
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ConfigError(
            f"the axes of the mesh are {mesh.axis_types}; XLA places what a step computes, so "
            "make the mesh with axis_types=(jax.sharding.AxisType.Auto,) * "
            f"{len(mesh.axis_names)}"
        )
    wanted = {x for axes in rules.values() for x in _each(axes)}
    if missing := sorted(wanted - set(mesh.axis_names)):
        raise ConfigError(
            f"the mesh has no axis {', '.join(missing)}, which the rules of sharding name; it "
            f"has {', '.join(mesh.axis_names)}"
        )
    named = dict(named_axes(model))

    def place(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        # The arrays of a packed weight are its leaves, in the order of their axes.
        leaves, structure = jax.tree.flatten(variable.get_value())
        axes = list(named.get(path, {"": ()}).values())
        specs = [
            _spec(x.shape, own, mesh, rules)
            for x, own in zip(leaves, axes, strict=True)
        ]
        put = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip(leaves, specs, strict=True)
        ]
        return variable.replace(structure.unflatten(put))

    graphdef, state = nnx.split(model)
    flat = [(path, place(path, v)) for path, v in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def named_axes(
    model: nnx.Module,
) -> Iterator[tuple[tuple[Any, ...], dict[str, tuple[str | None, ...]]]]:
    """Yields what the axes of each variable's arrays are called.

    Yields:
      (path of a variable, {name of an array of a packed weight, or "": its axes}).
    """
    for path, node in nnx.iter_graph(model):
        if not isinstance(node, (Weighted, Adapted)):
            continue
        lead = ["layers"] if path and is_stacked(path) else []
        lead += ["experts"] if EXPERTS in path else []
        for name, axes in node.AXES.items():
            variable = getattr(node, name, None)
            if variable is None:
                continue
            value = variable.get_value()
            packed = isinstance(value, PackedWeight)
            arrays = value.axes(*axes[:1]) if packed else {"": axes}
            yield (*path, name), {key: (*lead, *own) for key, own in arrays.items()}


def _spec(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    mesh: Mesh,
    rules: Mapping[str, str | tuple[str, ...]],
) -> PartitionSpec:
    """Returns the mesh axes of an array's axes."""
    spec: list[Any] = [None] * len(shape)
    taken: set[str] = set()
    # A stranger's stacks may have more axes in front than we have names for.
    for i, axis in enumerate(axes, len(shape) - len(axes)):
        along = _each(rules.get(axis or "", ()))
        parts = math.prod(mesh.shape[one] for one in along)
        if along and shape[i] % parts == 0 and taken.isdisjoint(along):
            spec[i] = along
            taken |= {*along}
    return PartitionSpec(*spec)


def _each(axes: str | tuple[str, ...]) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes
