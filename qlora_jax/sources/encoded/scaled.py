"""A weight of 8-bit values, each block, row or the whole of which has a scale.

Of FP8 folders (quant_method fp8: releases of Qwen3 and DeepSeek V3) it is M.weight in
float8_e4m3fn and M.weight_scale_inv, by which it is multiplied in float32, whatever the name
says. Source: transformers 5.24, integrations/finegrained_fp8.py, Fp8Dequantize; blocks at the
end of a row or column may be smaller, as DeepSeek's own kernel has them.

compressed-tensors has M.weight, float8 or int8, M.weight_scale, and M.weight_zero_point where
it is not symmetric, and computes in the dtype of the scale. Source: compressed-tensors 0.20,
quantization/lifecycle/forward_helpers.py.
"""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from qlora_jax.errors import CheckpointError
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
    matrix,
    scales_of,
)
from qlora_jax.sources.safetensors import TensorInfo

_POWERS = (np.dtype(ml_dtypes.float8_e8m0fnu), np.dtype(np.uint8))
_SCALES = ("weight_scale_inv", "weight_scale")


def _belongs(parts: Mapping[str, TensorInfo]) -> bool:
    own = parts.get("weight")
    return any(end in parts for end in _SCALES) or (
        own is not None and own.dtype in FLOAT8
    )


def _fp8(parts: Parts, settings: Settings) -> Measured:
    return _measured(parts, settings, FLOAT8, (*FLOATS, *_POWERS))


def _eight_bits(parts: Parts, settings: Settings) -> Measured:
    return _measured(parts, settings, (*FLOAT8, np.dtype(np.int8)), FLOATS)


def _measured(
    parts: Parts,
    settings: Settings,
    values: tuple[np.dtype, ...],
    scales: tuple[np.dtype, ...],
) -> Measured:
    weight, found = parts["weight"], [parts[end] for end in _SCALES if end in parts]
    shape = matrix(weight, values)
    if len(found) != 1:
        what = "has two scales" if found else "has no scale"
        raise CheckpointError(
            f"{weight.name} {what}, expected one of {', '.join(_SCALES)}"
        )
    scale, zero = found[0], parts.get("weight_zero_point")
    check(scale, scales, scale.info.shape)
    block = block_of(scale, shape, settings.blocks)
    if zero is not None:
        check(zero, (np.int8,), scale.info.shape)
    # An FP8 folder's is rounded to the dtype of the model alone.
    inner = FLOATS[0] if _POWERS[0] in scales else scale.info.dtype
    return Measured(
        shape, inner, lambda: _decode(weight, scale, zero, shape, block, inner)
    )


def _decode(
    weight: Part,
    scale: Part,
    zero: Part | None,
    shape: tuple[int, int],
    block: tuple[int, int],
    dtype: np.dtype,
) -> np.ndarray:
    codes, scales = weight.read(), scales_of(scale)
    octets = np.arange(256, dtype=np.uint8)
    table = octets.view(codes.dtype).astype(np.float32)  # quicker than to convert each
    zeros = None if zero is None else zero.read()

    def piece(rows: slice) -> np.ndarray:
        values = table[codes[rows].view(np.uint8)]
        if zeros is not None:
            blend(np.subtract, values, zeros, rows, shape, block)
        blend(np.multiply, values, scales, rows, shape, block)
        return values

    return by_rows(shape, dtype, piece)


FP8 = Form("FP8", ("weight",), _SCALES, _belongs, _fp8)
EIGHT_BITS = Form(
    "8-bit", ("weight",), (*_SCALES[1:], "weight_zero_point"), _belongs, _eight_bits
)
