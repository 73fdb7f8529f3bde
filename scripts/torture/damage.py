"""Damages the newest checkpoint of a small run in every way: is it named, and the older used?

    python -m scripts.torture.damage --flips 1000 --append scripts/results/torture.jsonl

Each file is deleted, emptied, cut in half and zeroed, and bits are flipped at places that are
drawn by the seed. The run is then restored, which has to name the file and give the state of
the older checkpoint, bit for bit. For some of each kind the run is resumed to its end, which
has to be that of the run that was not harmed.
"""

import logging
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from qlora_jax.cli import train
from qlora_jax.cli.main import main as qlora
from qlora_jax.train.loop import Trainer
from scripts.bench import harness
from scripts.torture.small_run import ended_with, flags

STEPS = 6
WHOLE_RESUMES = 2
"""So many runs of each kind of damage are resumed to their end."""


class Heard(logging.Handler):
    """Keeps what is logged.

    Attributes:
      text: All of it since it was last emptied.
    """

    def __init__(self):
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Takes a message."""
        self.text += record.getMessage() + "\n"


def trainer_of(run: Path) -> Trainer:
    """Returns what resumes a run."""
    args = train.parse(["--resume", str(run)], "qlora train")
    source, quant = train.open_base(args, run, resume=True)
    rows, held = train.checked_rows(args, source)
    model, lora, _, _ = train.adapted(args, source, quant, rows, resume=True)
    more = {"evaluation": held, "lora": lora}
    identity = train.identity(args, source)
    return Trainer(model, rows, args.train, run, identity=identity, **more)


def harms(
    path: Path, flips: int, chance: random.Random
) -> Iterator[tuple[str, bytes | None]]:
    """Yields (kind of damage, what a file has then; None where it is deleted)."""
    data = path.read_bytes()
    yield "deleted", None
    yield "emptied", b""
    if len(data) > 1:
        yield "cut", data[: len(data) // 2]
    if data.strip(b"\0"):
        yield "zeroed", bytes(len(data))
    for _ in range(flips):
        changed = bytearray(data)
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        yield "bit flipped", bytes(changed)


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    """Whether two states are equal, bit for bit."""
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def main() -> None:
    """Runs."""
    parser = harness.parser(__doc__)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    heard, chance = Heard(), random.Random(args.seed)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as root:
        run = Path(root) / "run"
        if qlora([*flags(run, STEPS), "--debug"]):
            sys.exit("the run failed")
        wanted, whole = ended_with(run), shutil.copytree(run, Path(root) / "whole")
        shutil.rmtree(run / "adapter")
        newest = run / "checkpoints" / str(STEPS)
        older = max(
            int(x.name) for x in newest.parent.iterdir() if x.name != newest.name
        )
        trainer = trainer_of(run)
        logging.getLogger("qlora_jax").addHandler(heard)
        shutil.move(newest, Path(root) / "aside")
        trainer.restore()
        state = [np.array(x) for x in jax.tree.leaves(trainer.state)]
        shutil.move(Path(root) / "aside", newest)
        files = sorted(path for path in newest.rglob("*") if path.is_file())
        for i, path in enumerate(files):
            flips = args.flips * (i + 1) // len(files) - args.flips * i // len(files)
            data, name = path.read_bytes(), path.relative_to(newest).as_posix()
            for kind, damaged in harms(path, flips, chance):
                path.unlink() if damaged is None else path.write_bytes(damaged)
                heard.text = ""
                trainer.restore()
                counts[kind] += 1
                counts["older used"] += trainer.start == older and same(
                    state, jax.tree.leaves(trainer.state)
                )
                counts["named"] += name in heard.text
                path.write_bytes(data)
                if counts[f"{kind}, resumed"] < WHOLE_RESUMES:
                    counts[f"{kind}, resumed"] += 1
                    path.unlink() if damaged is None else path.write_bytes(damaged)
                    equal = not qlora(["train", "--resume", str(run)])
                    counts["resumed bit-equal"] += equal and ended_with(run) == wanted
                    shutil.rmtree(run)
                    shutil.copytree(whole, run)
    harms_in_all = sum(
        counts[kind] for kind in ("deleted", "emptied", "cut", "zeroed", "bit flipped")
    )
    counts["harms"] = harms_in_all
    harness.record(
        "damage",
        args.append,
        command=harness.command("torture.damage"),
        seed=args.seed,
        files=len(files),
        **counts,
    )
    resumed = sum(n for kind, n in counts.items() if kind.endswith(", resumed"))
    lost = harms_in_all - min(counts["older used"], counts["named"])
    sys.exit(bool(lost or counts["resumed bit-equal"] != resumed))


if __name__ == "__main__":
    main()
