"""GPTQ: integers packed into 32-bit words along the columns, in groups of columns.

M.qweight holds a linear transposed, (k * bits / 32, n), the first of the codes in a word's
lowest bits; M.scales (groups, n), M.qzeros (groups, n * bits / 32), packed along the rows.
M.g_idx says which group a column is in. A value is (code - zero) * scale in the dtype of the
scale. The first version stores zero points that are one less; that one is added to whole
words, as their writer took it from them. Source: gptqmodel 7.7, nn_modules/qlinear/__init__.py,
and utils/model.py, convert_gptq_v1_to_v2_format_module.
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
    groups_of,
    matrix,
    scales_of,
)

_ONES = {4: 0x11111111, 8: 0x01010101}
"""A one in each field of a word."""


def _measure(parts: Parts, settings: Settings) -> Measured:
    codes, scale, zero = parts["qweight"], parts["scales"], parts["qzeros"]
    words, n = matrix(codes, (np.int32,))
    groups, columns = matrix(scale, FLOATS)
    have = matrix(zero, (np.int32,))
    bits = [
        one for one in _ONES if have == (groups, n * one // 32) and not n * one % 32
    ]
    if columns != n or not bits:
        raise CheckpointError(
            f"{codes.name} has shape {codes.info.shape}, {scale.name} {scale.info.shape} and "
            f"{zero.name} {have}, expected (k * bits / 32, n), (groups, n) and "
            f"(groups, n * bits / 32) with {' or '.join(map(str, _ONES))} bits"
        )
    k = words * 32 // bits[0]
    if (order := parts.get("g_idx")) is not None:
        check(order, (np.int32, np.int64), (k,))
    sizes = [columns or k for _, columns in settings.blocks]
    if k % groups == 0:
        sizes.append(k // groups)
    sizes = [size for size in sizes if -(-k // size) == groups]
    if order is None and not sizes:
        raise CheckpointError(
            f"{scale.name} has {groups} groups, which does not fit {k} columns"
        )
    if groups > k:
        raise CheckpointError(f"{scale.name} has {groups} groups of {k} columns")
    size = sizes[0] if order is None else 0
    return Measured(
        (n, k),
        scale.info.dtype,
        lambda: _decode(parts, (n, k), bits[0], size, settings.shifted),
    )


def _decode(
    parts: Parts, shape: tuple[int, int], bits: int, size: int, shifted: bool
) -> np.ndarray:
    scale, order = parts["scales"], parts.get("g_idx")
    scales, words = scales_of(scale).T, parts["qweight"].read()
    stored = parts["qzeros"].read().view(np.uint32)
    if shifted:
        stored = stored + np.uint32(_ONES[bits])
    zeros = fields(stored, bits).T.astype(np.float32)
    group = None if order is None else groups_of(order, scales.shape[1])

    def piece(rows: slice) -> np.ndarray:
        values = fields(words[:, rows].T, bits).astype(np.float32)
        blend(np.subtract, values, zeros, rows, shape, (1, size), group)
        blend(np.multiply, values, scales, rows, shape, (1, size), group)
        return values

    return by_rows(shape, scale.info.dtype, piece)


GPTQ = Form(
    "GPTQ",
    ("qweight", "qzeros", "scales"),
    ("g_idx",),
    lambda infos: True,
    _measure,
)
