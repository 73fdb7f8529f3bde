"""The outline of a GGUF file, followed before the package gguf reads it.

The package believes what a file says of its own counts and lengths, and a damaged one can keep
it busy for minutes. Here each is compared with the bytes that are there.

Source of the layout: ggml's docs/gguf.md.
"""

import struct
from pathlib import Path

from qlora_jax.errors import CheckpointError
from qlora_jax.inputs import check_regular

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Number of a type of values -> bytes of one."""
_STRING, _ARRAY = 8, 9
_MAX_NESTED, _MAX_AXES, _MAX_AXIS = 4, 4, 2**40
_MAX_HEAD = 256 << 20
"""Bytes of metadata that are looked at; a vocabulary takes some millions."""


class _Scan:
    """A place in the bytes of a file's beginning."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def skip(self, count: int) -> None:
        """Passes over bytes.

        Raises:
          ValueError: there are fewer.
        """
        if count > len(self.data) - self.at:
            raise ValueError(
                f"byte {self.at} begins {count} bytes, and the file has "
                f"{len(self.data) - self.at} after it"
            )
        self.at += count

    def number(self, form: str) -> int:
        """Reads a whole number of little-endian order."""
        at = self.at
        self.skip(struct.calcsize(form))
        return struct.unpack_from(form, self.data, at)[0]

    def string(self) -> None:
        """Passes over a string."""
        self.skip(self.number("<Q"))

    def value(self, kind: int, nested: int = 0) -> None:
        """Passes over a value of metadata."""
        if kind == _STRING:
            self.string()
        elif kind == _ARRAY:
            inner, count = self.number("<I"), self.number("<Q")
            if inner in _SIZES:
                self.skip(count * _SIZES[inner])
                return
            # Each has a length of 8 bytes at least.
            if count * 8 > len(self.data) - self.at or nested == _MAX_NESTED:
                raise ValueError(f"byte {self.at} begins a list of {count} values")
            for _ in range(count):
                self.value(inner, nested + 1)
        elif kind in _SIZES:
            self.skip(_SIZES[kind])
        else:
            raise ValueError(f"byte {self.at} is a value of the unknown type {kind}")

    def tensor(self) -> None:
        """Passes over what is said of a tensor."""
        self.string()
        axes = self.number("<I")
        if axes > _MAX_AXES:
            raise ValueError(f"byte {self.at} begins a tensor of {axes} axes")
        sizes = [self.number("<Q") for _ in range(axes)]
        if max(sizes, default=0) > _MAX_AXIS:
            raise ValueError(f"byte {self.at} ends a tensor of the shape {sizes}")
        self.skip(12)


def check(path: Path) -> None:
    """Follows a file's metadata and list of tensors from end to end.

    Raises:
      CheckpointError: it is no regular file, or its counts and lengths are not those of
        what is there.
    """
    size = check_regular(path)
    with path.open("rb") as stream:
        scan = _Scan(stream.read(_MAX_HEAD))
    try:
        if scan.data[:4] != b"GGUF":
            raise ValueError(f"it begins with {scan.data[:4]!r}")
        scan.skip(4)
        version = scan.number("<I")
        if version and version & 0xFFFF == 0:
            raise ValueError("its bytes are in another order than this machine's")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, expected 2 or 3")
        tensors, pairs = scan.number("<Q"), scan.number("<Q")
        if (tensors + pairs) * 12 > size:
            raise ValueError(f"it has {pairs} settings and {tensors} tensors")
        for _ in range(pairs):
            scan.string()
            scan.value(scan.number("<I"))
        for _ in range(tensors):
            scan.tensor()
    except ValueError as error:
        raise CheckpointError(
            f"{path} ({size} bytes) cannot be read as GGUF: {error}; if it is truncated or "
            "corrupt, fetch it again"
        ) from None
