"""Rows of Parquet files, decoded in a process of their own (parquet_worker.py).

A small file of this kind may say that a page has gigabytes, or a row a thousand million values;
what decodes it is C++, which would fill the memory before it could be asked. So that process
has a limit of memory, and sends rows as it has them.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_jax.data.unpacking import (
    ROW_BYTES,
    arrow,
    grows,
    is_packed,
    most_bytes,
    open_bytes,
)
from qlora_jax.errors import DataError, first_line

MEMORY = 1 << 30
"""Bytes of memory that the process has after its imports."""

_WORKER = str(Path(__file__).with_name("parquet_worker.py"))


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a file, which may be packed as a whole.

    Raises:
      DataError: it is no Parquet, is damaged, or is much larger than it seems.
    """
    if not is_packed(path):
        yield from _rows(path, path)
        return
    with open_bytes(path) as stream, tempfile.NamedTemporaryFile() as plain:
        shutil.copyfileobj(stream, plain)
        plain.flush()
        yield from _rows(path, Path(plain.name))


def _rows(path: Path, plain: Path) -> Iterator[dict[str, Any]]:
    pyarrow = arrow(path)
    env = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}  # no large reserves
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.Popen(
        # -P keeps the names of our files from those of packages.
        [sys.executable, "-P", _WORKER, str(plain), str(MEMORY)],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the process that started it
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        left, failed = most_bytes(path), None
        try:
            with pyarrow.ipc.open_stream(process.stdout) as batches:
                for batch in batches:
                    left -= batch.nbytes + ROW_BYTES * batch.num_rows
                    if left < 0:
                        raise grows(path)
                    yield from batch.to_pylist()
        except DataError:
            raise
        except Exception as error:  # a stream is cut, or Python has no such date
            failed = error
        process.stdout.close()  # it may wait for a reader
        # It is shown to people at most, so bytes that are no text may be replaced.
        said = process.stderr.read().decode(errors="replace").strip()
        if (status := process.wait()) or failed:
            reason = (
                said.rpartition("\n")[2] or f"its decoder ended with status {status}"
            )
            if not status and failed:
                reason = first_line(failed)
            raise DataError(f"{path} is no Parquet that can be read: {reason[:300]}")
    finally:
        process.kill()
        process.stdout.close()
        process.stderr.close()
        process.wait()
