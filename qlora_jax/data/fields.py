"""Fields of a row: their names, their types, and what is said of those that do not fit."""

from collections.abc import Mapping
from typing import Any

from qlora_jax.config.data import DataConfig
from qlora_jax.errors import DataError
from qlora_jax.inputs import parse_json
from qlora_jax.text.chat import check_text

REFERENCE = "reference_logprobs"
"""The name among a row's extras of the log-probability that the reference gives its answer."""

TEACHER_IDS, TEACHER_LOGPROBS = "teacher_ids", "teacher_logprobs"
"""The names among a row's extras of the tokens that a teacher has most probable in the place of
each token, and of their log-probabilities: (tokens, k)."""

PROMPT_WEIGHTS = "prompt_weights"
"""The name among the extras of a pair's rows of what the tokens of the prompt count, where they
are learnt too."""

LABEL = "label"
"""The name among a row's extras of whether its answer is good: 1, or 0."""


def renamed(row: Mapping[str, Any], config: DataConfig) -> dict[str, Any]:
    """Returns a row whose fields have the names that are known here (--data.columns).

    Raises:
      DataError: it lacks one of the fields.
    """
    names = config.renamed
    if absent := [f"{to}={key}" for to, key in names.items() if key not in row]:
        raise DataError(
            f"has {keys_of(row)}, and not what --data.columns names: {', '.join(absent)}"
        )
    kept = {key: value for key, value in row.items() if key not in names.values()}
    return {**kept, **{to: row[key] for to, key in names.items()}}


def text_of(row: Mapping[str, Any], key: str) -> str:
    """Returns a row's string, which Unicode can encode.

    Raises:
      DataError: it is another type, or half of a surrogate pair.
    """
    check_text(key, row[key])
    return row[key]


def chosen_adapter(row: Mapping[str, Any], adapters: tuple[str, ...]) -> str | None:
    """Returns the adapter that a row's "adapter" field names; None where it has none.

    Raises:
      DataError: it is none of these.
    """
    name = row.get("adapter")
    if name is not None and name not in adapters:
        known = ", ".join(adapters)
        raise DataError(f"'adapter' is {name!r}, expected one of {known}")
    return name


def listed(value: Any) -> Any:
    """Returns a list that a table of text holds as JSON; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:2] in ("[{", "[]"):
        try:
            return parse_json(value, "a field", error=DataError, strict=False)
        except ValueError:
            return value
    return value


def first_of(row: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    """Returns the first key that a row has something under, else one that it has."""
    has = [key for key in keys if key in row]
    return next((key for key in has if row[key]), has[0] if has else None)


def keys_of(row: Mapping[str, Any]) -> str:
    """Names a row's keys for a message."""
    return ", ".join(map(repr, row)) or "no keys"
