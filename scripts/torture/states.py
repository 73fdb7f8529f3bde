"""What a kill may leave: copies of a folder before each call that changes files.

Calls of Python are seen, by audit hooks; what libraries in other languages do is not.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

_WATCH: list[Callable[[], None]] = []
_EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.chmod")


def _hook(event: str, args: tuple) -> None:
    if _WATCH and (event in _EVENTS or (event == "open" and args[2] & os.O_CREAT)):
        watch = _WATCH.pop()  # what it does itself is no event
        watch()
        _WATCH.append(watch)


sys.addaudithook(_hook)  # for good: there is no way to remove one


@contextlib.contextmanager
def states(root: Path, into: Path) -> Iterator[list[Path]]:
    """Copies a folder before each call that changes files: what a kill there leaves."""
    found: list[Path] = []

    def snapshot() -> None:
        found.append(into / f"{len(found):03d}")
        shutil.copytree(root, found[-1], symlinks=True)

    _WATCH.append(snapshot)
    try:
        yield found
    finally:
        _WATCH.clear()
