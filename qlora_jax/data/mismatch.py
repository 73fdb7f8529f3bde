"""Answers to other prompts, which judged rows are compared with."""

from collections.abc import Sequence

import numpy as np

from qlora_jax.data.tokenize import Row
from qlora_jax.errors import DataError


def mismatched(rows: Sequence[Row], limit: int) -> list[Row]:
    """Returns judged rows, each with its prompt and the answer of another beside it.

    The other is the last row before it that has another prompt, so that what is beside a row
    does not depend on the order in which rows are drawn.

    Raises:
      DataError: all rows have one prompt.
    """
    ends = [int(np.argmax(row.weights > 0)) for row in rows]
    names = [row.tokens[:end].tobytes() for row, end in zip(rows, ends, strict=True)]
    if len(set(names)) < 2:
        raise DataError(
            "all rows have the same prompt, and --objective kto compares with answers to "
            "other prompts; give it rows of several"
        )
    last, before = len(rows) - 1, 0
    while names[last] == names[0]:
        last -= 1
    before, made = last, []
    for i, row in enumerate(rows):
        if i and names[i - 1] != names[i]:
            before = i - 1
        other, end = rows[before], ends[i]
        start = ends[before]
        tokens = np.concatenate([row.tokens[:end], other.tokens[start:]])[:limit]
        weights = np.concatenate([0 * row.weights[:end], other.weights[start:]])[:limit]
        made.append(row._replace(other=Row(tokens, weights, end, other.answer)))
    return made
