"""Files that others wrote, read whole: bytes, text and JSON.

A file may be damaged, or made to do harm. So what is read has to be a regular file (to open a
FIFO waits for ever, a device has no end) of a bounded size. JSON is held to its standard:
Python's own parser would take NaN for a number, the last of two values of one key, and half of
a surrogate pair.
"""

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

from qlora_jax.errors import CheckpointError, QLoRAError

MAX_BYTES = 64 << 20
"""The largest file that is read whole, unless its reader says otherwise."""

MAX_DEPTH = 100
"""Levels of objects and lists in each other that JSON may have."""

MAX_CONTAINERS = 1_000_000
"""Objects and lists that one text of JSON may have: an empty one takes 64 bytes here."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_HALVES = re.compile(r"\\u[dD][89a-fA-F]")
"""This finds an escape by which JSON writes a half of a surrogate pair."""

Errors = type[QLoRAError]


def check_regular(
    path: Path, error: Errors = CheckpointError, limit: int | None = None
) -> int:
    """Returns the size of a regular file, in bytes.

    Args:
      path: The file.
      error: The class of error to raise.
      limit: The most bytes that it may have; None for any number.

    Raises:
      QLoRAError: it is a folder, FIFO, device or socket, or too large; of the class `error`.
      OSError: there is none, or it cannot be looked at.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        raise error(f"{path} is {kind}, expected a file")
    if limit is not None and status.st_size > limit:
        raise error(_too_large(path, status.st_size, limit))
    return status.st_size


def _too_large(path: Path, size: int, limit: int) -> str:
    return f"{path} has {size} bytes, expected at most {limit} of such a file"


def check_tree(folder: Path, error: Errors = CheckpointError) -> None:
    """Refuses a folder that has something else in it than files and folders.

    Libraries that open whatever they find would wait for a FIFO for ever.

    Raises:
      QLoRAError: it has; of the class `error`.
      OSError: it cannot be looked at.
    """
    for path in folder.rglob("*"):
        if not path.is_dir():
            check_regular(path, error)


def read_bytes(
    path: Path, *, limit: int = MAX_BYTES, error: Errors = CheckpointError
) -> bytes:
    """Reads a file whole.

    Args:
      path: The file.
      limit: The most bytes that it may have.
      error: The class of error to raise.

    Raises:
      QLoRAError: it is no regular file, or too large; of the class `error`.
      OSError: it cannot be read.
    """
    check_regular(path, error, limit)
    with path.open("rb") as stream:
        data = stream.read(limit + 1)  # files of /proc say that they are empty
    if len(data) > limit:
        raise error(_too_large(path, len(data), limit))
    return data


def read_text(
    path: Path, *, limit: int = MAX_BYTES, error: Errors = CheckpointError
) -> str:
    """Reads a file of UTF-8; arguments and errors as `read_bytes` has them."""
    data = read_bytes(path, limit=limit, error=error)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(
            f"{path} is not UTF-8: byte {problem.start} is 0x{data[problem.start]:02x}; save "
            "it as UTF-8, or fetch it again"
        ) from None


def read_json(
    path: Path,
    *,
    optional: bool = False,
    limit: int = MAX_BYTES,
    error: Errors = CheckpointError,
) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Args:
      path: The file.
      optional: An absent file counts as {}.
      limit: The most bytes that it may have.
      error: The class of error to raise.

    Raises:
      QLoRAError: it is no regular file, no JSON, or holds no object; of the class `error`.
      OSError: it cannot be read.
    """
    if optional and not os.path.lexists(path):
        return {}
    value = parse_json(read_text(path, limit=limit, error=error), path, error=error)
    if not isinstance(value, dict):
        raise error(f"{path} holds {type(value).__name__}, expected an object")
    return value


def parse_json(
    text: str,
    where: object,
    *,
    error: Errors = CheckpointError,
    strict: bool = True,
    places: bool = True,
) -> Any:
    """Returns the value of a text of JSON, held to the standard.

    Args:
      text: The text.
      where: What messages begin with: the file, or a place in it.
      error: The class of error to raise.
      strict: Refuse NaN, Infinity, numbers that float64 does not hold, and half of a
        surrogate pair. Rows of data may have them in columns that nobody reads.
      places: Say the line and column of what is no JSON.

    Raises:
      QLoRAError: it is no JSON, has a key twice, half of a surrogate pair, or more nesting
        than MAX_DEPTH; of the class `error`.
    """

    def refuse(name: str) -> NoReturn:
        raise error(f"{where} has {name}, which is no number of JSON")

    def finite(number: str) -> float:
        if math.isinf(value := float(number)):
            refuse(number[:40])
        return value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(made := dict(pairs)) < len(pairs):
            names = [name for name, _ in pairs]
            name = next(name for name in names if names.count(name) > 1)
            raise error(f"{where} has the key {name[:80]!r} twice in one object")
        return made

    if text.count("[") + text.count("{") > MAX_CONTAINERS:
        raise error(f"{where} has more than {MAX_CONTAINERS} lists and objects")
    hooks: dict[str, Any] = {"object_pairs_hook": unique}
    if strict:
        hooks |= {"parse_constant": refuse, "parse_float": finite}
    try:
        value = json.loads(text, **hooks)
    except json.JSONDecodeError as problem:
        place = f" (line {problem.lineno}, column {problem.colno})" if places else ""
        raise error(f"{where} is not JSON: {problem.msg}{place}") from None
    except RecursionError:
        raise error(f"{where} is not JSON: nested too deeply") from None
    except ValueError as problem:
        if isinstance(problem, QLoRAError):
            raise
        raise error(f"{where} has a number of more digits than any has") from None
    check_depth(value, where, error)
    if strict and _HALVES.search(text):
        _check_halves(value, where, error)
    return value


def check_depth(value: Any, where: object, error: Errors) -> None:
    """Refuses a value that is nested in more than MAX_DEPTH levels."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for one in level
            if isinstance(one, (dict, list))
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise error(f"{where} is nested in more than {MAX_DEPTH} levels")


def _check_halves(value: Any, where: object, error: Errors) -> None:
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += [*one, *one.values()]
        elif isinstance(one, list):
            waiting += one
        elif isinstance(one, str):
            try:
                one.encode()
            except UnicodeEncodeError:
                shown = one[:80].encode(errors="backslashreplace").decode()
                raise error(
                    f"{where} has a text with half of a surrogate pair: {shown}"
                ) from None
