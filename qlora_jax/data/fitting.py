"""Rows longer than a run's rows may be: cut, split or left out."""

from collections.abc import Sequence
from typing import NamedTuple, get_args

import numpy as np

from qlora_jax.config.data import DataConfig, TooLong
from qlora_jax.data.tokenize import Row
from qlora_jax.errors import DataError


class Taken(NamedTuple):
    """A run takes these of a source's rows, and says what became of the others.

    Attributes:
      rows: The rows within the length that have something to learn.
      cut: The number of rows that were cut, those that were then left out as empty
        included.
      split: The number of rows that were split.
      long: The number of rows that were left out for their length.
      refused: The number of rows that are too long, where that is an error.
      empty: The number of rows, or parts of them, that were left out since nothing of them
        trains.
    """

    rows: list[Row]
    cut: int
    split: int
    long: int
    refused: int
    empty: int


def taken(rows: Sequence[Row], name: str, config: DataConfig) -> Taken:
    """Cuts rows, splits them, or leaves them out, as the settings say.

    Args:
      rows: The rows of a source.
      name: The source's name.
      config: max_tokens and too_long.

    Raises:
      DataError: rows are to be split that count as a whole.
    """
    limit = config.max_tokens
    within = [row for row in rows if size_of(row) <= limit]
    long = len(rows) - len(within)
    if config.too_long == "truncate":
        within = [_part(row, 0, limit) for row in rows]
    if config.too_long == "split" and long:
        within = [part for row in rows for part in _parts(row, limit, name)]
    useful = [row for row in within if _trains(row)]
    counts = {way: long if way == config.too_long else 0 for way in get_args(TooLong)}
    return Taken(
        useful,
        counts["truncate"],
        counts["split"],
        counts["drop"],
        counts["error"],
        len(within) - len(useful),
    )


def size_of(row: Row) -> int:
    """Returns the tokens of a row, or of the longer one of a pair."""
    other = 0 if row.other is None else len(row.other.tokens)
    return max(len(row.tokens), other)


def _trains(row: Row) -> bool:
    other = row.other is not None and bool(row.other.weights[1:].any())
    return other or bool(row.weights[1:].any())


def _part(row: Row, start: int, end: int) -> Row:
    """Returns what a row has from one token up to another."""
    if start == 0 and size_of(row) <= end:
        return row
    extras = {
        name: value[start:end] if np.ndim(value) else value
        for name, value in row.extras.items()
    }
    other = None if row.other is None else _part(row.other, start, end)
    return row._replace(
        tokens=row.tokens[start:end],
        weights=row.weights[start:end],
        other=other,
        extras=extras,
    )


def _parts(row: Row, limit: int, name: str) -> list[Row]:
    """Splits a row into the fewest parts within a length, all of nearly the same."""
    size = size_of(row)
    count = -(-size // limit)
    if count == 1:
        return [row]
    whole = [key for key, value in row.extras.items() if not np.ndim(value)]
    if row.other is not None or whole:
        what = "pairs" if row.other is not None else f"rows with {whole[0]!r}"
        raise DataError(
            f"{name}: {what} count as a whole and cannot be split (--data.too-long split); "
            "raise --data.max-tokens, or choose drop or truncate"
        )
    ends = [size * i // count for i in range(count + 1)]
    parts = []
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        answers = start <= row.prompt < end
        parts.append(
            _part(row, start, end)._replace(
                prompt=min(max(row.prompt - start, 0), end - start),
                answer=row.answer if answers else "",
            )
        )
    return parts
