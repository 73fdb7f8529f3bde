"""AWQ: 4-bit integers packed along the rows of a linear, eight a word in an order of its own.

M.qweight holds a linear transposed, (k, n / 8); M.scales (groups, n), M.qzeros (groups, n / 8),
packed alike. A value is (code - zero) * scale in the dtype of the scale. Source: AutoAWQ 0.2.9,
utils/packing_utils.py, whose version "gemm" this is.
"""

import numpy as np

from qlora_jax.errors import CheckpointError
from qlora_jax.sources.encoded.form import (
    FLOATS,
    Form,
    Measured,
    Parts,
    Settings,
    blend,
    by_rows,
    check,
    fields,
    matrix,
    scales_of,
)

_FIELD = (0, 4, 1, 5, 2, 6, 3, 7)
"""Each of eight rows is in this field of a word."""


def _measure(parts: Parts, settings: Settings) -> Measured:
    codes, scale, zero = parts["qweight"], parts["scales"], parts["qzeros"]
    k, words = matrix(codes, (np.int32,))
    groups, n = matrix(scale, FLOATS)
    if n != 8 * words or k % groups:
        raise CheckpointError(
            f"{codes.name} has shape {codes.info.shape} and {scale.name} {scale.info.shape}, "
            "expected (k, n / 8) and (groups, n), k a multiple of the groups"
        )
    check(zero, (np.int32,), (groups, words))
    return Measured(
        (n, k), scale.info.dtype, lambda: _decode(parts, (n, k), k // groups)
    )


def _decode(parts: Parts, shape: tuple[int, int], size: int) -> np.ndarray:
    scale, words = parts["scales"], parts["qweight"].read()
    scales, zeros = scales_of(scale).T, _codes(parts["qzeros"].read())

    def piece(rows: slice) -> np.ndarray:
        values = _codes(words[:, rows.start // 8 : rows.stop // 8])
        blend(np.subtract, values, zeros, rows, shape, (1, size))
        blend(np.multiply, values, scales, rows, shape, (1, size))
        return values

    return by_rows(shape, scale.info.dtype, piece)


def _codes(words: np.ndarray) -> np.ndarray:
    """Returns the codes of some words, (rows, 8 * words) of them, transposed; float32."""
    each = fields(words, 4).reshape(len(words), -1, 8)[..., _FIELD]
    return each.reshape(len(words), -1).T.astype(np.float32, order="C")


AWQ = Form("AWQ", ("qweight", "qzeros", "scales"), (), lambda infos: True, _measure)
