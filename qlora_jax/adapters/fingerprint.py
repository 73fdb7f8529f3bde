"""What tells one base from another, whether dense or quantized.

Two parts: the shapes of all parameters, and a sample of values that quantization leaves
alone (embedding, norms, biases). The sample is compared to within the rounding of a
16-bit copy, so that an adapter trained on NF4 weights fits their original.
"""

import hashlib
import json

import jax
import jax.core
import numpy as np
from flax import nnx

from qlora_jax.nn import FrozenParam
from qlora_jax.nn.linear import stack_of
from qlora_jax.quant import Quantized

_SAMPLES = 8  # of a parameter
TOLERANCE = 2**-7
"""Relative; two roundings to bfloat16 differ by at most 2**-8."""


def fingerprint(model: nnx.Module) -> str | None:
    """Returns a JSON object with `structure` (hex) and `sample` ({name: floats}).

    None while the model is abstract (inside jit or eval_shape). Quantized and dense
    copies of one base have the same structure.
    """
    shapes, values = [], {}
    for path, variable in nnx.to_flat_state(nnx.state(model, FrozenParam)):
        value = variable.get_value()
        if isinstance(value, Quantized):
            shape = [*stack_of(value), *value.shape]
            shapes.append([".".join(map(str, path)), shape])
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
        # What is mapped from a file has no sharding; a streamed base's is the host's.
        sharding = getattr(value, "sharding", None)
        if sharding is not None and sharding.memory_kind == "pinned_host":
            value = np.asarray(value)
        values[".".join(map(str, path))] = value.reshape(-1)
    structure = hashlib.sha256(json.dumps(sorted(shapes)).encode()).hexdigest()[:16]
    sample = {}
    for name, flat in values.items():
        index = np.linspace(0, flat.size - 1, _SAMPLES + 2, dtype=np.int64)[1:-1]
        sample[name] = [float(f"{v:.5g}") for v in np.asarray(flat[index], np.float64)]
    return json.dumps({"structure": structure, "sample": sample})


def difference(ours: dict, theirs: dict) -> str | None:
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
    return None
