"""Damages good inputs of every reader, and counts how reading them ends.

    python -m scripts.torture.fuzz --reader config --cases 1000 --seed 0
    python -m scripts.torture.fuzz --seconds 600 --append scripts/results/torture.jsonl
    python -m scripts.torture.fuzz --short

An input may be read, or refused by an error of qlora_jax or of the file system. Anything else
counts as a traceback; 20 seconds are slow, 1 GiB of memory is large. Reader, seed and number
of a case are all that it follows from: `--reader R --seed S --case N` runs one again, and
shows what it ended in.
"""

import collections
import contextlib
import faulthandler
import gc
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from scripts.bench import harness

SLOW_SECONDS = 20
LARGE_BYTES = 1 << 30
_SPARE_BYTES = 6 << 30
"""Address space beyond what the process has: more is a MemoryError, and counts as large."""

_SHORT = 60
"""Cases of each reader in the short form; a tenth of them of a heavy one."""


class Ended(NamedTuple):
    """Says how the reading of one case ended.

    Attributes:
      how: "fine", "refused", "traceback", "slow" or "large".
      what: The error in a line, or where the traceback came from.
      seconds: The time that reading took.
    """

    how: str
    what: str
    seconds: float


class _Slow(BaseException):
    """Reading took too long; no handler of errors takes it for one of its own."""


def _late(*_: Any) -> None:
    raise _Slow


