"""bitsandbytes' keys of a 4-bit weight, to arrays and back.

Keys of a weight P: `P` (packed bytes, in any storage dtype), `P.absmax`, `P.quant_map`,
with double quantization `P.nested_absmax` and `P.nested_quant_map`, and
`P.quant_state.bitsandbytes__nf4`, JSON as bytes.
Source: bitsandbytes functional.py, QuantState.as_dict and from_dict.
"""

import json
import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from pallas_kernels.formats.absmax4.codebook import (
    ABSMAX_BLOCK_SIZE,
    BLOCK_SIZES,
    CODEBOOKS,
    Codebook,
    dynamic_map,
    values,
)
from pallas_kernels.formats.base import FormatError

logger = logging.getLogger(__name__)

STATE = ".quant_state.bitsandbytes__"
MARK = ".absmax"
PARTS = (
    r"\.absmax|\.quant_map|\.nested_absmax|\.nested_quant_map|"
    r"\.quant_state\.bitsandbytes__.*"
)


_MAX_STATE_BYTES = 10_000
_MAX_AXES, _MAX_AXIS = 8, 2**40


class Stored(NamedTuple):
    """What bitsandbytes' entries of one weight hold.

    Attributes:
      packed: uint8 (ceil(size/2),), the first element of a byte in its high nibble.
      scales: `absmax`, or `absmax_codes`, `absmax_scale` and `absmax_offset`; flat as read, in
        any shape to write.
      shape: Shape of the weight.
      block_size: Elements that share one absmax.
      codebook: 'nf4', 'fp4' or 'int4'.
      dtype: Name of the dtype that the weight stands for.
    """

    packed: np.ndarray
    scales: dict[str, np.ndarray]
    shape: tuple[int, ...]
    block_size: int
    codebook: Codebook
    dtype: str


