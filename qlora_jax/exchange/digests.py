"""Digests of files and arrays, by which a folder proves that it is as it was written."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

SUMS = "SHA256SUMS"
"""A folder's list of its files with their digests, which `sha256sum -c` checks too."""
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def array_digest(array: Any) -> str:
    """Returns the sha256 of an array's bytes in C order, in hex."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return hashlib.sha256(flat.view(np.uint8)).hexdigest()


def text_digest(value: Any) -> str:
    """Returns the sha256, in hex, of a JSON value, however its text is laid out."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_sums(folder: Path) -> None:
    """Writes the digest of every file of a folder into its SHA256SUMS."""
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file()
    )
    lines = [f"{file_digest(folder / name)}  {name}\n" for name in names]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def damaged_files(folder: Path) -> list[str]:
    """Compares the files of a folder with its SHA256SUMS.

    Files that it does not list are not looked at.

    Returns:
      A sentence for each file that is missing or changed; [] where all are as they were
      written.
    """
    try:
        text = (folder / SUMS).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return [f"{SUMS} cannot be read: {error.strerror}"]
    matches = [_LINE.fullmatch(line) for line in text.split("\n")[:-1]]
    listed = {match[2]: match[1] for match in matches if match}
    if not text.endswith("\n") or len(listed) != len(matches) or not listed:
        return [f"{SUMS} is cut or changed: not every line is a digest and a name"]
    found = (_changed(folder / name, name, listed[name]) for name in listed)
    return [problem for problem in found if problem]


def _changed(path: Path, name: str, expected: str) -> str | None:
    try:
        if not path.is_file():
            return f"{name} is missing, which {SUMS} lists"
        if (found := file_digest(path)) == expected:
            return None
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        return f"{name} cannot be read: {error}"
    return (
        f"{name} ({path.stat().st_size} bytes) is not as it was written: its sha256 is "
        f"{found[:12]}..., {SUMS} says {expected[:12]}..."
    )


def file_digest(path: Path) -> str:
    """Returns the sha256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
