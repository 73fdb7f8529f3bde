"""Kills a small run with SIGKILL, over and over, and resumes it: is anything ever lost?

    python -m scripts.torture.kills --kills 200 --append scripts/results/torture.jsonl

A chain is one run that is killed at random moments, from the import of the first module to
the report, until it has ended or was killed `--each` times; it is then let go to its end. Its
metrics, eval losses, learning rates and adapter have to be those of a run that was never
stopped, bit for bit. The seed of the moments is printed.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from scripts.bench import harness
from scripts.torture.small_run import ended_with, flags, next_words, start


def main() -> None:
    """Runs."""
    parser = harness.parser(__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--each", type=int, default=12, help="kills of one run")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="begin no chain after so many")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        whole, log = Path(root) / "whole", Path(root) / "log"
        seconds = 0.0
        for out in (whole, Path(root) / "again"):  # the second finds programs compiled
            began = time.monotonic()
            if start(flags(out, args.steps), log).wait():
                sys.exit(log.read_text())
            seconds = time.monotonic() - began
        wanted = ended_with(whole)
        counts: Counter[str] = Counter()
        chance, began = random.Random(args.seed), time.monotonic()
        end = began + 60 * (args.minutes or float("inf"))
        while counts["kills"] < args.kills and time.monotonic() < end:
            out = Path(root) / f"run{counts['chains']}"
            _chain(out, args, seconds, chance, counts)
            found = ended_with(out)
            counts["chains"] += 1
            counts["bit_equal"] += found == wanted
            print(dict(counts), file=sys.stderr)
    harness.record(
        "kills",
        args.append,
        command=harness.command("torture.kills"),
        seed=args.seed,
        steps=args.steps,
        **counts,
    )
    sys.exit(counts["bit_equal"] != counts["chains"])


def _chain(
    out: Path,
    args: argparse.Namespace,
    seconds: float,
    chance: random.Random,
    counts: Counter[str],
) -> None:
    """Kills one run at random moments, and lets it end."""
    log = out.with_suffix(".log")
    for _ in range(args.each):
        child = start(next_words(out, args.steps), log)
        try:
            status = child.wait(timeout=chance.uniform(0, 1.1 * seconds))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
            counts["kills"] += 1
            counts[f"after {_last(out)}"] += 1
            continue
        if status:
            sys.exit(f"a resumed run ended with {status}:\n{log.read_text()}")
        return
    if status := start(next_words(out, args.steps), log).wait():
        sys.exit(f"the last resume ended with {status}:\n{log.read_text()}")


def _last(out: Path) -> str:
    """Says how far a killed run was."""
    if not out.is_dir():
        return "importing"
    if (out / "report.html").exists():
        return "the report"
    if (out / "adapter").is_dir():
        return "the adapter"
    return "checkpoints" if (out / "checkpoints").is_dir() else "config.toml"


if __name__ == "__main__":
    main()