def rng_of(reader: str, seed: int, case: int) -> random.Random:
    """Returns what a case is drawn from."""
    return random.Random(f"{reader}/{seed}/{case}")


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Limits address space while cases run, and ends them by a signal when they are late."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(
        resource.RLIMIT_AS, (harness.held_bytes("VmSize") + _SPARE_BYTES, hard)
    )
    before = signal.signal(signal.SIGALRM, _late)
    # Where one of its reads fails, Orbax drops the others; their errors come up when they
    # are collected, and belong to no case.
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    finally:
        gc.collect()
        sys.unraisablehook = hook
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def run_case(reader: Any, good: Path, folder: Path, rng: random.Random) -> Ended:
    """Damages a copy of a good input, and reads it.

    Args:
      reader: The Reader.
      good: The folder of its good input, which is left as it is.
      folder: An empty folder for the copy.
      rng: From `rng_of`.
    """
    from qlora_jax.errors import QLoRAError

    shutil.copytree(good, folder, dirs_exist_ok=True)
    reader.damage(folder, rng)
    held = harness.held_bytes("VmRSS")
    if harness.held_bytes("VmHWM") - held > LARGE_BYTES // 2:
        harness.forget_peak()
    began = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, SLOW_SECONDS, 1)
    how, what = "fine", ""
    try:
        reader.read(folder)
    except (QLoRAError, OSError) as error:
        how, what = "refused", f"{type(error).__name__}: {error}"
    except _Slow as error:
        how, what = "slow", _signature(error)
    except MemoryError as error:
        how, what = "large", _signature(error)
    except BaseException as error:  # whatever a reader lets through is counted
        if isinstance(error, KeyboardInterrupt):
            raise
        how, what = "traceback", _signature(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.perf_counter() - began
    if harness.held_bytes("VmHWM") - held > LARGE_BYTES:
        how = "large"
        what = what or f"{(harness.held_bytes('VmHWM') - held) >> 20} MiB"
        harness.forget_peak()
    return Ended(how, what, seconds)


def _signature(error: BaseException) -> str:
    """Returns the kind of an error and the last places of ours that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    root = str(harness.ROOT)
    ours = [
        f for f in frames if f.filename.startswith(root) and "/.venv" not in f.filename
    ]
    places = [f"{Path(f.filename).name}:{f.lineno}" for f in ours[-2:]]
    text = str(error)[:80] if isinstance(error, AssertionError) else ""
    return (
        f"{type(error).__name__}{text and ': '}{text} at {' < '.join(reversed(places))}"
    )


def read_good(reader: Any, good: Path, folder: Path) -> None:
    """Reads a copy of a reader's good input, which must end without an error."""
    shutil.copytree(good, folder)
    reader.read(folder)


def run_reader(
    name: str,
    seed: int,
    cases: Iterable[int],
    seconds: float | None = None,
    show: int = 3,
) -> dict[str, Any]:
    """Runs cases of one reader; returns their counts, and the kinds of failure.

    Args:
      name: The reader.
      seed: The seed of all its cases.
      cases: Their numbers.
      seconds: Stops after so long; None runs all.
      show: So many numbers of cases are kept for each kind of failure.
    """
    from scripts.torture.readers import READERS

    reader = READERS[name]
    counts: collections.Counter[str] = collections.Counter()
    failed: dict[str, list[int]] = {}
    longest, began = 0.0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torture-") as scratch:
        good = Path(scratch) / "good"
        good.mkdir()
        reader.make(good)
        read_good(reader, good, Path(scratch) / "whole")
        for case in cases:
            if seconds is not None and time.monotonic() - began > seconds:
                break
            if not counts.total() % 50:  # it starts a thread, which takes its time
                faulthandler.dump_traceback_later(10 * SLOW_SECONDS, exit=True)
            folder = Path(scratch) / "case"
            folder.mkdir()
            ended = run_case(reader, good, folder, rng_of(name, seed, case))
            shutil.rmtree(folder)
            counts[ended.how] += 1
            longest = max(longest, ended.seconds)
            if ended.how not in ("fine", "refused"):
                places = failed.setdefault(f"{ended.how}: {ended.what}", [])
                places.append(case)
    faulthandler.cancel_dump_traceback_later()
    return {
        "reader": name,
        "seed": seed,
        "cases": counts.total(),
        **{
            how: counts[how]
            for how in ("fine", "refused", "traceback", "slow", "large")
        },
        "longest_s": round(longest, 2),
        "failed": {what: [len(n), *n[:show]] for what, n in failed.items()},
    }


def one_again(name: str, seed: int, case: int, keep: Path | None) -> None:
    """Runs one case, and shows what it ended in; keeps its folder if wanted."""
    from scripts.torture.readers import READERS

    reader = READERS[name]
    with tempfile.TemporaryDirectory(prefix="torture-") as scratch:
        good, folder = Path(scratch) / "good", keep or Path(scratch) / "case"
        good.mkdir()
        reader.make(good)
        shutil.copytree(good, folder, dirs_exist_ok=True)
        reader.damage(folder, rng_of(name, seed, case))
        reader.read(folder)
        print("it is read without an error")


def quiet(setenv: Callable[[str, str], Any] = os.environ.__setitem__) -> None:
    """Keeps readers from the network and from the user's own caches."""
    setenv("QLORA_JAX_DATA_CACHE", "off")
    setenv("HF_HUB_OFFLINE", "1")


def main() -> None:
    """Runs what the flags say."""
    parser = harness.parser(__doc__)
    parser.add_argument("--reader", action="append", help="one of them; all without it")
    parser.add_argument("--cases", type=int, default=1000, help="of each reader")
    parser.add_argument("--seconds", type=float, help="all readers share this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--case", type=int, help="runs this one alone, and shows its end"
    )
    parser.add_argument("--keep", type=Path, help="with --case: a folder for its files")
    parser.add_argument(
        "--short", action="store_true", help="a few cases of each reader"
    )
    args = parser.parse_args()
    quiet()
    logging.disable(logging.CRITICAL)
    from scripts.torture.readers import READERS

    names = args.reader or [*READERS]
    if args.case is not None:
        one_again(names[0], args.seed, args.case, args.keep)
        return
    rows = []
    with limited():
        for name in names:
            count = args.cases
            if args.short:
                count = _SHORT // 10 if READERS[name].heavy else _SHORT
            share = args.seconds and args.seconds / len(names)
            cases = range(10**9 if args.seconds else count)
            row = run_reader(name, args.seed, cases, share)
            rows.append(row)
            print(json.dumps({k: v for k, v in row.items() if k != "failed"}))
            for what, places in row["failed"].items():
                print(
                    f"    {places[0]:>6}  {what}  (cases {places[1:]})", file=sys.stderr
                )
            sys.stdout.flush()
    failures = sum(row[how] for row in rows for how in ("traceback", "slow", "large"))
    if args.append:
        _record(rows, args.append)
    sys.exit(1 if failures else 0)


def _record(rows: list[dict[str, Any]], append: Path) -> None:
    total = {
        how: sum(row[how] for row in rows)
        for how in ("cases", "fine", "refused", "traceback", "slow", "large")
    }
    command = harness.command("torture.fuzz")
    harness.record("fuzz", append, command=command, **total, readers=rows)


if __name__ == "__main__":
    main()
