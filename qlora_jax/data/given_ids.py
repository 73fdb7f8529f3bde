"""Rows that were tokenized elsewhere: Hugging Face's labels, TRL's masks, a teacher's
probabilities.

What a teacher says of a row stands beside its ids: `teacher_ids` and `teacher_logprobs`, both
(tokens, k), are for each token the k tokens that the teacher has most probable in its place,
given the tokens before it, and their log-probabilities. The first token's say nothing.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from qlora_jax.data.fields import listed
from qlora_jax.errors import DataError
from qlora_jax.inputs import parse_json


class Ids(NamedTuple):
    """A row that was tokenized elsewhere: its ids, and the weight of each."""

    ids: list[int]
    weights: list[float]


class Taught(NamedTuple):
    """A row with what a teacher says of its tokens: int32 and float32 (tokens, k)."""

    ids: Ids
    teacher_ids: np.ndarray
    teacher_logprobs: np.ndarray


_ROUNDED = 1e-2
"""Rounding in a teacher's file may make the probabilities of a token exceed 1 by so much."""


def taught_of(row: Mapping[str, Any]) -> tuple[Taught, set[str]]:
    """Returns the ids of a row, what a teacher says of them, and the keys that it read.

    Raises:
      DataError: they are no ids, or what the teacher says does not go with them.
    """
    made, used = ids_of(row)
    (ids,) = made
    found = []
    for key, dtype in (("teacher_ids", np.int32), ("teacher_logprobs", np.float32)):
        try:
            value = np.array([list(one) for one in listed(row[key])])
        except (TypeError, ValueError):
            value = np.array(())
        kind = "iu" if key == "teacher_ids" else "iuf"
        if value.ndim != 2 or not value.size or value.dtype.kind not in kind:
            raise DataError(
                f"{key!r} is no table of numbers, the same number of them for each token"
            )
        if len(value) != len(ids.ids):
            raise DataError(f"{key!r} has another number of tokens than 'input_ids'")
        found.append(value.astype(dtype))
    top, logps = found
    if top.shape != logps.shape:
        raise DataError("'teacher_ids' and 'teacher_logprobs' are of different sizes")
    if (top < 0).any() or (np.diff(np.sort(top, axis=1), axis=1) == 0).any():
        raise DataError(
            "'teacher_ids' has a token twice in one place, or what is no id"
        )
    total = np.exp(logps.astype(np.float64)).sum(axis=1)
    if not (total <= 1 + _ROUNDED).all():
        raise DataError(
            "'teacher_logprobs' are no log-probabilities: those of a token exceed 1"
        )
    return Taught(ids, top, logps), used | {"teacher_ids", "teacher_logprobs"}


def ids_of(row: Mapping[str, Any]) -> tuple[list[Ids], set[str]]:
    """Returns the ids and weights of a row, and the keys that it read.

    Raises:
      DataError: they are no ids, or labels and masks that do not go with them.
    """
    ids = _numbers(row, "input_ids")
    if not ids or any(one < 0 or one >= 2**31 for one in ids):
        raise DataError("'input_ids' is empty, or has numbers that are no ids")
    used = {"input_ids", "attention_mask"}
    weights = [1.0] * len(ids)
    if "labels" in row:
        used.add("labels")
        labels = _numbers(row, "labels", len(ids))
        if any(
            label not in (-100, one) for label, one in zip(labels, ids, strict=True)
        ):
            raise DataError(
                "'labels' has ids that are not those of 'input_ids' at the same places; "
                "labels are not shifted, and -100 where nothing is learnt"
            )
        weights = [float(label != -100) for label in labels]
    for key in ("completion_mask", "assistant_masks"):
        if row.get(key) is not None:
            used.add(key)
            mask = _numbers(row, key, len(ids))
            weights = [w * bool(m) for w, m in zip(weights, mask, strict=True)]
    if row.get("attention_mask") is not None:
        shown = _numbers(row, "attention_mask", len(ids))
        kept = [i for i, one in enumerate(shown) if one]
        if kept and kept != list(range(kept[0], kept[-1] + 1)):
            raise DataError("'attention_mask' hides tokens between others")
        ids, weights = [ids[i] for i in kept], [weights[i] for i in kept]
    if not ids:
        raise DataError("'attention_mask' hides every token")
    return [Ids(ids, weights)], used


def _numbers(row: Mapping[str, Any], key: str, count: int | None = None) -> list[int]:
    values = listed(row[key])
    if isinstance(values, str) and values.startswith("["):
        try:
            values = parse_json(values, "a field", error=DataError, strict=False)
        except ValueError:
            pass
    if not isinstance(values, list) or not all(isinstance(one, int) for one in values):
        raise DataError(f"{key!r} is no list of whole numbers")
    if count is not None and len(values) != count:
        raise DataError(f"{key!r} is not as long as 'input_ids'")
    return values
