"""4-bit floats (E2M1), two a byte: NVFP4 and MXFP4 as compressed-tensors packs them.

M.weight_packed has the first of two in a byte's low half. M.weight_scale has one for each
group of a row. In NVFP4 it is float8, and is divided by M.weight_global_scale in float32; in
MXFP4 it is E8M0, a power of two. Either way a weight is bfloat16. Source: compressed-tensors
0.20, compressors/nvfp4, mxfp4 and mx_utils.
"""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from qlora_jax.sources.encoded.form import (
    FLOAT8,
    FLOATS,
    Form,
    Measured,
    Part,
    Parts,
    Settings,
    blend,
    block_of,
    by_rows,
    check,
    even_groups,
    fields,
    matrix,
    scales_of,
)
from qlora_jax.sources.safetensors import TensorInfo

_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_POSITIVE, *(-x for x in _POSITIVE)], np.float32)
_MADE = np.dtype(ml_dtypes.bfloat16)


def _measure(parts: Parts, settings: Settings) -> Measured:
    packed, scale = parts["weight_packed"], parts["weight_scale"]
    n, octets = matrix(packed, (np.uint8,))
    shape = n, 2 * octets
    whole = parts.get("weight_global_scale")
    if whole is not None and whole.info.shape == ():
        check(whole, (np.float32,), ())
    elif whole is not None:
        check(whole, (np.float32,), (1,))
    powers = (np.uint8, ml_dtypes.float8_e8m0fnu)
    dtypes = powers if whole is None else (*FLOAT8, *FLOATS)
    check(scale, dtypes, scale.info.shape)
    block = block_of(scale, shape, settings.blocks)
    even_groups(scale, shape, block)
    return Measured(shape, _MADE, lambda: _decode(packed, scale, whole, shape, block))


def _decode(
    packed: Part,
    scale: Part,
    whole: Part | None,
    shape: tuple[int, int],
    block: tuple[int, int],
) -> np.ndarray:
    codes, scales = packed.read(), scales_of(scale)
    if whole is not None:
        scales = scales / scales_of(whole, positive=True).reshape(())

    def piece(rows: slice) -> np.ndarray:
        values = _VALUES[fields(codes[rows], 4)]
        blend(np.multiply, values, scales, rows, shape, block)
        return values

    return by_rows(shape, _MADE, piece)


def _belongs(infos: Mapping[str, TensorInfo]) -> bool:
    packed = infos.get("weight_packed")
    return "weight_global_scale" in infos or (
        packed is not None and packed.dtype == np.uint8
    )


FP4 = Form(
    "packed 4-bit floats",
    ("weight_packed", "weight_scale"),
    ("weight_global_scale",),
    _belongs,
    _measure,
)
