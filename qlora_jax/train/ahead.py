"""A run's programs, compiled before the first step: each in a thread of its own."""

import logging
import time
from collections.abc import Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

logger = logging.getLogger(__name__)

class Programs:
    """Compiles jitted functions ahead. What is compiled, a call of the function then finds."""

    def __init__(self) -> None:
        self._compiling: dict[Hashable, Future[None]] = {}

    def compile(self, programs: dict[Hashable, tuple[str, Any, tuple[Any, ...]]]) -> None:
        """Begins to compile; the first of them are the first to be ready.

        Functions are traced here, in the caller's contexts, and compiled by threads.

        Args:
          programs: By a key to wait for: what to call the program, a jitted function, and
            arguments that are as those it will be called with.
        """
        new = {key: one for key, one in programs.items() if key not in self._compiling}
        if not new:
            return
        threads = ThreadPoolExecutor(len(new), "compile")
        for key, (name, jitted, arguments) in new.items():
            began = time.monotonic()
            lowered = jitted.lower(*arguments)
            self._compiling[key] = threads.submit(self._compiled, name, lowered, began)
        threads.shutdown(wait=False)

    def wait(self, key: Hashable) -> None:
        """Waits until a program is ready, if it was begun; raises what compiling it did."""
        if (compiling := self._compiling.get(key)) is not None:
            compiling.result()

    def _compiled(self, name: str, lowered: Any, began: float) -> None:
        lowered.compile()
        logger.info("compiled %s in %.1f s", name, time.monotonic() - began)
