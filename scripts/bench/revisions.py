"""Is this revision slower than another one? Both are timed in turns, in one run.

    git worktree add OTHER REVISION
    python -m scripts.bench.revisions OTHER --append scripts/results/revisions.jsonl

Times are seconds of the processors of a process for each tree; a ratio is this tree's over
the other's, the median of the rounds' ratios, with the quartiles beside. Compiling includes
the step that follows it. What is timed is in peers/revision.py. Ratios of what XLA counts of
the compiled steps come first: no noise of the machine is in them.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scripts.bench import harness

ROUNDS = {"compile 4 layers": 4, "compile 32 layers": 3}
"""Turns of what takes long, where it is not --rounds."""


class Child:
    """A process that times one tree."""

    def __init__(self, tree: Path, folder: str):
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        self.process = subprocess.Popen(
            [sys.executable, "-P", Path(__file__).parent / "peers/revision.py", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.names, self.programs = json.loads(self._line())

    def _line(self) -> str:
        assert self.process.stdout
        if line := self.process.stdout.readline():
            return line
        sys.exit("error: a tree's process ended; it has said why above")

    def time(self, name: str) -> float:
        """Returns the seconds of one call."""
        assert self.process.stdin
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        return float(self._line())


def taken(here: Child, there: Child, name: str, first: bool) -> tuple[float, float]:
    """Returns the seconds of both; going second makes a difference, so that takes turns."""
    if first:
        return here.time(name), there.time(name)
    other = there.time(name)
    return here.time(name), other


def commit(tree: Path) -> str:
    """Returns the short hash that a tree is at."""
    return harness.ran(["git", "-C", tree, "rev-parse", "--short", "HEAD"]).strip()


def main() -> None:
    """Runs the benchmark; prints a table and one JSON line."""
    parser = harness.parser(__doc__)
    parser.add_argument("other", type=Path, help="a tree of the other revision")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--only", nargs="+", help="what to time; all if left out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        here = Child(harness.ROOT, f"{root}/here")
        there = Child(args.other.resolve(), f"{root}/there")
        figures: dict[str, Any] = {"programs": here.programs}
        for name, own in here.programs.items():
            other = there.programs[name]
            same = [f"{what} {own[what] / other[what]:.4f}" for what in own]
            print(f"{name:<24}{', '.join(same)}", flush=True)
        figures["other_programs"] = there.programs
        for name in args.only or here.names:
            pairs = [
                taken(here, there, name, first=turn % 2 == 0)
                for turn in range(min(args.rounds, ROUNDS.get(name, args.rounds)))
            ]
            low, middle, high = statistics.quantiles(a / b for a, b in pairs)
            figures[name] = {
                "ratio": middle,
                "quartiles": [low, high],
                "seconds": statistics.median(a for a, _ in pairs),
            }
            print(f"{name:<24}{middle:.3f}  ({low:.3f} to {high:.3f})", flush=True)
    harness.record(
        "revisions",
        args.append,
        other=commit(args.other),
        rounds=args.rounds,
        **figures,
    )


if __name__ == "__main__":
    main()
