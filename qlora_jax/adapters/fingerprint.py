"""What tells one base from another, whether dense or quantized.

Two parts: the shapes of all parameters, and a sample of values that quantization leaves
alone (embedding, norms, biases). The sample is compared to within the rounding of a
16-bit copy, so that an adapter trained on NF4 weights fits their original.

An adapter that holds a part of its base (LoRAConfig.init) fits that 4-bit base alone. Its
mark has a third part, which tells 4-bit copies apart: the mean absmax of each weight.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import numpy as np
from flax import nnx

from pallas_kernels.formats import PackedWeight
from qlora_jax.nn import FrozenParam

_SAMPLES = 8  # of a parameter
TOLERANCE = 2**-7
"""Relative; two roundings to bfloat16 differ by at most 2**-8."""
SCALES_TOLERANCE = 1e-4
"""Relative, of a mean absmax: one base quantized on two devices agrees to 1e-6 or so."""


def fingerprint(model: nnx.Module, *, scales: bool = False) -> str | None:
    """Returns a JSON object with `structure` (hex) and `sample` ({name: floats}).

    None while the model is abstract (inside jit or eval_shape). PackedWeight and dense
    copies of one base have the same structure. With `scales` the object has these too:
    {name of a 4-bit weight: mean absmax}.
    """
    shapes, values, packed = [], {}, {}
    for path, variable in nnx.to_flat_state(nnx.state(model, FrozenParam)):
        value = variable.get_value()
        if isinstance(value, PackedWeight):
            name = ".".join(map(str, path))
            shapes.append([name, [*value.stack, *value.shape]])
            packed[name] = value
            continue
        # Rows that were added for new tokens are no part of the base.
        own = variable.get_metadata().get("own_rows")
        value = value if own is None else value[:own]
        shapes.append([".".join(map(str, path)), list(value.shape)])
        # Kernels may be quantized elsewhere, so only what never is takes part.
        if path[-1] == "kernel":
            continue
        if isinstance(value, (jax.core.Tracer, jax.ShapeDtypeStruct)):
            return None
        values[".".join(map(str, path))] = _readable(value).reshape(-1)
    structure = hashlib.sha256(json.dumps(sorted(shapes)).encode()).hexdigest()[:16]
    sample = {}
    for name, flat in values.items():
        index = np.linspace(0, flat.size - 1, _SAMPLES + 2, dtype=np.int64)[1:-1]
        sample[name] = [float(f"{v:.5g}") for v in np.asarray(flat[index], np.float64)]
    mark = json.dumps({"structure": structure, "sample": sample})
    return with_scales(mark, packed) if scales else mark


def with_scales(mark: str | None, packed: Mapping[str, PackedWeight]) -> str | None:
    """Returns a mark that has the mean scales of some packed weights, by name.

    Formats that need not be told apart (PackedWeight.mean_scale) have none.
    """
    if mark is None or any(map(_abstract, packed.values())):
        return None
    parts, rounded = json.loads(mark), {}
    for name, weight in packed.items():
        scale = jax.tree.map(_readable, weight).mean_scale()
        if scale is not None:
            rounded[name] = float(f"{float(scale):.7g}")
    parts["scales"] = parts.get("scales", {}) | rounded
    return json.dumps(parts)


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
        np.concatenate([x["sample"][name] for name in common] or [np.zeros(0)])
        for x in (ours, theirs)
    )
    wrong = np.abs(a - b) > TOLERANCE * np.maximum(np.abs(a), np.abs(b)) + 1e-6
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
