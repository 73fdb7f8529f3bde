"""Tensors that a thread reads while the one before is worked on."""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from qlora_jax.sources.gguf.file import GGUF

AHEAD_BYTES = 256 << 20
"""So much is read ahead, and one tensor where that is larger."""


class Ahead(Mapping[str, np.ndarray]):
    """Tensors by name, the next ones of a known order already under way.

    Whatever is asked for comes out as if it had been read then, errors too. A name that is
    passed over is dropped, and one that is not in the order is read when it is asked for.
    """

    def __init__(
        self,
        tensors: Mapping[str, np.ndarray],
        sizes: Mapping[str, int],
        limit: int = AHEAD_BYTES,
    ):
        """Takes what to read, and the bytes of what will be asked for, in that order."""
        self._tensors, self._sizes, self._limit = tensors, sizes, limit
        self._coming = deque(sizes)
        self._started: deque[tuple[str, int, Future[np.ndarray]]] = deque()
        self._bytes = 0
        self._thread = ThreadPoolExecutor(1)

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns a tensor, and starts to read what comes after it."""
        found = None
        if any(name == other for other, _, _ in self._started):
            while found is None:
                found = self._take(name)
        elif name in self._coming:
            while self._started:
                self._take(name)
            while self._coming.popleft() != name:
                pass
        self._start()
        return self._tensors[name] if found is None else found.result()

    def _take(self, name: str) -> Future[np.ndarray] | None:
        """Takes the next tensor off the queue; returns it if it is the one."""
        other, size, future = self._started.popleft()
        self._bytes -= size
        if other == name:
            return future
        future.cancel()
        return None

    def _start(self) -> None:
        while self._coming:
            size = self._sizes[self._coming[0]]
            if self._started and self._bytes + size > self._limit:
                return
            name = self._coming.popleft()
            self._bytes += size
            future = self._thread.submit(self._tensors.__getitem__, name)
            self._started.append((name, size, future))

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor, without reading it."""
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        """Yields the names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Counts the tensors."""
        return len(self._tensors)


def ahead(
    tensors: Mapping[str, np.ndarray], names: Iterable[str]
) -> Mapping[str, np.ndarray]:
    """Returns tensors that are read ahead where that pays: where reading is computing.

    That is a GGUF file, whose tensors are dequantized by one processor. Those of a folder are
    mapped, and the system reads ahead by itself (scripts/results/README.md).
    """
    if not isinstance(tensors, GGUF):
        return tensors
    infos = {name: tensors.infos[name] for name in names if name in tensors}
    sizes = {x: math.prod(i.shape) * i.dtype.itemsize for x, i in infos.items()}
    return Ahead(tensors, sizes)
