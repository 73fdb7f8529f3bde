"""Files as streams of bytes: plain, or unpacked as they are read.

A small file may unpack to no end, so how far it may grow follows from its size. Whoever has
rows that repeat themselves more than that unpacks the file, and gives it plain.
"""

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import Any

from qlora_jax.errors import DataError
from qlora_jax.inputs import check_regular

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_BZIP2, _XZ = b"BZh", b"\xfd7zXZ\x00"

FREE_BYTES = 32 << 20
"""Bytes that any packed file may unpack to."""

GROWTH = 200
"""Bytes beside those that it may unpack to, for each of its own: text packs 3 to 50 times."""

ROW_BYTES = 256
"""Bytes that a row counts for at least: an empty one takes time and memory too."""

ROWS = "rows (.jsonl, .json, .csv, .tsv, .parquet; also as .gz, .zst, .bz2 or .xz)"
"""What a file of rows may be, for messages."""


def most_bytes(path: Path) -> int:
    """Returns how many bytes a packed file may unpack to."""
    return FREE_BYTES + GROWTH * path.stat().st_size


def grows(path: Path) -> DataError:
    """Returns the error of a file that unpacks to more."""
    return DataError(
        f"{path} has {path.stat().st_size} bytes, and unpacks to more than "
        f"{most_bytes(path)}, at which it is taken for one made to fill the memory; if it is "
        "what you want, save it as plain JSON lines"
    )


def is_packed(path: Path) -> bool:
    """Whether a file is of a kind that `open_bytes` unpacks."""
    with path.open("rb") as stream:
        return stream.read(6).startswith((_GZIP, _ZSTD, _BZIP2, _XZ))


def open_bytes(path: Path) -> Any:
    """Opens a file as a binary stream, unpacked (gzip, Zstandard, bzip2 or xz).

    Raises:
      DataError: there is no such file, or Zstandard needs a package that is missing.
    """
    if not path.exists():
        raise DataError(
            f"{path} is no file; expected {ROWS}, or a dataset id such as owner/name"
        )
    check_regular(path, DataError)
    with path.open("rb") as stream:
        magic = stream.read(6)
    if magic.startswith(_GZIP):
        inner = gzip.open(path)
    elif magic.startswith(_BZIP2):
        inner = bz2.open(path)
    elif magic.startswith(_XZ):
        inner = lzma.open(path)
    elif magic.startswith(_ZSTD):
        inner = arrow(path).CompressedInputStream(str(path), "zstd")
    else:
        return path.open("rb")
    return io.BufferedReader(_Bounded(inner, path), 1 << 16)


class _Bounded(io.RawIOBase):
    """A stream that ends in an error where it has grown too much."""

    def __init__(self, inner: Any, path: Path):
        self._inner, self._path, self._left = inner, path, most_bytes(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._inner.read(len(buffer))
        buffer[: len(data)] = data
        self._left -= len(data)
        if self._left < 0:
            raise grows(self._path)
        return len(data)

    def close(self) -> None:
        self._inner.close()
        super().close()


def arrow(path: Path) -> Any:
    """Returns the package pyarrow, that a file needs.

    Raises:
      DataError: it is not installed.
    """
    try:
        import pyarrow
    except ImportError:
        raise DataError(
            f"{path}: reading it needs pyarrow; pip install pyarrow (the extra 'data' of "
            "qlora_jax brings it)"
        ) from None
    return pyarrow


class Unpacking:
    """Turns what goes wrong in a packed file into a DataError."""

    def __init__(self, path: Path):
        """Takes the file to name."""
        self.path = path

    def __enter__(self) -> None:
        """Begins."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Raises DataError for a file that is cut short or damaged."""
        damaged = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)
        plain = isinstance(error, OSError) and error.errno is not None
        if isinstance(error, (*damaged, OSError)) and not plain:
            raise DataError(
                f"{self.path} cannot be unpacked: {error}; it is damaged, or cut short"
            ) from None
