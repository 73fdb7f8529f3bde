"""Digests of the files in a folder that qlora_jax wrote, in one file beside them.

`qlora_jax.sha256.json` has the size of every file and the sha256 of its bytes. Of a file of
tensors it has those of its header and of each tensor instead, which together are all of its
bytes: a tensor is checked as it is read, without reading the file another time.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from qlora_jax.errors import CheckpointError

logger = logging.getLogger(__name__)

NAME = "qlora_jax.sha256.json"
FORMAT = 1
_MAX_BYTES = 256 << 20
ADVICE = (
    "it is damaged, or was changed by another program; make it again, or remove "
    f"{NAME} beside it to open the folder unchecked"
)


def of_array(array: Any) -> str:
    """Returns the sha256 of an array's bytes in C order, in hex."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return hashlib.sha256(flat.view(np.uint8)).hexdigest()


def of_file(path: Path) -> dict[str, Any]:
    """Returns the entry of a file: {"bytes": its size, "sha256": in hex}."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"bytes": stream.tell(), "sha256": digest}


def write(folder: Path, known: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the list of a folder.

    Args:
      folder: A folder whose files are all there.
      known: Entries by relative path; other files are read for theirs.
    """
    files = {
        name: dict(known[name]) if name in known else of_file(folder / name)
        for name in files_in(folder)
        if name != NAME
    }
    value = {"format": FORMAT, "files": files, "sha256": of_json(files)}
    text = json.dumps(value, indent=1) + "\n"
    (folder / NAME).write_text(text, encoding="utf-8")


def of_json(value: Any) -> str:
    """Returns the sha256, in hex, of a JSON value, however its text is laid out."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def files_in(folder: Path) -> list[str]:
    """Returns the relative paths of the files in a folder and in the folders in it."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    )


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Reads the list of a folder, an entry a file; {} where there is none.

    Raises:
      CheckpointError: the list is damaged.
    """
    path = folder / NAME
    if not path.is_file():
        return {}
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise ValueError(f"it has {size} bytes, expected at most {_MAX_BYTES}")
        value = json.loads(path.read_text(encoding="utf-8"))
        if problem := _problem(value):
            raise ValueError(problem)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}), so what is in {folder} cannot be checked; make the "
            "folder again, or remove this file to open the folder unchecked"
        ) from None
    return value["files"]


def is_other(folder: Path, name: str, entry: Mapping[str, Any]) -> bool:
    """Whether a file of tensors is none that its entry is of, as its header tells.

    Then another program wrote it since, and its entry says nothing of it. A warning says so.
    """
    with (folder / name).open("rb") as stream:
        size = stream.read(8)
        head = size + stream.read(int.from_bytes(size, "little"))
    if hashlib.sha256(head).hexdigest() == entry.get("header"):
        return False
    logger.warning(
        "%s is not the file that qlora_jax wrote there, so it is read unchecked",
        folder / name,
    )
    return True


def damaged_files(folder: Path, within: str = "") -> list[str]:
    """Compares the files of a folder with its list.

    Files that the list does not name are not looked at; without a list, none are.

    Args:
      folder: The folder.
      within: What the names of the files to compare begin with, such as "arrays/".

    Returns:
      A sentence for each file that is missing or changed; [] where all are as they were
      written.
    """
    try:
        files = read(folder)
    except CheckpointError as error:
        return [str(error)]
    wanted = [name for name in files if name.startswith(within)]
    return [x for name in wanted for x in damage(folder, name, files[name])]


def damage(folder: Path, name: str, entry: Mapping[str, Any]) -> list[str]:
    """Compares every byte of a file in a folder with its entry.

    Returns:
      A sentence for the file, or for each tensor of a file of tensors, that is missing or
      not as it was written.
    """
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return [f"{NAME} names {name!r}, which is no file in the folder"]
    if not path.is_file():
        return [f"{name} is missing"]
    if "tensors" not in entry:
        if (found := of_file(path)) == entry:
            return []
        return [
            f"{name} is not as it was written: {found['bytes']} bytes, and was {entry['bytes']}"
        ]
    if path.stat().st_size != entry["bytes"]:
        size = path.stat().st_size
        return [f"{name} has {size} bytes, and {entry['bytes']} were written"]
    problems = []
    with path.open("rb") as stream:
        size = stream.read(8)
        length = min(int.from_bytes(size, "little"), entry["bytes"])
        text = stream.read(length)
        if hashlib.sha256(size + text).hexdigest() != entry["header"]:
            return [f"{name}: its header is not as it was written"]
        try:
            header = json.loads(text)
            spans = {
                tensor: [max(0, int(at)) for at in header[tensor]["data_offsets"]][:2]
                for tensor in entry["tensors"]
            }
            spans = {tensor: (begin, end) for tensor, (begin, end) in spans.items()}
        except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
            return [f"{name}: {NAME} lists tensors that its header has not"]
        for tensor, digest in entry["tensors"].items():
            begin, end = spans[tensor]
            if _of_part(stream, 8 + length + begin, end - begin) != digest:
                problems.append(f"{name}: {tensor} is not as it was written")
    return problems


def _of_part(stream: IO[bytes], start: int, size: int) -> str:
    """Returns the sha256 of some bytes of a file."""
    stream.seek(start)
    found = hashlib.sha256()
    while size > 0 and (data := stream.read(min(size, 1 << 20))):
        found.update(data)
        size -= len(data)
    return found.hexdigest()


def listed(folder: Path) -> set[str]:
    """Returns the files that a folder's list names; a damaged list names none."""
    try:
        return set(read(folder))
    except CheckpointError:
        return set()


def _problem(value: Any) -> str | None:
    """Says what is wrong with the content of a list; None if nothing is."""
    if not isinstance(value, dict) or not isinstance(value.get("files"), dict):
        return "it has no files"
    if value.get("format") != FORMAT:
        return f"it has format {value.get('format')!r}, expected {FORMAT}"
    for name, entry in value["files"].items():
        texts = [name]
        if not isinstance(entry, dict) or type(entry.get("bytes")) is not int:
            return f"{name!r} has no size"
        if "tensors" in entry:
            tensors = entry["tensors"]
            if not isinstance(tensors, dict):
                return f"{name!r} has no tensors"
            texts += [entry.get("header"), *tensors.values()]
        else:
            texts.append(entry.get("sha256"))
        if not all(isinstance(text, str) for text in texts):
            return f"{name!r} has no sha256"
    if value.get("sha256") != of_json(value["files"]):
        return "it is not as it was written"
    return None
