"""What a file holds: rows, or prose."""

import re
from pathlib import Path

_ROW_SUFFIX = ".jsonl"
_BEGINNING = 4096
_OBJECT = re.compile(r'\s*(\[\s*)?\{\s*["}]|\s*\[\s*\]')


def holds_rows(path: Path) -> bool:
    """Returns whether a file holds rows, by how it begins, whatever it is called.

    Rows begin as JSON objects do, or a list of them. A file called .jsonl is rows even where
    it does not, so that what is wrong with its first line is said, and not scored as prose.
    """
    if path.suffix == _ROW_SUFFIX:
        return True
    with path.open("rb") as stream:
        beginning = stream.read(_BEGINNING).decode("utf-8-sig", errors="replace")
    return _OBJECT.match(beginning) is not None
