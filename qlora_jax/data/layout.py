"""Rows to the arrays of a batch."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from qlora_jax.data.tokenize import Row
from qlora_jax.errors import DataError

_NARROW = {np.dtype(np.float64): np.float32, np.dtype(np.int64): np.int32}


class Extra(NamedTuple):
    """A batch has an array beside tokens and weights for each of these.

    Attributes:
      by_token: Whether each token has one, and not the row.
      shape: Its shape, without an axis of tokens.
      dtype: Its type; of 64 bits are made 32.
    """

    by_token: bool
    shape: tuple[int, ...]
    dtype: np.dtype


class Layout:
    """Lays rows into batches, and knows what all batches of one dataset have in common.

    Attributes:
      pairs: Whether each row has another beside it, which is laid directly after it.
      extras: What else a batch has, by name.
      sizes: Tokens of each row, or of the longer one of its pair, int32 (rows,).
      tokens: Tokens of each row, or of both rows of its pair, int32 (rows,).
    """

    def __init__(self, rows: Sequence[Row]):
        """Looks through the rows.

        Raises:
          DataError: only some are pairs, or an extra differs between rows.
        """
        count = len(rows)
        self.sizes = np.fromiter((len(row.tokens) for row in rows), np.int32, count)
        self.tokens = self.sizes
        others = sum(row.other is not None for row in rows)
        self.pairs = others > 0
        if self.pairs:
            if others < count:
                raise DataError(
                    f"{count - others} of {count} rows have no row beside them and the "
                    "others have; expected pairs alone, or none"
                )
            beside = np.fromiter(
                (len(row.other.tokens) for row in rows if row.other), np.int32, count
            )
            self.tokens = self.sizes + beside
            self.sizes = np.maximum(self.sizes, beside)
        self.extras = _extras(rows)

    @property
    def width(self) -> int:
        """Rows of a batch that a row of the dataset takes."""
        return 2 if self.pairs else 1

    def lay(
        self, units: Sequence[Sequence[Row]], slots: int, length: int, *, packed: bool
    ) -> dict[str, np.ndarray]:
        """Makes the arrays of a batch; see `Batch` in objectives/base.py for their rules.

        Args:
          units: The documents of each row.
          slots: Rows, of which those that are left are empty.
          length: Tokens of a row, padded right.
          packed: Whether there are to be positions and segments, and the first token of a
            document weighs nothing.
        """
        shape = (slots * self.width, length)
        batch = {
            "tokens": np.zeros(shape, np.int32),
            "weights": np.zeros(shape, np.float32),
        }
        for name, extra in self.extras.items():
            axes = shape if extra.by_token else shape[:1]
            batch[name] = np.zeros((*axes, *extra.shape), extra.dtype)
        along = np.arange(length, dtype=np.int32)
        if packed:
            batch["positions"] = np.tile(along, (shape[0], 1))
            batch["segment_ids"] = np.zeros(shape, np.int32)
        for i, unit in enumerate(units):
            start = 0
            for number, row in enumerate(unit, 1):
                end = start + len(row.tokens)
                self._put(batch, i * self.width, start, row)
                if self.pairs and row.other is not None:
                    self._put(batch, i * self.width + 1, start, row.other)
                if packed:
                    batch["weights"][i, start] = 0
                    batch["positions"][i, start:end] = along[: end - start]
                    batch["segment_ids"][i, start:end] = number
                start = end
            if packed:
                batch["positions"][i, start:] = along[: length - start]
        return batch

    def _put(
        self, batch: Mapping[str, np.ndarray], at: int, start: int, row: Row
    ) -> None:
        end = start + len(row.tokens)
        batch["tokens"][at, start:end] = row.tokens
        batch["weights"][at, start:end] = row.weights
        for name, extra in self.extras.items():
            if name in row.extras:
                where = (at, slice(start, end)) if extra.by_token else at
                batch[name][where] = row.extras[name]


def _extras(rows: Sequence[Row]) -> dict[str, Extra]:
    """Returns what else of rows a batch has.

    Raises:
      DataError: one differs between rows.
    """
    found: dict[str, Extra] = {}
    for row in rows:
        for one in (row,) if row.other is None else (row, row.other):
            for name, value in one.extras.items():
                value = np.asarray(value)
                dtype = np.dtype(_NARROW.get(value.dtype, value.dtype))
                extra = Extra(value.ndim > 0, value.shape[1:], dtype)
                if found.setdefault(name, extra) != extra:
                    raise DataError(
                        f"rows have {name!r} in different forms: {found[name]} and {extra}"
                    )
    return found


def padded_length(longest: int, max_tokens: int) -> int:
    """Returns the length to pad rows to that come as they were drawn.

    Multiples of 32 up to 128, then of an eighth to a quarter of the length.
    """
    step = 32
    while step * 4 < longest:
        step *= 2
    return max(longest, min(-(-longest // step) * step, max_tokens))
