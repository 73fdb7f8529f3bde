"""A process that decodes Parquet for another: see parquet.py.

It imports nothing of qlora_jax, and is started as a file, so that it begins at once.
"""

import contextlib
import os
import resource
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

BATCH = 64
"""Rows that are decoded together."""


def plain_type(kind: Any) -> Any:
    """Returns a type without dictionaries: what rows share is to count for each of them."""

    def inner(field: Any) -> Any:
        return field.with_type(plain_type(field.type))

    if pyarrow.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pyarrow.types.is_list(kind):
        return pyarrow.list_(inner(kind.value_field))
    if pyarrow.types.is_large_list(kind):
        return pyarrow.large_list(inner(kind.value_field))
    if pyarrow.types.is_struct(kind):
        return pyarrow.struct([inner(kind.field(i)) for i in range(kind.num_fields)])
    return kind


def limit(more: int) -> None:
    """Limits the memory of this process to what it has, and so many bytes more."""
    with contextlib.suppress(FileNotFoundError):  # where the system has no such file
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        memory = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def send(path: Path, memory: int) -> None:
    """Writes the rows of a file to stdout, as a stream of Arrow's."""
    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    limit(memory)
    try:
        # Without a buffer it would read all of a group of rows at once.
        with pyarrow.parquet.ParquetFile(
            path, buffer_size=1 << 20, pre_buffer=False
        ) as file:
            schema = pyarrow.schema(
                [one.with_type(plain_type(one.type)) for one in file.schema_arrow]
            )
            with pyarrow.ipc.new_stream(sys.stdout.buffer, schema) as out:
                for batch in file.iter_batches(batch_size=BATCH, use_threads=False):
                    out.write_batch(batch.cast(schema))
    except BrokenPipeError:
        os._exit(0)  # who asked has had enough
    except MemoryError:
        sys.exit(f"some of its rows take more than {memory >> 20} MiB of memory")
    except Exception as error:  # a line of it is all that is said, whatever it is
        sys.exit(f"{error}".replace("\n", " "))


if __name__ == "__main__":
    send(Path(sys.argv[1]), int(sys.argv[2]))
