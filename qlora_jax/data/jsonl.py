"""JSON lines: one object a line, every line that cannot be used named at once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from qlora_jax.errors import DataError, gathered

T = TypeVar("T")


def read_jsonl(path: Path, parse: Callable[[dict[str, Any]], T]) -> list[tuple[int, T]]:
    """Reads a file line by line; empty lines are passed over.

    Args:
      path: A .jsonl file.
      parse: Makes something of an object, or raises DataError, which gets path and line.

    Returns:
      (line number from 1, what parse made) of each.

    Raises:
      DataError: no file, no rows, or lines that cannot be used (up to 20 are named).
    """
    if not path.is_file():
        raise DataError(f"{path} is no file; expected JSON lines (.jsonl)")
    parsed, problems = [], []
    with path.open(encoding="utf-8", errors="replace") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise DataError(f"is {type(row).__name__}, expected an object")
                parsed.append((number, parse(row)))
            except json.JSONDecodeError as error:
                problems.append(f"{path}:{number}: is not JSON: {error.msg}")
            except RecursionError:
                problems.append(f"{path}:{number}: is not JSON: nested too deeply")
            except DataError as error:
                problems.append(f"{path}:{number}: {error}")
    if problems:
        raise DataError(gathered(f"{path} cannot be used", problems))
    if not parsed:
        raise DataError(f"{path} has no rows; expected one JSON object a line")
    return parsed


def chosen_adapter(row: dict[str, Any], adapters: tuple[str, ...]) -> str | None:
    """Returns the adapter that a row's "adapter" field names; None where it has none.

    Raises:
      DataError: it is none of these.
    """
    name = row.get("adapter")
    if name is not None and name not in adapters:
        known = ", ".join(adapters)
        raise DataError(f"'adapter' is {name!r}, expected one of {known}")
    return name
