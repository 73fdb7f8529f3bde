"""Writing safetensors: a file, or a model's tensors in shards, with their digests."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax import digests
from qlora_jax.errors import CheckpointError, gathered
from qlora_jax.sources.safetensors import DTYPES, INDEX, SHARD, SINGLE, shards_of

logger = logging.getLogger(__name__)

_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")
"""Tensors lie in a file by dtype, in this order, as package safetensors has them."""


class Writer:
    """Writes tensors as they come, in shards of bounded size, into an empty folder.

    Shards get their final names at `close`, when their number is known; a single one is
    model.safetensors. Values that are not finite are never written.
    """

    def __init__(self, folder: Path, shard_bytes: int = 4 << 30):
        self.folder, self.shard_bytes = folder, shard_bytes
        self.problems: list[str] = []
        """Why tensors cannot be written, a sentence each; `close` raises them."""
        self.digests: dict[str, dict[str, Any]] = {}
        """The entries of the files that `close` names, see `qlora_jax.digests`."""
        self._pending: dict[str, np.ndarray] = {}
        self._shards: list[tuple[list[str], dict[str, Any]]] = []
        self._bytes = 0

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Adds a tensor; flushes a shard when it is full."""
        if problem := _not_finite(tensor):
            self.problems.append(f"{name}: {problem}")
        if self.problems:  # nothing will be kept: look at the others alone
            return
        size = sum(t.nbytes for t in self._pending.values())
        if self._pending and size + tensor.nbytes > self.shard_bytes:
            self._flush()
        self._pending[name] = np.asarray(tensor, order="C")
        self._bytes += tensor.nbytes

    def close(self) -> int:
        """Writes what is left and the index; returns the bytes of all tensors.

        Raises:
          CheckpointError: tensors have values that are not finite; all are named.
        """
        if self.problems:
            raise CheckpointError(gathered("nothing was saved", self.problems))
        self._flush()
        count = len(self._shards)
        final = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if count == 1:
            final = [SINGLE]
        weight_map = {}
        for i, (name, (tensors, entry)) in enumerate(
            zip(final, self._shards, strict=True)
        ):
            os.rename(self.folder / _part(i), self.folder / name)
            self.digests[name] = entry
            weight_map |= dict.fromkeys(tensors, name)
        if count > 1:
            index = {"metadata": {"total_size": self._bytes}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2))
        return self._bytes

    def _flush(self) -> None:
        if self._pending or not self._shards:
            entry = write_tensors(self.folder / _part(len(self._shards)), self._pending)
            self._shards.append((list(self._pending), entry))
            self._pending = {}


def weight_files(folder: Path) -> set[str]:
    """Returns the names of the files that the weights of a folder's model are in.

    Those that a killed process of an older version was writing are among them.
    """
    found = {path.name for path in folder.glob("part-?????.safetensors.partial")}
    found |= {name for name in (SINGLE, INDEX) if (folder / name).exists()}
    if INDEX in found:
        try:
            found.update(filter(SHARD.fullmatch, shards_of(folder / INDEX)))
        except CheckpointError:
            logger.warning("%s names no files that could be read", folder / INDEX)
    return found


def _not_finite(tensor: np.ndarray) -> str | None:
    """Says why an array cannot be saved; None where all of it is finite."""
    if tensor.dtype.kind in "biu" or np.isfinite(tensor).all():
        return None
    if np.isnan(tensor).any():
        return "NaN values"
    if tensor.dtype == np.float16:
        return (
            f"values beyond {np.finfo(np.float16).max:.0f}, the largest of float16; save "
            "in bfloat16 or float32 (--dtype)"
        )
    return "Inf values"


def _part(i: int) -> str:
    return f"part-{i:05d}.safetensors.partial"


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Writes a file of tensors, byte for byte as package safetensors does.

    That package hands out no bytes to take a digest of, and its errors name no file.

    Args:
      path: The file, which is not there yet.
      tensors: Arrays in C order, by name.

    Returns:
      The file's entry, see `qlora_jax.digests`.
    """
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    named = sorted(
        tensors.items(), key=lambda x: (_ORDER.index(kinds[x[1].dtype]), x[0])
    )
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in named:
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": kinds[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    with path.open("xb") as stream:
        stream.write(head)
        for _, tensor in named:
            stream.write(tensor.reshape(-1).view(np.uint8))
    return {
        "bytes": len(head) + end,
        "header": hashlib.sha256(head).hexdigest(),
        "tensors": {name: digests.of_array(tensor) for name, tensor in named},
    }
