"""One process at a time trains in a run folder."""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from qlora_jax.disk import explained
from qlora_jax.errors import LockedError

logger = logging.getLogger(__name__)

FILE = "run.lock"
"""It is locked, and says who locked it. A run that ended has none."""
_held: set[Path] = set()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from training in a folder, which has to exist.

    The lock is the file's (flock), so it ends with the process that took it, however that
    ends; what a killed one left is taken over, and said. A process that has the lock may
    take it again.

    Raises:
      LockedError: another process has it; its host, pid and start are named.
      OutputError: the folder cannot be written to.
    """
    place = folder.resolve()
    if place in _held:
        yield
        return
    stream = _locked(place / FILE)
    _held.add(place)
    try:
        yield
    finally:
        _held.discard(place)
        (place / FILE).unlink(missing_ok=True)
        stream.close()


def _locked(path: Path) -> IO[str]:
    while True:
        with explained(path):
            # It is shown to people at most, so bytes that are no text may be replaced.
            stream = path.open("a+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(stream)
            stream.close()
            raise LockedError(
                f"{path.parent} is being trained by {holder}; wait for it, or stop it "
                "(Ctrl-C, or kill with its pid) and resume the run"
            ) from None
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): nothing keeps a second process from this run",
                path.parent,
                error.strerror,
            )
        # Its holder may have ended, and removed the file, between the two calls.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(stream.fileno()), path.stat()):
                break
        stream.close()
    if os.fstat(stream.fileno()).st_size:
        logger.warning(
            "%s: the lock of %s is stale, as that process has ended; it is taken over",
            path.parent,
            _holder(stream),
        )
    stream.truncate(0)
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    who = {"host": socket.gethostname(), "pid": os.getpid(), "start": now}
    with explained(path):
        stream.write(json.dumps(who) + "\n")
        stream.flush()
    return stream


def _holder(stream: IO[str]) -> str:
    """Says who wrote a lock's file."""
    stream.seek(0)
    text = stream.read(1000)
    try:
        who = json.loads(text)
        return f"process {who['pid']} on {who['host']}, begun {who['start']}"
    except (ValueError, KeyError, TypeError):
        return f"a process that {FILE} does not name"
