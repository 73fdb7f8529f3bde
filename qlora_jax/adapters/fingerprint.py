"""What tells one base from another, whether dense or quantized.

Two parts: the shapes of all parameters, and a sample of values that quantization leaves
alone (embedding, norms, biases). The sample is compared to within the rounding of a
16-bit copy, so that an adapter trained on NF4 weights fits their original.

An adapter that holds a part of its base (LoRAConfig.init) fits that 4-bit base alone. Its
mark has a third part, which tells 4-bit copies apart: the mean absmax of each weight.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import numpy as np
from flax import nnx

from pallas_kernels.formats import PackedWeight
from qlora_jax.names import Numbered, dotted, located
from qlora_jax.nn import FrozenParam
from qlora_jax.schema import FINITE, TEXT, listed, mapped, shaped

_SAMPLES = 8  # of a parameter
MARK = shaped(
    {
        "structure": TEXT,
        "sample": mapped(listed(FINITE, _SAMPLES)),
        "scales": mapped(FINITE),
    },
    ("structure", "sample"),
)
"""The kind of objects that a mark is, as a file has it."""

TOLERANCE = 2**-7
"""Relative; two roundings to bfloat16 differ by at most 2**-8."""
SCALES_TOLERANCE = 1e-4
"""Relative, of a mean absmax: one base quantized on two devices agrees to 1e-6 or so."""


def fingerprint(model: nnx.Module, *, scales: bool = False) -> str | None:
    """Returns a JSON object with `structure` (hex) and `sample` ({name: floats}).

    None while the model is abstract (inside jit or eval_shape). PackedWeight and dense
    copies of one base have the same structure. With `scales` the object has these too:
    {name of a 4-bit weight: mean absmax}, of those that are no shapes alone.
    """
    frozen = {
        dotted(keys): variable
        for keys, variable in nnx.to_flat_state(nnx.state(model, FrozenParam))
    }
    shapes, values = [], {}
    for name, stacks in _parameters(frozen).items():
        shapes.append([name, _shape(stacks)])
        # Kernels may be quantized elsewhere, so only what never is takes part.
        if name.endswith("kernel") or isinstance(stacks[0].value, PackedWeight):
            continue
        if any(
            isinstance(x, (jax.core.Tracer, jax.ShapeDtypeStruct)) for *_, x in stacks
        ):
            return None
        values[name] = _flat(stacks)
    structure = hashlib.sha256(json.dumps(sorted(shapes)).encode()).hexdigest()[:16]
    sample = {}
    for name, flat in values.items():
        index = np.linspace(0, flat.size - 1, _SAMPLES + 2, dtype=np.int64)[1:-1]
        sample[name] = [float(f"{v:.5g}") for v in np.asarray(flat[index], np.float64)]
    mark = json.dumps({"structure": structure, "sample": sample})
    if not scales:
        return mark
    held = {path: variable.get_value() for path, variable in frozen.items()}
    packed = {path: x for path, x in held.items() if isinstance(x, PackedWeight)}
    return with_scales(mark, packed)


class _Stack(NamedTuple):
    """A parameter's value in one stack of layers.

    Attributes:
      path: The parameter's dotted path, with the stack's key.
      layers: The layers that the key names; None without a key.
      value: The value, without the rows that were added for new tokens: these are no part
        of the base.
    """

    path: str
    layers: range | None
    value: Any


def _parameters(frozen: Mapping[str, nnx.Variable]) -> dict[str, list[_Stack]]:
    """Returns the frozen parameters by name, with the stacks that hold one together.

    A base is the same however its layers are grouped. Stacks of one shape count as the one
    stack that they are parts of, whose layers are in order; where layers differ in shape,
    each is a parameter by itself.
    """
    found: dict[str, list[_Stack]] = {}
    for path, variable in frozen.items():
        value = variable.get_value()
        own = variable.get_metadata().get("own_rows")
        name, layers = located(path)
        stack = _Stack(path, layers, value if own is None else value[:own])
        found.setdefault(name, []).append(stack)
    parameters = {}
    for name, stacks in found.items():
        if len({tuple(_shape([one])[1:]) for one in stacks}) == 1 or len(stacks) == 1:
            parameters[name] = stacks
            continue
        for one in stacks:
            for i, layer in enumerate(one.layers or ()):
                path = str(Numbered(name, (layer,)))
                single = range(layer, layer + 1)
                parameters[path] = [_Stack(path, single, _layer(one.value, i))]
    return parameters


def _layer(stack: Any, i: int) -> Any:
    """Returns one layer of a stack as a stack, which may be shapes alone."""

    def cut(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
        return x[i : i + 1]

    return jax.tree.map(cut, stack)


def _shape(stacks: list[_Stack]) -> list[int]:
    """Returns the shape of a parameter, with the leading axis of all its layers."""
    value = stacks[0].value
    shape = (
        [*value.stack, *value.shape] if isinstance(value, PackedWeight) else value.shape
    )
    if len(stacks) == 1:
        return [*shape]
    return [sum(len(one.layers or ()) for one in stacks), *shape[1:]]


def _flat(stacks: list[_Stack]) -> Any:
    """Returns all values of a parameter in the order of its layers, as one axis."""
    if len(stacks) == 1:
        return _readable(stacks[0].value).reshape(-1)
    rows = {
        layer: row
        for one in stacks
        for layer, row in zip(
            one.layers or (), np.asarray(_readable(one.value)), strict=True
        )
    }
    return np.concatenate([np.ravel(rows[layer]) for layer in sorted(rows)])


def with_scales(mark: str | None, packed: Mapping[str, PackedWeight]) -> str | None:
    """Returns a mark that has the mean scales of some packed weights, by name.

    Weights that are shapes alone have none, nor formats that need not be told apart
    (PackedWeight.mean_scale); the stacks of one weight count as one.
    """
    if mark is None:
        return None
    measured = Scales()
    for name, q in packed.items():
        if not _abstract(q):
            measured.add(located(name)[0], jax.tree.map(_readable, q))
    parts = json.loads(mark)
    parts["scales"] = parts.get("scales", {}) | measured.rounded()
    return json.dumps(parts)


class Scales:
    """The mean scales of packed weights, whose layers come together or one by one."""

    def __init__(self):
        self._means: dict[str, list[tuple[float, int]]] = {}

    def add(self, name: str, q: PackedWeight) -> None:
        """Takes in a weight, or some of its layers, if its format has such a scale."""
        if (mean := q.mean_scale()) is not None:
            one = float(mean), math.prod(q.stack)
            self._means.setdefault(name, []).append(one)

    def __contains__(self, name: str) -> bool:
        """Whether a weight has been taken in."""
        return name in self._means

    def rounded(self, name: str | None = None) -> dict[str, float]:
        """Returns {name of a weight: mean scale}, of one or of all."""
        names = self._means if name is None else [name]
        means = {x: _average(self._means[x]) for x in names}
        return {x: float(f"{mean:.7g}") for x, mean in means.items()}


def _average(means: list[tuple[float, int]]) -> float:
    return sum(mean * count for mean, count in means) / sum(n for _, n in means)


def _readable(value: Any) -> Any:
    """Returns an array that can be computed with, wherever it rests."""
    # What is mapped from a file has no sharding; a streamed base's is the host's.
    sharding = getattr(value, "sharding", None)
    if sharding is not None and sharding.memory_kind == "pinned_host":
        return np.asarray(value)
    return value


def _abstract(q: PackedWeight) -> bool:
    kinds = (jax.core.Tracer, jax.ShapeDtypeStruct)
    return any(isinstance(leaf, kinds) for leaf in jax.tree.leaves(q))


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """Returns how two bases differ, or None when they are the same."""
    if ours["structure"] != theirs["structure"]:
        return (
            f"its base had other parameter shapes (structure {theirs['structure']}, here "
            f"{ours['structure']})"
        )
    # What is quantized in one of them has no sample there.
    common = sorted(ours["sample"].keys() & theirs["sample"].keys())
    a, b = (
        [x for name in common for x in one["sample"][name]] for one in (ours, theirs)
    )
    if len(a) != len(b):
        return f"its mark has {len(b)} sampled values, here are {len(a)}: it is damaged"
    a, b = np.array(a, np.float64), np.array(b, np.float64)
    with np.errstate(all="ignore"):  # what is no finite number never agrees
        near = TOLERANCE * np.maximum(np.abs(a), np.abs(b)) + 1e-6
        wrong = ~(np.abs(a - b) <= np.where(np.isfinite(near), near, np.nan))
    if wrong.any():
        return (
            f"its base had other weights: {int(wrong.sum())} of {wrong.size} sampled "
            f"embedding and norm values differ"
        )
    # An adapter that began at zero fits a base however it is held, and has no scales.
    mine, other = ours.get("scales", {}), theirs.get("scales", {})
    common = mine.keys() & other.keys()
    wrong = [
        name
        for name in sorted(common)
        if abs(mine[name] - other[name]) > SCALES_TOLERANCE * abs(other[name])
    ]
    if wrong:
        name = wrong[0]
        return (
            f"its base had other 4-bit weights: the mean absmax of {name} was "
            f"{other[name]:.6g}, here {mine[name]:.6g} ({len(wrong)} of {len(common)} "
            "weights differ)"
        )
    return None
