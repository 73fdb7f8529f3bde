"""What keeps an output from being written: said in one message, with what to do."""

import contextlib
import errno
import math
import os
from collections.abc import Iterator
from pathlib import Path

from qlora_jax.errors import OutputError, OutputExistsError

_ADVICE = {
    errno.ENOSPC: "free some space there, or choose another place",
    errno.EDQUOT: "your quota there is used up; free some space, or choose another place",
    errno.EFBIG: "no file there may be that large (ulimit -f); raise the limit, or choose "
    "another place",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "choose a place that you may write to",
    errno.EPERM: "choose a place that you may write to",
    errno.EIO: "the disk or its connection failed; look at the system's log",
}
PROBE = ".room"
"""A file that takes room for a moment, in a folder that is being written."""
_OVERHEAD_BYTES = 1 << 17
_LITTLE = 1 << 16
"""A disk with fewer free bytes is taken for full, where an error gives no number."""


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Says of an error in writing an output what it was and what to do.

    Errors in reading other files pass as they are.
    """
    try:
        yield
    except (OutputError, OutputExistsError):
        raise
    except OSError as error:
        if not _is_of(path, error):
            raise
        raise OutputError(unwritten(path, error)) from error


def _is_of(path: Path, error: OSError) -> bool:
    """Whether an error is about an output, what is above it, or what is written for it."""
    named = [x for x in (error.filename, error.filename2) if x is not None]
    hidden = str(path.with_name(f".{path.name}."))
    return not named or any(  # without a name: of a write to an open file
        path.is_relative_to(place)
        or place.is_relative_to(path)
        or str(place).startswith(hidden)
        for place in map(Path, map(os.fsdecode, named))
    )


def unwritten(path: Path, error: Exception) -> str:
    """Returns the message for an output that cannot be written, with what to do.

    Args:
      path: The output.
      error: What writing it raised; of an error that has no number its text is searched.
    """
    number = getattr(error, "errno", None) or next(
        (n for n in _ADVICE if os.strerror(n).lower() in str(error).lower()), 0
    )
    space, inodes = _left(path)
    if not number and space < _LITTLE:  # as numpy's tofile, which gives no number
        number = errno.ENOSPC
    why = os.strerror(number) if number else str(error).strip()
    advice = _ADVICE.get(number, "see to that, and run it again")
    if number == errno.ENOSPC and not inodes:
        why, advice = (
            "no inodes are left there",
            "remove files there, or choose another",
        )
    return (
        f"{path} cannot be written: {why}; {advice}. What was there before is as it was"
    )


def _left(path: Path) -> tuple[float, float]:
    """Returns the bytes and the inodes that are free where a path is."""
    for place in (path, *path.parents):
        with contextlib.suppress(
            OSError
        ):  # which is not there: the folder above it is asked
            found = os.statvfs(place)
            inodes = found.f_favail if found.f_files else math.inf
            return found.f_bavail * found.f_frsize, inodes
    return math.inf, math.inf


def check_room(folder: Path, size: int) -> None:
    """Asks the file system for room, for libraries that fail in many words without it.

    Args:
      folder: A folder that is about to be written.
      size: Bytes of arrays that will be written there; what Orbax writes beside them is
        allowed for.

    Raises:
      OSError: there is no such room, or no file may be that large.
    """
    probe = folder / PROBE
    handle = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(handle, 0, size + _OVERHEAD_BYTES)
    finally:
        os.close(handle)
        probe.unlink()
