"""What the programs that give figures share: their flags, turns, children and records.

Imports the standard library alone, as children run in environments without jax too.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")

Row = dict[str, Any]


def parser(about: str | None) -> argparse.ArgumentParser:
    """Returns a parser whose help is a program's own text, with --append."""
    made = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--append", type=Path, help="a file of JSON lines that the record is added to"
    )
    return made


def only_help(about: str | None) -> None:
    """Reads the command line of a program that has no flags but --help."""
    argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()


def take_turns(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    warm_up: int = 1,
    clock: Callable[[], Any] = time.perf_counter,
) -> dict[str, list[Any]]:
    """Times calls in turn, round after round, so that a noisy machine hits all alike.

    Args:
      runs: Calls by name. Each returns only when its work is done.
      rounds: The number of timed rounds, and so of the times returned for each call.
      warm_up: Rounds before those, which compile.
      clock: Returns what a call's time is the difference of.

    Returns:
      {name: [a time of each round]}.
    """
    times: dict[str, list[Any]] = {name: [] for name in runs}
    for _ in range(warm_up + rounds):
        for name, run in runs.items():
            began = clock()
            run()
            times[name].append(clock() - began)
    return {name: taken[warm_up:] for name, taken in times.items()}


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Returns the median of each list."""
    return {name: statistics.median(taken) for name, taken in times.items()}


def median_ratio(times: list[float], others: list[float]) -> float:
    """Returns the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def ran(command: list[Any], **environment: str) -> str:
    """Runs a program to its end; returns what it printed.

    Args:
      command: Its words, paths and numbers among them.
      **environment: Variables beside those of this process.

    Raises:
      SystemExit: It failed. It has said why on the standard error that both share.
    """
    words = [str(word) for word in command]
    environment = {**os.environ, **environment}
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        sys.exit(f"error: {' '.join(words[:4])} ... ended with {done.returncode}")
    return done.stdout


def told(command: list[Any], **environment: str) -> Row:
    """Runs a program, as `ran` does; returns the JSON of its last line."""
    return json.loads(ran(command, **environment).splitlines()[-1])


def worker(program: str, *words: Any, python: str = sys.executable) -> list[Any]:
    """Returns the command that starts this program again, as a worker.

    Args:
      program: Its name in this folder.
      *words: What --worker takes. The flags of this process come before it.
      python: The worker's interpreter.
    """
    flags = sys.argv[1:]
    return [python, "-m", f"scripts.bench.{program}", *flags, "--worker", *words]


def held_bytes(field: str) -> int:
    """Returns a memory field of this process's /proc status, such as VmRSS (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise ValueError(f"/proc/self/status has no {field}")


def forget_peak() -> bool:
    """Makes the kernel count VmHWM afresh; returns whether it lets us (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a file of JSON lines; [] where there is none.

    A line that a killed run left half written is passed over.
    """
    rows = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def append_row(path: Path, row: Row) -> None:
    """Adds a row; a line that a killed run left half written ends first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                stream.write(b"\n")
        stream.write(json.dumps(row).encode() + b"\n")


def commit() -> str:
    """Returns the short name of the checkout's commit; "" where it is none."""
    asked = ["git", "rev-parse", "--short", "HEAD"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, cwd=ROOT)
    except OSError:  # no git
        return ""
    return said.stdout.strip()


def versions(*packages: str) -> dict[str, str]:
    """Returns the versions of those packages that are installed, and Python's."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command(module: str, words: list[str] | None = None) -> str:
    """Returns how a program was started, with file names for whole paths.

    Where things lie on one machine is nobody else's business.
    """
    shown = []
    for word in sys.argv[1:] if words is None else words:
        flag, equals, value = word.rpartition("=")
        value = Path(value).name if value[:1] == "/" else value
        shown.append(flag + equals + value)
    return " ".join([f"python -m scripts.{module}", *shown])


def today() -> str:
    """Returns the date in UTC, as 2026-11-30."""
    return datetime.now(UTC).strftime("%Y-%m-%d")


def record(benchmark: str, append: Path | None, **figures: Any) -> Row:
    """Prints figures as one JSON line, with all that says where they are from.

    Args:
      benchmark: The program's name in this folder.
      append: The line is added to this file as well.
      **figures: What was measured. A field of that name replaces the record's own.
    """
    import jax

    row = {
        "benchmark": benchmark,
        "command": command(f"bench.{benchmark}"),
        "date": today(),
        "commit": commit(),
        "device": jax.devices()[0].device_kind,
        "cpu": cpu_model(),
        "versions": versions(*PACKAGES),
        **figures,
    }
    if append:
        append_row(append, row)
    print(json.dumps(row))
    return row


def cpu_model() -> str:
    """Returns the processor's name and the cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {len(os.sched_getaffinity(0))} cores"