def read(tensors: Mapping[str, np.ndarray], name: str) -> Stored:
    """Reads the entries of one weight.

    Raises:
      FormatError: a key is missing, or the state is not one we know.
    """
    kind, state = _read_state(tensors, name)
    shape = tuple(state["shape"])
    block_size = int(state["blocksize"])
    table = _get(tensors, f"{name}.quant_map")
    if not np.array_equal(table, values(kind)):
        raise FormatError(f"{name}: its quant_map is not that of {kind}")
    packed = np.ascontiguousarray(_get(tensors, name)).reshape(-1).view(np.uint8)
    size = -(-math.prod(shape) // 2)
    if packed.size < size:
        raise FormatError(f"{name}: {packed.size} bytes, shape {shape} needs {size}")
    absmax = _get(tensors, f"{name}.absmax")
    wanted = np.uint8 if "nested_offset" in state else np.floating
    if not np.issubdtype(absmax.dtype, wanted):
        raise FormatError(
            f"{name}: its absmax is {absmax.dtype}, expected {wanted.__name__}"
        )
    blocks = -(-math.prod(shape) // block_size)
    if absmax.size != blocks:
        raise FormatError(f"{name}: {absmax.size} absmax values, expected {blocks}")
    scales = _read_absmax(tensors, name, state, absmax.reshape(-1))
    if not all(np.isfinite(array).all() for array in scales.values()):
        raise FormatError(f"{name}: NaN or Inf in its absmax")
    return Stored(packed[:size], scales, shape, block_size, kind, state["dtype"])


def _read_absmax(
    tensors: Mapping[str, np.ndarray], name: str, state: dict, absmax: np.ndarray
) -> dict[str, np.ndarray]:
    if "nested_offset" not in state:
        return {"absmax": absmax.astype(np.float32)}
    scale = _get(tensors, f"{name}.nested_absmax").reshape(-1)
    table = _get(tensors, f"{name}.nested_quant_map").reshape(-1)
    nested_block, offset = state.get("nested_blocksize"), state["nested_offset"]
    largest = float(np.finfo(np.float32).max)
    if type(offset) not in (int, float) or not abs(offset) < largest:
        raise FormatError(f"{name}: its nested_offset is {offset!r:.80}")
    if type(nested_block) is not int or not 1 <= nested_block <= _MAX_AXIS:
        raise FormatError(f"{name}: its nested_blocksize is {nested_block!r:.80}")
    if table.size != 256 or not np.issubdtype(table.dtype, np.floating):
        raise FormatError(
            f"{name}: its nested_quant_map has {table.size} values of {table.dtype}, "
            "expected 256 floats"
        )
    if not np.issubdtype(scale.dtype, np.floating):
        raise FormatError(
            f"{name}: its nested_absmax is {scale.dtype}, expected floats"
        )
    with np.errstate(over="ignore"):  # what is infinite is refused below
        scale = scale.astype(np.float32)
    offset = np.asarray(float(offset), np.float32)
    scales = -(-absmax.size // nested_block)
    if scale.size != scales:
        raise FormatError(
            f"{name}: {scale.size} nested_absmax values, expected {scales}"
        )
    if np.array_equal(table, dynamic_map()) and nested_block == ABSMAX_BLOCK_SIZE:
        return {"absmax_codes": absmax, "absmax_scale": scale, "absmax_offset": offset}
    # Made with another map (old versions differ in last bits): only decoding it here
    # keeps its values exactly.
    logger.warning("%s: uncommon nested_quant_map; absmax is kept as float32", name)
    spread = scale[np.arange(absmax.size) // nested_block]
    with np.errstate(over="ignore", invalid="ignore"):
        return {"absmax": (table[absmax] * spread + offset).astype(np.float32)}


def write(stored: Stored, name: str) -> dict[str, np.ndarray]:
    """Returns the entries of one weight as bitsandbytes would save it."""
    scales, kind = stored.scales, stored.codebook
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": stored.block_size,
        "dtype": stored.dtype,
        "shape": list(stored.shape),
    }
    entries = {name: stored.packed.reshape(-1, 1), f"{name}.quant_map": values(kind)}
    if "absmax" in scales:
        entries[f"{name}.absmax"] = scales["absmax"].reshape(-1)
    else:
        state |= {
            "nested_blocksize": ABSMAX_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": float(scales["absmax_offset"]),
        }
        entries[f"{name}.absmax"] = scales["absmax_codes"].reshape(-1)
        entries[f"{name}.nested_absmax"] = scales["absmax_scale"]
        entries[f"{name}.nested_quant_map"] = dynamic_map()
    text = json.dumps(state).encode()
    entries[f"{name}{STATE}{kind}"] = np.frombuffer(text, np.uint8)
    return entries


def stored_block_size(tensors: Mapping[str, np.ndarray]) -> int:
    """Returns the block size of a file's 4-bit weights: that of the first.

    64 where no weight says it: reading the weights themselves finds what is wrong.
    """
    for name in tensors:
        if STATE in name:
            state = _parsed(tensors, name)
            size = None if state is None else state.get("blocksize")
            return size if type(size) is int and size in BLOCK_SIZES else 64
    return 64


def _read_state(
    tensors: Mapping[str, np.ndarray], name: str
) -> tuple[Codebook, dict[str, Any]]:
    for kind in CODEBOOKS:
        if f"{name}{STATE}{kind}" in tensors:
            state = _parsed(tensors, f"{name}{STATE}{kind}")
            break
    else:
        raise FormatError(f"{name}: no {STATE[1:]}* entry for a known codebook")
    if state is None:
        raise FormatError(f"{name}: its quant_state is not JSON with an object")
    if missing := {"shape", "blocksize", "dtype", "quant_type"} - state.keys():
        raise FormatError(f"{name}: its quant_state lacks {', '.join(sorted(missing))}")
    if state["quant_type"] != kind:
        raise FormatError(
            f"{name}: its quant_type is {state['quant_type']!r:.80}, not {kind}"
        )
    if type(state["blocksize"]) is not int or state["blocksize"] not in BLOCK_SIZES:
        raise FormatError(f"{name}: its blocksize is {state['blocksize']!r:.80}")
    if state["dtype"] not in ("bfloat16", "float16", "float32"):
        raise FormatError(f"{name}: its dtype is {state['dtype']!r:.80}")
    shape = state["shape"]
    sizes = isinstance(shape, list) and all(type(i) is int and i > 0 for i in shape)
    if not sizes or not 1 <= len(shape) <= _MAX_AXES or max(shape) > _MAX_AXIS:
        raise FormatError(f"{name}: its shape is {shape!r:.80}")
    return kind, state


def _parsed(tensors: Mapping[str, np.ndarray], key: str) -> dict[str, Any] | None:
    """Returns the object that an entry holds as JSON; None where it holds none."""
    text = np.asarray(tensors[key]).tobytes()
    if len(text) > _MAX_STATE_BYTES:
        return None
    try:
        state = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return state if isinstance(state, dict) else None


def _get(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in tensors:
        raise FormatError(f"{name} is missing")
    return np.asarray(tensors[name])
