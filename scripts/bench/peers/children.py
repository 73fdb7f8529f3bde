"""Starting the child programs of bench/train_step.py, and racing them.

Children are started one after the other, each building and compiling alone, and all
stay alive. The race then runs in rounds: every child takes its few steps in turn, so
that a slow minute of a shared machine falls on all of them alike.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from scripts.bench.harness import ROOT
from scripts.bench.peers.protocol import Task

SPARE_MEMORY_MIB = 3072
"""No child is started when less than this is free: the others would be killed."""
STDERR_TAIL_LINES = 15
NOISY_SHARE = 0.05
"""A turn during which other programs use more than this share of the processors is disturbed.
PyTorch suffers most from it, tenfold: its threads wait for each other many times a step."""
PAUSE_S = 2
"""Seconds to wait before a disturbed turn is run again."""


class ChildError(RuntimeError):
    """A child ended, or sent something else than was asked for."""


def available_memory_mib() -> float:
    """Returns the kernel's estimate of what new programs can have (Linux)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 1024
    return float("inf")


def busy_cpu_s() -> tuple[float, float]:
    """Returns processor seconds used and in all since boot, steal counted as used."""
    words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    ticks = [int(word) for word in words]
    idle = ticks[3] + ticks[4]
    hertz = os.sysconf("SC_CLK_TCK")
    return (sum(ticks) - idle) / hertz, sum(ticks) / hertz


