"""What a form answers for itself, and what forms share: fields of words, scales, pieces."""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

from qlora_jax.errors import CheckpointError
from qlora_jax.sources.safetensors import TensorInfo

FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
FLOATS = tuple(map(np.dtype, (np.float32, ml_dtypes.bfloat16, np.float16)))
"""Dtypes that a scale may have; a decoded weight has that of its scale."""

_PIECE = 1 << 22
"""So many elements of a weight are decoded at once, so that what lies between is small."""


class Part(NamedTuple):
    """An entry of a weight.

    Attributes:
      name: Its key in the file.
      info: Its dtype and shape.
      read: Maps it.
    """

    name: str
    info: TensorInfo
    read: Callable[[], np.ndarray]


Parts = Mapping[str, Part]
"""The entries of one weight, by the ends of their keys."""


class Settings(NamedTuple):
    """What config.json says of all weights of a folder.

    Attributes:
      blocks: Rows and columns that share a scale, each kind that the folder has.
      bits: Bits of a code, each kind that the folder has.
      shifted: Whether zero points are stored as one less than they are.
    """

    blocks: tuple[tuple[int, int], ...] = ()
    bits: tuple[int, ...] = ()
    shifted: bool = False


class Measured(NamedTuple):
    """A weight, as far as the headers of its entries tell.

    Attributes:
      shape, dtype: Of what it is decoded to.
      decode: Reads its entries and returns the weight, or raises CheckpointError.
    """

    shape: tuple[int, int]
    dtype: np.dtype
    decode: Callable[[], np.ndarray]


class Form(NamedTuple):
    """A form in which a linear is stored.

    Attributes:
      called: What tables and messages call it.
      needed, more: Ends of the keys that a weight has in any case, and may have.
      belongs: Whether entries, of which some may be missing, are a weight of this form.
      measure: Says what the entries decode to, or raises CheckpointError.
    """

    called: str
    needed: tuple[str, ...]
    more: tuple[str, ...]
    belongs: Callable[[Mapping[str, TensorInfo]], bool]
    measure: Callable[[Parts, Settings], Measured]


def check(
    part: Part, dtypes: Collection[np.dtype | type], shape: tuple[int, ...]
) -> None:
    """Raises CheckpointError if an entry has another dtype or shape than it must have."""
    named = [np.dtype(one) for one in dtypes]
    have = part.info
    if have.dtype not in named:
        wanted = " or ".join(one.name for one in named)
        raise CheckpointError(f"{part.name} is {have.dtype.name}, expected {wanted}")
    if have.shape != shape:
        raise CheckpointError(f"{part.name} has shape {have.shape}, expected {shape}")


def matrix(part: Part, dtypes: Collection[np.dtype | type]) -> tuple[int, int]:
    """Returns the shape of an entry that has to be a matrix, which is not empty."""
    shape = part.info.shape
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"{part.name} has shape {shape}, expected a matrix")
    check(part, dtypes, shape)
    return shape[0], shape[1]


def block_of(
    scale: Part, shape: tuple[int, int], blocks: Collection[tuple[int, int]]
) -> tuple[int, int]:
    """Returns how many rows and columns of a weight share each of its scales.

    Args:
      scale: The scales: one of the whole, one of each row, or one of each block.
      shape: The shape of the weight.
      blocks: Sizes that a block may have; those at the end of a row or column are smaller.
    """
    have, (n, k) = scale.info.shape, shape
    if have in ((), (1,), (1, 1)):
        return n, k
    for rows, columns in blocks:
        if have == (-(-n // rows), -(-k // columns)):
            return rows, columns
    if have in ((n,), (n, 1)):
        return 1, k
    known = ", ".join(f"{rows} x {columns}" for rows, columns in blocks) or "none"
    raise CheckpointError(
        f"{scale.name} has shape {have}, which does not fit a weight of shape {shape}: "
        f"expected one scale, one of each row, or one of each block (config.json: {known})"
    )


def even_groups(scale: Part, shape: tuple[int, int], block: tuple[int, int]) -> int:
    """Returns how many groups of one size a row has, whose scales these are.

    Raises:
      CheckpointError: they are scales of blocks of rows, or groups of different sizes.
    """
    rows, columns = block
    if (rows > 1 and columns < shape[1]) or shape[1] % columns:
        raise CheckpointError(
            f"{scale.name} has shape {scale.info.shape}, for blocks of {rows} x {columns}: "
            f"expected groups of one size within a row of {shape[1]}"
        )
    return shape[1] // columns


def scales_of(part: Part, *, positive: bool = False) -> np.ndarray:
    """Reads scales as float32, E8M0 as the powers of two that it stands for.

    Raises:
      CheckpointError: they are not finite, or not above 0 where they have to be.
    """
    stored = part.read()
    if stored.dtype == np.uint8:
        stored = stored.view(ml_dtypes.float8_e8m0fnu)
    values = stored.astype(np.float32)
    if not np.isfinite(values).all():
        raise CheckpointError(f"{part.name} has NaN or Inf values")
    if positive and not (values > 0).all():
        raise CheckpointError(f"{part.name} has values that are not above 0")
    return values


def blend(
    op: np.ufunc,
    values: np.ndarray,
    each: np.ndarray,
    rows: slice,
    shape: tuple[int, int],
    block: tuple[int, int],
    order: np.ndarray | None = None,
) -> None:
    """Applies np.multiply or np.subtract to some rows of a weight, in place.

    Args:
      op: The operation; its second operand is a block's.
      values: The rows.
      each: A value for each block of the whole.
      rows: Which rows they are.
      shape, block: Of the weight, and of a block.
      order: The group of each column, where blocks are not of neighbours; each of them is
        within a row then, and `each` a matrix.
    """
    if order is not None:
        op(values, np.take(each[rows], order, axis=1), out=values)
        return
    grid = each.reshape(-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    those = grid[np.arange(rows.start, rows.stop) // block[0]]
    if shape[1] % block[1]:
        op(values, np.repeat(those, block[1], axis=1)[:, : shape[1]], out=values)
    else:
        apart = values.reshape(len(values), -1, block[1])
        op(apart, those[..., None], out=apart)


def fields(words: np.ndarray, bits: int) -> np.ndarray:
    """Returns the codes in the words of each row, the lowest bits of a word first; uint8."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return octets
    codes = np.empty((*octets.shape, 8 // bits), np.uint8)
    for i in range(8 // bits):
        np.right_shift(octets, i * bits, out=codes[..., i])
    codes &= np.uint8((1 << bits) - 1)
    return codes.reshape(*octets.shape[:-1], -1)


def by_rows(
    shape: tuple[int, int], dtype: np.dtype, piece: Callable[[slice], np.ndarray]
) -> np.ndarray:
    """Makes a weight some rows at a time, a multiple of 8 but for the last of them.

    Args:
      shape, dtype: Of the weight.
      piece: Returns rows of it, float32, which are rounded once.
    """
    made = np.empty(shape, dtype)
    step = max(1, _PIECE // shape[1] // 8) * 8
    # What is too large for the dtype becomes Inf, which whoever asked for the weight refuses.
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, shape[0], step):
            rows = slice(start, min(start + step, shape[0]))
            made[rows] = piece(rows)
    return made


def groups_of(part: Part, count: int) -> np.ndarray:
    """Reads which group each column belongs to.

    Raises:
      CheckpointError: there is no such group.
    """
    order = part.read().astype(np.int64)
    if order.size and not (order.min() >= 0 and order.max() < count):
        raise CheckpointError(
            f"{part.name} has groups from {order.min()} to {order.max()}, and there are {count}"
        )
    return order
