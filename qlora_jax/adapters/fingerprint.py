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
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.layout import QuantizedTensor
from pallas_kernels.reference import decode_absmax
from qlora_jax.nn import FrozenParam
from qlora_jax.nn.linear import stack_of
from qlora_jax.quant import Quantized

_SAMPLES = 8  # of a parameter
TOLERANCE = 2**-7
"""Relative; two roundings to bfloat16 differ by at most 2**-8."""
SCALES_TOLERANCE = 1e-4
"""Relative, of a mean absmax: one base quantized on two devices agrees to 1e-6 or so."""


def fingerprint(model: nnx.Module, *, scales: bool = False) -> str | None:
    """Returns a JSON object with `structure` (hex) and `sample` ({name: floats}).

    None while the model is abstract (inside jit or eval_shape). Quantized and dense
    copies of one base have the same structure. With `scales` the object has these too:
    {name of a 4-bit weight: mean absmax}, of those that are no shapes alone.
    """
    shapes, values, packed = [], {}, {}
    for path, variable in nnx.to_flat_state(nnx.state(model, FrozenParam)):
        value = variable.get_value()
        if isinstance(value, Quantized):
            name = ".".join(map(str, path))
            shapes.append([name, [*stack_of(value), *value.shape]])
            if isinstance(value, QuantizedTensor):
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


def with_scales(mark: str | None, packed: Mapping[str, QuantizedTensor]) -> str | None:
    """Returns a mark that has the scales of some 4-bit weights, by name.

    Weights that are shapes alone have none.
    """
    if mark is None:
        return None
    measured = Scales()
    for name, q in packed.items():
        if not _abstract(q):
            measured.add(name, jax.tree.map(_readable, q))
    parts = json.loads(mark)
    parts["scales"] = parts.get("scales", {}) | measured.rounded()
    return json.dumps(parts)


class Scales:
    """The mean absmax of 4-bit weights, whose layers come together or one by one."""

    def __init__(self):
        self._means: dict[str, list[float]] = {}

    def add(self, name: str, q: QuantizedTensor) -> None:
        """Takes in a weight, or one of its layers."""
        self._means.setdefault(name, []).append(float(_mean_absmax(q)))

    def rounded(self, name: str | None = None) -> dict[str, float]:
        """Returns {name of a weight: mean absmax}, of one or of all."""
        names = self._means if name is None else [name]
        return {x: float(f"{np.mean(self._means[x]):.7g}") for x in names}


def _readable(value: Any) -> Any:
    """Returns an array that can be computed with, wherever it rests."""
    # What is mapped from a file has no sharding; a streamed base's is the host's.
    sharding = getattr(value, "sharding", None)
    if sharding is not None and sharding.memory_kind == "pinned_host":
        return np.asarray(value)
    return value


def _abstract(q: QuantizedTensor) -> bool:
    kinds = (jax.core.Tracer, jax.ShapeDtypeStruct)
    return any(isinstance(leaf, kinds) for leaf in jax.tree.leaves(q))


@jax.jit
def _mean_absmax(q: QuantizedTensor) -> jax.Array:
    decode = decode_absmax
    for _ in range(q.codes.ndim - (1 if q.layout == "flat" else 2)):
        decode = jax.vmap(decode)
    return jnp.mean(decode(q))


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