class Child:
    """One contestant in its own process; `ready` holds what it said when built."""

    def __init__(self, python: str, task: Task):
        """Starts the process and waits until it is built and warm.

        Args:
          python: Interpreter with the contestant's packages.
          task: What the child is to build.

        Raises:
          ChildError: It did not get ready; the message holds the end of its stderr.
        """
        if (free_mib := available_memory_mib()) < SPARE_MEMORY_MIB:
            raise ChildError(
                f"{task.contestant} {task.dtype}: only {free_mib:.0f} MiB are free and"
                f" {SPARE_MEMORY_MIB} must be; race fewer contestants at a time"
            )
        self.task = task
        self.rounds: list[list[float]] = []
        self.others_shares: list[float] = []
        self.stderr = tempfile.TemporaryFile("w+")
        family = task.contestant.split("-")[0]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
        }
        self.process = subprocess.Popen(
            [python, "-m", f"scripts.bench.peers.{family}", json.dumps(asdict(task))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        try:
            self.ready = self.receive("ready")
        except ChildError:
            self.stop()
            raise

    def receive(self, key: str) -> dict:
        """Returns the next message, which must have `key`."""
        line = self.process.stdout.readline()
        if line.startswith("{") and key in (message := json.loads(line)):
            return message
        try:
            self.process.wait(timeout=10)  # its own exit code says more than ours
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.stderr.seek(0)
        tail = "".join(self.stderr.readlines()[-STDERR_TAIL_LINES:])
        raise ChildError(
            f"{self.task.contestant} {self.task.dtype}: expected {key!r},"
            f" got {line!r}; exit code {self.process.returncode}; stderr ends:\n{tail}"
        )

    def run(self, steps: int) -> list[float]:
        """Runs some steps; returns the seconds of each."""
        try:
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # receive says why
        return self.receive("step_s")["step_s"]

    def cpu_s(self) -> float:
        """Returns the processor time the child has used so far (Linux)."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        # Fields 14 and 15; the name before them, in brackets, may hold spaces.
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def finish(self) -> dict:
        """Lets the child end; returns its last message."""
        self.process.stdin.close()
        done = self.receive("done")
        self.stop()
        return done

    def stop(self) -> None:
        """Ends the process, if it still runs."""
        self.process.kill()
        self.process.wait()
        self.stderr.close()


def note(text: str) -> None:
    """Says how far we are, on stderr."""
    print(text, file=sys.stderr, flush=True)


def measure_once(python: str, task: Task) -> dict:
    """Runs a child that only measures (its mode is not "train").

    Args:
      python: Interpreter of the child.
      task: The task, whose mode says what to measure.

    Returns:
      Its figures.
    """
    note(f"measuring {task.contestant} {task.dtype} checkpoint={task.checkpoint}")
    child = Child(python, task)
    child.stop()
    return child.ready


def take_turn(child: Child, steps: int, retries: int) -> float:
    """Runs one turn, and again while other programs disturb it.

    Args:
      child: The child whose turn it is.
      steps: The number of training steps in the turn.
      retries: The most times that a disturbed turn is run again, each after a pause.

    Returns:
      The share of the processors that other programs used during the turn kept.
    """
    for attempt in range(retries + 1):
        used_s = -child.cpu_s()
        busy_before_s, all_before_s = busy_cpu_s()
        step_s = child.run(steps)
        busy_s, all_s = busy_cpu_s()
        used_s += child.cpu_s()
        others_share = (busy_s - busy_before_s - used_s) / (all_s - all_before_s)
        if others_share <= NOISY_SHARE or attempt == retries:
            break
        time.sleep(PAUSE_S)
    child.rounds.append(step_s)
    return max(0.0, others_share)


def race(
    entries: list[tuple[str, Task]], rounds: int, steps: int, retries: int
) -> list[dict]:
    """Builds all contestants, then runs rounds of a few steps each in turn.

    Args:
      entries: Interpreter and task of each contestant; all of one dtype.
      rounds: The number of turns that each contestant gets.
      steps: Training steps a turn.
      retries: The most times that a turn that other programs disturb is run again.

    Returns:
      One row a contestant, in the order given; a failed one has "error" in it.
    """
    children: list[Child] = []
    failed: dict[str, str] = {}
    try:
        for python, task in entries:
            note(f"building {task.contestant} {task.dtype}")
            try:
                children.append(Child(python, task))
            except ChildError as error:
                note(str(error))
                failed[task.contestant] = error.args[0].partition("\n")[0]
        for turn in range(rounds):
            note(f"round {turn + 1} of {rounds}")
            for child in children:
                child.others_shares.append(take_turn(child, steps, retries))
        ended = {child.task.contestant: child.finish() for child in children}
    finally:
        for child in children:
            if child.process.poll() is None:
                child.stop()
    by_name = {child.task.contestant: child for child in children}
    rows = []
    for _, task in entries:
        row = {"contestant": task.contestant, "dtype": task.dtype}
        if task.contestant in failed:
            rows.append(row | {"error": failed[task.contestant]})
            continue
        child = by_name[task.contestant]
        done = ended[task.contestant]
        rows.append(row | timing(child.rounds) | done | child.ready)
        rows[-1]["others_cpu_share"] = statistics.median(child.others_shares)
        rows[-1]["loss_fell"] = done["loss_last"] < done["loss_first"]
    for row in rows:
        if "error" not in row:
            row["vs_ours"] = round_ratio(row, by_name.get("ours-nf4"))
            dense = row["contestant"].split("-")[0] + "-dense"
            row["vs_own_dense"] = round_ratio(row, by_name.get(dense))
    return rows


def timing(rounds: list[list[float]]) -> dict:
    """Returns the median, best, 20th and 80th percentile of all steps, in ms."""
    times_ms = sorted(1000 * step for turn in rounds for step in turn)
    last = len(times_ms) - 1
    return {
        "median_ms": statistics.median(times_ms),
        "best_ms": times_ms[0],
        "p20_ms": times_ms[round(0.2 * last)],
        "p80_ms": times_ms[round(0.8 * last)],
        "round_median_ms": [1000 * statistics.median(turn) for turn in rounds],
    }


def round_ratio(row: dict, other: Child | None) -> float | None:
    """Returns the median over the rounds of this contestant's time over another's."""
    if other is None:
        return None
    theirs_ms = timing(other.rounds)["round_median_ms"]
    pairs = zip(row["round_median_ms"], theirs_ms, strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)
