"""Records to tokenized rows, in this process or in several.

Chat templates are Python, so a large file is shared out to worker processes. They are
programs of their own (data/worker.py) and not multiprocessing's, which
would run a user's script again in each.
"""

import os
import pickle
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np

from qlora_jax.config.data import DataConfig
from qlora_jax.config.objective import Rows
from qlora_jax.data.fields import chosen_adapter
from qlora_jax.data.forms import Former
from qlora_jax.data.records import Record
from qlora_jax.data.tokenize import Row, check_length, tokenize
from qlora_jax.errors import DataError, QLoRAError
from qlora_jax.text import Tokenizer

CHUNK = 500
"""Records that are tokenized together."""

ALONE = 4000
"""Records that one process forms before others are started, which takes half a second."""

WORKERS = 16
"""At most; rows come from one file, which is read by one process."""


class Formed(NamedTuple):
    """Tokenized rows, and what is to be said of them.

    Attributes:
      rows: The tokenized rows, in the records' order.
      places: For each row, the place of its record in the file.
      read: The number of records.
      forms: {form: the number of records that had it}.
      unused: {field that nothing reads: the number of records that had it}.
      unread: {field that the chat template was given and has no name for: the number of
        records that had it}.
      problems: (place, message) of records that cannot be used.
      lines: Whether places are lines of the file.
    """

    rows: list[Row]
    places: list[int]
    read: int
    forms: Counter[str]
    unused: Counter[str]
    unread: Counter[str]
    problems: list[tuple[int, str]]
    lines: bool = True


def join(parts: Iterable[Formed]) -> Formed:
    """Puts parts of a file together."""
    whole = Formed([], [], 0, Counter(), Counter(), Counter(), [])
    for part in parts:
        whole.rows.extend(part.rows)
        whole.places.extend(part.places)
        for to, more in zip(whole[3:6], part[3:6], strict=True):
            to.update(more)
        whole.problems.extend(part.problems)
        whole = whole._replace(read=whole.read + part.read)
    return whole


class Forming(NamedTuple):
    """All that making rows of records depends on; it is pickled for the worker processes.

    Attributes:
      tokenizer: The tokenizer, with the chat template that counts.
      config: The settings that rows are read by.
      adapters: Names that a row's "adapter" field may have; () where it is not read.
      rows: The kind of rows that the objective takes.
    """

    tokenizer: Tokenizer
    config: DataConfig
    adapters: tuple[str, ...] = ()
    rows: Rows = "texts"

    def maker(self) -> Callable[[Sequence[Record]], Formed]:
        """Returns what makes rows of some records.

        Raises:
          ConfigError: settings that no row could go with.
        """
        former = Former(self.config, self.tokenizer, self.rows)

        def make(records: Sequence[Record]) -> Formed:
            made = Formed([], [], len(records), Counter(), Counter(), Counter(), [])
            flat: list[tuple[int, str | None, Any]] = []
            for place, record in records:
                try:
                    adapter = (
                        chosen_adapter(record, self.adapters) if self.adapters else None
                    )
                    formed = former(record)
                    for example in formed.examples:
                        check_length(example)
                except DataError as error:
                    made.problems.append((place, str(error)))
                    continue
                flat += [(place, adapter, example) for example in formed.examples]
                made.forms[formed.form] += 1
                made.unused.update(
                    formed.unused - ({"adapter"} if self.adapters else set())
                )
                made.unread.update(formed.unread)
            rows = tokenize([one for *_, one in flat], self.tokenizer, self.config)
            for (place, adapter, _), row in zip(flat, rows, strict=True):
                if (problem := _unlearnable(row)) is not None:
                    made.problems.append((place, problem))
                made.rows.append(row._replace(adapter=adapter))
                made.places.append(place)
            return made

        return make

    def all_of(
        self, records: Iterable[Record], progress: Callable[[int], None] | None = None
    ) -> Formed:
        """Makes rows of all records.

        Args:
          records: The records, in their order in the file.
          progress: Called with the number of records that are done.

        Raises:
          ConfigError: settings that no row could go with.
          DataError: a worker process died.
        """
        make, done, parts = self.maker(), 0, []
        records = iter(records)
        few = _chunks(islice(records, ALONE))
        for part in chain(map(make, few), self._shared(records)):
            parts.append(part)
            done += part.read
            if progress is not None:
                progress(done)
        return join(parts)

    def _shared(self, records: Iterator[Record]) -> Iterator[Formed]:
        """Yields what workers make, in order; one process where there is one core."""
        first = next(records, None)
        if first is None:
            return
        chunks = _chunks(chain([first], records))
        cores = min(_cores(), WORKERS)
        if cores == 1:
            yield from map(self.maker(), chunks)
            return
        workers = _Workers(self)
        try:
            with ThreadPoolExecutor(cores) as pool:
                waiting = [
                    pool.submit(workers.make, one) for one in islice(chunks, 2 * cores)
                ]
                while waiting:
                    yield waiting.pop(0).result()
                    waiting += [
                        pool.submit(workers.make, one) for one in islice(chunks, 1)
                    ]
        finally:
            workers.stop()


def _unlearnable(row: Row) -> str | None:
    """Says what is wrong with a pair whose answers are the same, or nothing, as tokens."""
    if row.other is None:
        return None
    if np.array_equal(row.tokens, row.other.tokens):
        return (
            "has 'chosen' and 'rejected' answers that are the same tokens, so nothing is "
            "preferred; leave the row out"
        )
    for key, one in (("chosen", row), ("rejected", row.other)):
        if not one.weights.any():
            return f"has a {key!r} answer without a token to learn; leave the row out"
    return None


def _chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    while chunk := list(islice(records, CHUNK)):
        yield chunk


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Workers:
    """A worker process for each thread that asks."""

    def __init__(self, forming: Forming):
        self._forming = pickle.dumps(forming)
        self._own = threading.local()
        self._all: list[subprocess.Popen[bytes]] = []

    def make(self, records: Sequence[Record]) -> Formed:
        """Sends records to this thread's worker, and waits for what it makes."""
        worker = getattr(self._own, "worker", None) or self._start()
        assert worker.stdin is not None and worker.stdout is not None
        try:
            pickle.dump(records, worker.stdin)
            worker.stdin.flush()
            made = pickle.load(worker.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise DataError(
                f"a process that reads rows ended with status {worker.wait()}; what it says "
                "is above (killed without a word, it may have run out of memory)"
            ) from None
        if isinstance(made, QLoRAError):
            raise made
        return made

    def _start(self) -> subprocess.Popen[bytes]:
        # The tokenizer's own threads would only be in each other's way.
        env = {**os.environ, "RAYON_NUM_THREADS": "1"}
        env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        worker = subprocess.Popen(
            [sys.executable, "-m", "qlora_jax.data.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            start_new_session=True,  # Ctrl-C is for the process that started it
        )
        self._own.worker = worker
        self._all.append(worker)
        assert worker.stdin is not None
        worker.stdin.write(self._forming)
        return worker

    def stop(self) -> None:
        """Ends them all."""
        for worker in self._all:
            worker.kill()
            worker.communicate()
