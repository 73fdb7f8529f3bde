"""Rows that were tokenized elsewhere: Hugging Face's labels, TRL's masks."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from qlora_jax.data.fields import listed
from qlora_jax.errors import DataError
from qlora_jax.inputs import parse_json


class Ids(NamedTuple):
    """A row that was tokenized elsewhere: its ids, and the weight of each."""

    ids: list[int]
    weights: list[float]


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
