"""Batches made ahead of the steps that take them, and put on the device meanwhile."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")

AHEAD = 2
"""Batches that wait. One would do where each is made in less time than a step takes; the second
is for those that are not, such as an epoch's first, which has to be planned."""


class Feed(Generic[T]):
    """Makes what steps take by a thread, before they ask for it."""

    def __init__(self, make: Callable[[int], T], end: int):
        """Starts the thread.

        Args:
          make: Makes what a step takes, of the step's number; it depends on nothing else.
          end: The number of the step after the last.
        """
        self._make, self._end = make, end
        self._thread = ThreadPoolExecutor(1, "batches")
        self._waiting: dict[int, Future[T]] = {}

    def close(self) -> None:
        """Ends the thread; what it has begun to make is finished first."""
        self._thread.shutdown(cancel_futures=True)

    def __call__(self, step: int) -> T:
        """Returns what a step takes, and has the next ones made; raises what `make` does."""
        for one in range(step, min(step + 1 + AHEAD, self._end)):
            if one not in self._waiting:
                self._waiting[one] = self._thread.submit(self._make, one)
        return self._waiting.pop(step).result()
