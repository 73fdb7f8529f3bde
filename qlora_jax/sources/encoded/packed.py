"""Integers packed into 32-bit words along the rows, as compressed-tensors has them.

M.weight_packed holds unsigned codes, the first in a word's lowest bits: each is a value plus
half of their number. M.weight_scale has one for each group of a row, and M.weight_zero_point
what is taken from values before, packed along the columns (or int8 as it is, in older files).
Columns that were put into groups by their activations have M.weight_g_idx. Source:
compressed-tensors 0.20, compressors/pack_quantized; 0.11, quantization/lifecycle/forward.py
for M.weight_g_idx, which newer versions lack.
"""

import numpy as np

from qlora_jax.errors import CheckpointError
from qlora_jax.sources.encoded.form import (
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
    groups_of,
    matrix,
    scales_of,
)

_NEEDED = ("weight_packed", "weight_scale", "weight_shape")


def _measure(parts: Parts, settings: Settings) -> Measured:
    packed, scale, shape = (
        parts["weight_packed"],
        parts["weight_scale"],
        parts["weight_shape"],
    )
    n, words = matrix(packed, (np.int32,))
    check(shape, (np.int64, np.int32), (2,))
    rows, k = (int(size) for size in shape.read())
    bits = [one for one in settings.bits if words == -(-k * one // 32)]
    if rows != n or k < 1 or not bits:
        known = " or ".join(map(str, settings.bits)) or "no number of"
        raise CheckpointError(
            f"{shape.name} is ({rows}, {k}), and {packed.name} has shape {packed.info.shape}, "
            f"which does not hold so many values of {known} bits"
        )
    check(scale, FLOATS, scale.info.shape)
    block = block_of(scale, (n, k), settings.blocks)
    groups = even_groups(scale, (n, k), block)
    if (zero := parts.get("weight_zero_point")) is not None:
        of_rows = n if block[0] == 1 else 1
        stored = of_rows if zero.info.dtype == np.int8 else -(-of_rows * bits[0] // 32)
        check(zero, (np.int32, np.int8), (stored, groups))
    if (order := parts.get("weight_g_idx")) is not None:
        check(order, (np.int32, np.int64), (k,))
        check(scale, FLOATS, (n, groups))
    decode = _Decode(packed, scale, zero, order, (n, k), block, bits[0])
    return Measured((n, k), scale.info.dtype, decode.weight)


class _Decode:
    """Decodes a weight of packed integers."""

    def __init__(
        self,
        packed: Part,
        scale: Part,
        zero: Part | None,
        order: Part | None,
        shape: tuple[int, int],
        block: tuple[int, int],
        bits: int,
    ):
        self._packed, self._scale, self._zero, self._order = packed, scale, zero, order
        self._shape, self._block, self._bits = shape, block, bits

    def weight(self) -> np.ndarray:
        """Returns the weight, in the dtype of its scales."""
        (n, k), half = self._shape, 1 << (self._bits - 1)
        words, scales = self._packed.read(), scales_of(self._scale)
        zeros, order = self._zeros(), self._columns()

        def piece(rows: slice) -> np.ndarray:
            values = fields(words[rows], self._bits)[:, :k].astype(np.float32)
            values -= half
            for op, each in ((np.subtract, zeros), (np.multiply, scales)):
                if each is not None:
                    blend(op, values, each, rows, self._shape, self._block, order)
            return values

        return by_rows((n, k), self._scale.info.dtype, piece)

    def _zeros(self) -> np.ndarray | None:
        if self._zero is None:
            return None
        stored = self._zero.read()
        if stored.dtype == np.int8:
            return stored
        n = self._shape[0] if self._block[0] == 1 else 1
        codes = fields(stored.T, self._bits)[:, :n].T
        return codes.astype(np.int16) - (1 << (self._bits - 1))

    def _columns(self) -> np.ndarray | None:
        """Returns the group of each column; None where they follow one another."""
        if self._order is None:
            return None
        stored = self._order.read()
        if (stored == -1).any():  # of a weight whose columns were not reordered
            return None
        count = -(-self._shape[1] // self._block[1])
        order = groups_of(self._order, count)
        if len({*np.bincount(order, minlength=count)}) > 1:
            raise CheckpointError(f"{self._order.name} has groups of different sizes")
        return order


PACKED = Form(
    "packed integers",
    _NEEDED,
    ("weight_zero_point", "weight_g_idx"),
    lambda infos: any(end in infos for end in ("weight_packed", "weight_shape")),
    _measure,
)
