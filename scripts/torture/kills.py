"""Kills qlora with SIGKILL through its whole life: is anything ever lost, or mixed?

    python -m scripts.torture.kills --kills 200 --append scripts/results/torture.jsonl

What is killed is `qlora train` in five settings, from the import of the first module to the
report, and the commands that overwrite an earlier output. Half of the kills come at any moment
of a process, half at any moment after it has first changed something on the disk. The seed of
the moments is printed.

Each output in turn has `--each` processes that are killed, unless they have ended before, and
one that comes to its end. A run goes on after each kill, and has to end with the metrics, eval
losses, learning rates, adapter and base of a run that was never stopped, bit for bit. An output
that was being overwritten has to be the old one or the new one after each kill, byte for byte,
or be refused when it is opened; and the same command has to make the new one of it. Nothing may
be left over in either.
"""

import argparse
import hashlib
import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from qlora_jax import digests
from scripts.bench import harness
from scripts.torture import overwrites
from scripts.torture.overwrites import answer, call, must, placed
from scripts.torture.small_run import ASSETS, ended_with, next_words, start

SETTINGS = {
    "train": (),
    "train, adamw8bit": ("--train.optimizer", "adamw8bit"),
    "train, pissa": ("--lora.init", "pissa"),
    "train, offloaded and streamed": ("--train.offload", "--train.stream"),
    "train, accumulated": ("--train.micro-batch", "4", "--train.grad-accum", "2"),
}
"""What a run is trained with besides the words of every small run."""
COMMANDS = ("quantize", "merge", "peft", "gguf")
"""Kinds of `overwrites.cases`."""


class Life(NamedTuple):
    """An output, and the command that makes it.

    Attributes:
      name: What it is called in the record.
      place: Where it is made; nothing else is in the folder above.
      words: What makes it, or goes on with what is there.
      found: What is there now, to be compared.
      old: A copy of an earlier output that it replaces.
      opens: What opens it; it is tried where the output is neither the old nor the new one.
    """

    name: str
    place: Path
    words: Callable[[], list[str]]
    found: Callable[[], Any]
    old: Path | None = None
    opens: tuple[Any, ...] = ()

    def reset(self) -> None:
        """Puts the old output in place, or nothing."""
        if self.place.parent.exists():
            shutil.rmtree(self.place.parent)
        self.place.parent.mkdir(parents=True)
        if self.old is not None:
            _copy(self.old, self.place)


class Whole(NamedTuple):
    """What a life is that nobody ends.

    Attributes:
      ends: What its output is then.
      seconds, first: How long it lasts, and until it changes something on the disk.
    """

    ends: Any
    seconds: float
    first: float


def main() -> None:
    """Runs."""
    parser = harness.parser(__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--each", type=int, default=8, help="kills of one output")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--minutes", type=float, help="begin no output anew after so many"
    )
    parser.add_argument("--lives", nargs="*", help="some of them, by name")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        counts = _killed(_lives(root, args), root / "log", args)
    total = sum(counts.values(), Counter())
    harness.record(
        "kills",
        args.append,
        command=harness.command("torture.kills"),
        seed=args.seed,
        steps=args.steps,
        **total,
        lives={name: dict(one) for name, one in counts.items()},
    )
    wrong = ("lost", "traceback", "left over", "after it is mixed")
    sys.exit(any(total[name] for name in wrong))


def _lives(root: Path, args: argparse.Namespace) -> list[Life]:
    wanted = args.lives or [*SETTINGS, *COMMANDS]
    lives = [
        _training(name, root / name / "run", args.steps, more)
        for name, more in SETTINGS.items()
        if name in wanted
    ]
    if kinds := [kind for kind in COMMANDS if kind in wanted]:
        cases = overwrites.cases(ASSETS / "base", root)
        lives += [_overwriting(kind, root, *cases[kind]) for kind in kinds]
    return lives


def _training(name: str, out: Path, steps: int, more: tuple[str, ...]) -> Life:
    def found() -> Any:
        return ended_with(out), _digest(out / "base"), _names(out)

    return Life(name, out, lambda: next_words(out, steps, *more), found)


def _overwriting(kind: str, root: Path, old: list, new: list, opens: list) -> Life:
    place = root / kind / ("out.gguf" if kind == "gguf" else "out")
    place.parent.mkdir()
    must(*placed(old, place))
    before = root / "before" / kind / place.name
    _copy(place, before)
    words = [*map(str, placed(new, place)), "--overwrite"]
    return Life(kind, place, lambda: words, lambda: _digest(place), before, (*opens,))


def _killed(
    lives: list[Life], log: Path, args: argparse.Namespace
) -> dict[str, Counter[str]]:
    """Kills each life in turn; returns how often each thing was found, by life."""
    counts: dict[str, Counter[str]] = {life.name: Counter() for life in lives}
    wholes = [_never_killed(life, log) for life in lives]
    chance, began = random.Random(args.seed), time.monotonic()
    end = began + 60 * (args.minutes or float("inf"))
    for life, whole in itertools.cycle(zip(lives, wholes, strict=True)):
        kills = sum(one["kills"] for one in counts.values())
        if kills >= args.kills or time.monotonic() > end:
            return counts
        _in_turn(life, whole, min(args.each, args.kills - kills), chance, counts, log)
        print(life.name, dict(counts[life.name]), file=sys.stderr, flush=True)
    return counts


