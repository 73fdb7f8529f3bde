"""What a kill may leave: copies of a folder before each call that changes files.

Calls of Python are seen, by audit hooks; what libraries in other languages do is not.
"""

import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

_WATCH: list[Callable[[], None]] = []
_EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.chmod")
TRIES = 5
_TURN = threading.Lock()
_inside = threading.local()


def _hook(event: str, args: tuple) -> None:
    if not _WATCH or getattr(_inside, "yes", False):  # what it does itself is no event
        return
    if event in _EVENTS or (event == "open" and args[2] & os.O_CREAT):
        with _TURN:  # other threads wait with theirs
            _inside.yes = True
            try:
                for watch in _WATCH:
                    watch()
            finally:
                _inside.yes = False


sys.addaudithook(_hook)  # for good: there is no way to remove one


@contextlib.contextmanager
def states(root: Path, into: Path) -> Iterator[list[Path]]:
    """Copies a folder before each call that changes files: what a kill there leaves."""
    found: list[Path] = []

    def snapshot() -> None:
        copy = into / f"{len(found):04d}"
        for _ in range(TRIES):
            try:
                shutil.copytree(root, copy, symlinks=True)
            except (shutil.Error, FileNotFoundError):
                # A library in another language removed what was being copied.
                shutil.rmtree(copy)
            else:
                found.append(copy)
                return

    _WATCH.append(snapshot)
    try:
        yield found
    finally:
        _WATCH.clear()
