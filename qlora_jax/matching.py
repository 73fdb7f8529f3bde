"""Regular expressions that others wrote, matched under a limit of time.

A pattern can be made so that trying all ways to match it takes for ever, and Python's `re`
cannot be stopped. So what could take long is matched in a process of its own, which ends
itself when it has worked too long. Patterns that can only be tried in few ways are matched
here.
"""

import atexit
import functools
import json
import subprocess
import sys
import threading

from qlora_jax import match_worker
from qlora_jax.errors import ConfigError
from qlora_jax.match_worker import Groups
from qlora_jax.schema import pattern_problem

_EASY_LENGTH = 300


def fullmatch(pattern: str, text: str) -> Groups | None:
    """Returns the match of a pattern with a whole text, None where there is none.

    Raises:
      ConfigError: it takes too long.
    """
    return _match("fullmatch", pattern, text)


def match(pattern: str, text: str) -> Groups | None:
    """Returns the match with the beginning of a text; see `fullmatch`."""
    return _match("match", pattern, text)


def last(pattern: str, text: str) -> Groups | None:
    """Returns the last of the matches that are found in a text; see `fullmatch`."""
    return _match("last", pattern, text)


def _match(how: str, pattern: str, text: str) -> Groups | None:
    if len(text) <= _EASY_LENGTH and _easy(pattern):
        return match_worker.found(how, pattern, text)
    return _PROCESS.ask(how, pattern, text)


@functools.lru_cache(maxsize=10_000)
def _easy(pattern: str) -> bool:
    """Whether there are at most about as many ways as the square of a text's length."""
    varied = sum(map(pattern.count, "*+?|"))
    return varied <= 2 and "{" not in pattern and pattern_problem(pattern) is None


class _Process:
    """The process that matches; it is started when it is first needed."""

    def __init__(self, arguments: tuple[str, ...] = ()) -> None:
        self._arguments = arguments
        self._lock = threading.Lock()
        self._running: subprocess.Popen[str] | None = None

    def ask(self, how: str, pattern: str, text: str) -> Groups | None:
        with self._lock:
            running = self._running or self._start()
            assert running.stdin is not None and running.stdout is not None
            try:
                running.stdin.write(json.dumps([how, pattern, text]) + "\n")
                running.stdin.flush()
                answer = running.stdout.readline()
            except BaseException:  # an answer that is not read would be the next one's
                self.stop()
                raise
            if not answer:
                self.stop()
                raise ConfigError(
                    f"the pattern {pattern!r:.80} takes too long on a text of {len(text)} "
                    "characters; write it so that there is one way to match a text"
                )
            return json.loads(answer)

    def _start(self) -> "subprocess.Popen[str]":
        self._running = subprocess.Popen(
            # What `re` warns of was said where the pattern was checked.
            [sys.executable, "-I", "-S", "-W", "ignore", match_worker.__file__]
            + [*self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the process that started it
        )
        return self._running

    def stop(self) -> None:
        if self._running is not None:
            self._running.kill()
            self._running.communicate()
            self._running = None


_PROCESS = _Process()
atexit.register(_PROCESS.stop)
