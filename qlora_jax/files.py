"""Files that are whole on disk, or not there."""

import os
from pathlib import Path


def write_file(path: Path, data: str | bytes) -> None:
    """Writes a file so that a kill or a power cut leaves the old one or the new one whole.

    It is written beside, flushed to the disk, and renamed over the old one; the folder's
    entry is flushed last.

    Args:
      path: The file; its folder has to exist.
      data: The content; text is written as UTF-8.
    """
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as stream:
        stream.write(data.encode("utf-8") if isinstance(data, str) else data)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