def _never_killed(life: Life, log: Path) -> Whole:
    """Lets a life go to its end, twice; the second finds programs compiled."""
    wholes = []
    for _ in range(2):
        life.reset()
        before, began = _listing(life.place), time.monotonic()
        child, first = start(life.words(), log), None
        while child.poll() is None:
            if first is None and _listing(life.place) != before:
                first = time.monotonic() - began
            time.sleep(0.005)
        if child.returncode:
            sys.exit(f"{life.name} ended with {child.returncode}:\n{log.read_text()}")
        seconds = time.monotonic() - began
        wholes.append(Whole(life.found(), seconds, first or seconds))
    if wholes[0].ends != wholes[1].ends:
        sys.exit(f"{life.name}: two that were never stopped differ")
    if said := _wrong(life.place):
        sys.exit(f"{life.name}: {said}")
    print(life.name, [round(x, 1) for x in wholes[1][1:]], "s", file=sys.stderr)
    return wholes[1]


def _in_turn(
    life: Life,
    whole: Whole,
    kills: int,
    chance: random.Random,
    counts: dict[str, Counter[str]],
    log: Path,
) -> None:
    """Kills some of an output's makers at random moments, and lets the last go to its end."""
    count = counts[life.name]
    life.reset()
    for i in range(kills + 1):
        log.write_bytes(b"")
        status = _ended(life, whole, chance, log, kill=i < kills)
        if status is None:
            count["kills"] += 1
            count[f"after {_looked_at(life, whole)}"] += 1
        elif status:
            _refused(life, status, log, count)
        else:
            _judge(life, whole, count)
        if status == 0 or (life.old is not None and life.found() == whole.ends):
            life.reset()


def _judge(life: Life, whole: Whole, count: Counter[str]) -> None:
    """Compares what a process that came to its end has made with what it should be."""
    same = life.found() == whole.ends and not _wrong(life.place)
    left = _left_over(life)
    count["ended equal"] += same
    count["lost"] += not same
    count["left over"] += bool(left)
    if left or not same:
        print(f"{life.name}: equal {same}, left over {left}", file=sys.stderr)


def _ended(
    life: Life, whole: Whole, chance: random.Random, log: Path, kill: bool
) -> int | None:
    """Starts a process; returns its status, or None where it was killed before its end."""
    before, at_once = _listing(life.place), chance.random() < 0.5
    child = start(life.words(), log)
    if not kill:
        return child.wait()
    if not at_once:
        while child.poll() is None and _listing(life.place) == before:
            time.sleep(0.002)
    longest = whole.seconds if at_once else whole.seconds - whole.first
    try:
        return child.wait(timeout=chance.uniform(0, 1.05 * longest))
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return None


def _looked_at(life: Life, whole: Whole) -> str:
    """Says what a killed process has left."""
    if life.old is None:
        return _how_far(life.place)
    before = _digest(life.old)
    if (found := life.found()) in (before, whole.ends) and not _wrong(life.place):
        return "the old is there" if found == before else "the new is there"
    status, said = answer([*life.opens], life.place)
    print(f"{life.name}, neither old nor new: {said}", file=sys.stderr)
    return "it is refused" if status == 2 else "it is mixed"


def _how_far(out: Path) -> str:
    """Says how far a killed run was."""
    if not out.is_dir():
        return "importing"
    if (out / "report.html").exists():
        return "the report"
    if (out / "adapter").is_dir():
        return "the adapter"
    return "checkpoints" if (out / "checkpoints").is_dir() else "config.toml"


def _refused(life: Life, status: int, log: Path, count: Counter[str]) -> None:
    """Counts a command that did not go on after a kill; what it said is shown."""
    # It is shown to people at most, so bytes that are no text may be replaced.
    said = log.read_text(errors="replace").strip().rpartition("\n")[2]
    count["refused by name" if said.startswith("error: ") else "traceback"] += 1
    print(f"{life.name} ended with {status}: {said}", file=sys.stderr)


def _wrong(place: Path) -> str:
    """Opens an output and compares it with its digests; says what is wrong with it."""
    verify = [] if place.is_file() else ["--verify"]
    status, said = call("inspect", *verify, place)
    return said if status else ""


def _listing(place: Path) -> list[str]:
    """Returns the names beside an output and in it."""
    inside = os.listdir(place) if place.is_dir() else []
    return sorted([*os.listdir(place.parent), *inside])


def _left_over(life: Life) -> list[str]:
    """Returns the names beside and in an output of what killed processes were writing."""
    others = [x.name for x in life.place.parent.iterdir() if x != life.place]
    hidden = [
        name
        for name in _names(life.place)
        if ".partial" in name or name.startswith(".") or name == "run.lock"
    ]
    return others + hidden


def _names(out: Path) -> list[str]:
    """Returns what is in a run's folder and in that of its checkpoints."""
    if not out.is_dir():
        return []
    inside = out / "checkpoints"
    steps = os.listdir(inside) if inside.is_dir() else []
    return sorted([*os.listdir(out), *steps])


def _digest(path: Path) -> str:
    """Returns a digest of a file, or of a folder's; "" where there is none.

    Orbax gives the files of arrays other names each time. An adapter.json has the digests of
    the arrays, and `_wrong` compares them.
    """
    found, files = hashlib.sha256(), [path]
    if path.is_dir():
        files = sorted(x for x in path.rglob("*") if x.is_file())
    elif not path.exists():
        return ""
    for one in files:
        name = one.relative_to(path)
        if "arrays" not in name.parts and name.name != digests.NAME:
            found.update(str(name).encode() + one.read_bytes())
    return found.hexdigest()


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)


if __name__ == "__main__":
    main()
