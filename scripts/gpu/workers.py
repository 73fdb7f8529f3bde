"""Worker processes of gpu/suite.py and gpu/tune.py: compile together, run in turn.

A worker reads a task, one line of JSON, compiles it, says that it is ready, waits for its
turn on the GPU and answers with a line of figures. The parent gives the tasks out in
order, keeps the turn, and appends a row for each as it comes. None runs while another
compiles, as XLA tries its products' algorithms on the GPU then. A process that hung, died
or failed on the GPU is replaced, so that what it left behind (a CUDA error stays with its
process) is nobody else's; its task has a row that says so.

This file imports nothing that starts a GPU: the parent must not hold one.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scripts.bench.harness import ROOT, append_row

Task = dict[str, Any]
LARGE_BYTES = 2 << 30
"""A process that had this much does not give it back to the device, and is replaced."""


@dataclasses.dataclass
class Lane:
    """Tasks that some processes share.

    Attributes:
      tasks: First comes first.
      processes: At most so many at a time.
      alone: Whether each task gets a process of its own.
    """

    tasks: list[Task]
    processes: int = 1
    alone: bool = False


class OutOfTime(Exception):
    """The run's time ended before the answer came."""


class Lost(Exception):
    """The worker hung or died."""


class Worker:
    """A process that answers one task at a time."""

    def __init__(self, command: list[str], log: Any):
        self.killed = False
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
        )

    def say(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # what follows finds it dead
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def hear(self, seconds: float, end: float) -> dict[str, Any]:
        """Returns the next line; raises Lost, or OutOfTime if `end` came first."""
        left = min(seconds, end - time.time())
        timer = threading.Timer(max(0, left), self.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if line.endswith("\n"):
            return json.loads(line)
        status = self.process.wait()
        if not self.killed:
            raise Lost(f"its process ended with status {status}")
        if left < seconds:
            raise OutOfTime
        raise Lost(f"no answer in {seconds:g} s")

    def kill(self) -> None:
        self.killed = True
        self.process.kill()

    def close(self) -> None:
        """Ends it, once or again; one that has answered ends when its input does."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        timer = threading.Timer(20, self.process.kill)
        timer.start()
        self.process.wait()
        timer.cancel()
        self.process.stdout.close()


class Turns:
    """The GPU's: of many that compile, or of one that runs; who wants to run comes first."""

    def __init__(self):
        self.change = threading.Condition()
        self.compiling, self.waiting, self.running = 0, 0, False

    @contextlib.contextmanager
    def compile(self, end: float) -> Iterator[None]:
        """Waits until none runs or wants to; raises OutOfTime at `end`."""
        with self.change:
            self._wait(lambda: not self.running and not self.waiting, end)
            self.compiling += 1
        try:
            yield
        finally:
            with self.change:
                self.compiling -= 1
                self.change.notify_all()

    @contextlib.contextmanager
    def run(self, end: float) -> Iterator[None]:
        """Waits until none runs or compiles; raises OutOfTime at `end`."""
        with self.change:
            self.waiting += 1
            try:
                self._wait(lambda: not self.running and not self.compiling, end)
                self.running = True
            finally:
                self.waiting -= 1
                self.change.notify_all()
        try:
            yield
        finally:
            with self.change:
                self.running = False
                self.change.notify_all()

    def _wait(self, free: Callable[[], bool], end: float) -> None:
        if not self.change.wait_for(free, timeout=max(0, end - time.time())):
            raise OutOfTime


class Run:
    """One run over lanes of tasks."""

    def __init__(
        self,
        command: list[str],
        out: Path,
        end: float,
        seconds: Callable[[Task], tuple[float, float]],
        size: Callable[[Task], int] = lambda task: 0,
    ):
        """Prepares a run.

        Args:
          command: The command that starts a worker.
          out: Rows are appended here; what workers print, to the same name with .log.
          end: The time when the run ends, as time.time() counts.
          seconds: A task's time to compile and on the GPU, after which it hangs.
          size: The device bytes that a task takes.
        """
        self.command, self.out, self.end = command, out, end
        self.seconds, self.size = seconds, size
        self.turns, self.lock = Turns(), threading.Lock()
        self.workers: set[Worker] = set()

    def __call__(self, lanes: list[Lane]) -> None:
        """Runs until all tasks have a row or the time is over."""
        self.out.parent.mkdir(parents=True, exist_ok=True)  # for the log
        threads = [
            threading.Thread(target=self._work, args=(lane,), daemon=True)
            for lane in lanes
            for _ in range(min(lane.processes, len(lane.tasks)))
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        finally:  # of an interrupted run
            for worker in list(self.workers):
                worker.kill()

    def _work(self, lane: Lane) -> None:
        worker = None
        with open(f"{self.out}.log", "a") as log:
            while (task := self._take(lane)) is not None:
                if worker is None:
                    worker = Worker(self.command, log)
                    self.workers.add(worker)
                last = lane.alone or self.size(task) > LARGE_BYTES
                try:
                    row, clean = self._answer(worker, task, last)
                except Lost as lost:
                    row, clean = {"failed": str(lost), "lost": True}, False
                except OutOfTime:
                    break
                with self.lock:
                    append_row(self.out, task | row)
                if last or not clean:
                    self._end(worker)
                    worker = None
        if worker is not None:
            self._end(worker)

    def _take(self, lane: Lane) -> Task | None:
        with self.lock:
            over = time.time() >= self.end or not lane.tasks
            return None if over else lane.tasks.pop(0)

    def _answer(
        self, worker: Worker, task: Task, last: bool
    ) -> tuple[dict[str, Any], bool]:
        """Returns the figures, and whether the process may go on after them."""
        to_compile, to_run = self.seconds(task)
        with self.turns.compile(self.end):
            worker.say(json.dumps(task))
            answer = worker.hear(to_compile, self.end)
        if "ready" not in answer:  # it did not come to use the GPU
            return answer, True
        with self.turns.run(self.end):
            worker.say("go")
            answer = worker.hear(to_run, self.end)
            if last:  # its memory is free before the next one runs
                worker.close()
        return answer, "failed" not in answer

    def _end(self, worker: Worker) -> None:
        if worker.process.poll() is None and time.time() >= self.end:
            worker.kill()
        worker.close()
        self.workers.discard(worker)


def outstanding(
    tasks: list[Task], rows: list[dict[str, Any]], retry_lost: bool = False
) -> list[Task]:
    """Returns the tasks that have no row yet.

    Failures are tried again; what hung or died only if `retry_lost`.
    """
    done = [r for r in rows if "failed" not in r or (r.get("lost") and not retry_lost)]
    return [t for t in tasks if not any(t.items() <= row.items() for row in done)]


def serve(handle: Callable[[Task, Callable[[], Any]], dict[str, Any]]) -> None:
    """Answers tasks until the standard input ends; the worker's side.

    Args:
      handle: (task, turn) -> figures. What uses the GPU goes inside `with turn():`.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not for the parent

    def say(**figures: Any) -> None:
        answers.write(json.dumps(figures) + "\n")
        answers.flush()

    @contextlib.contextmanager
    def turn() -> Iterator[None]:
        say(ready=True)
        if sys.stdin.readline() != "go\n":
            os._exit(0)
        yield

    for line in iter(sys.stdin.readline, ""):
        try:
            figures = handle(json.loads(line), turn)
        except Exception as error:
            figures = {"failed": f"{type(error).__name__}: {str(error)[:600]}"}
        say(**figures)
