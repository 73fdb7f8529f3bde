"""The small run that the programs here break: what is trained, and what it ends with."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from qlora_jax.train.metrics import read_metrics

ASSETS = Path(__file__).parents[2] / "qlora_jax" / "assets"
MEASURED = ("step", "loss", "grad_norm", "learning_rate", "tokens", "eval_loss")


def flags(out: Path, steps: int) -> list[str]:
    """Returns the command's words for a run on the embedded model."""
    words = ["train", "--model", ASSETS / "base", "--data", ASSETS / "train.jsonl"]
    words += [
        "--out",
        out,
        "--lora.rank",
        4,
        "--lora.dropout",
        0.1,
        "--data.max-tokens",
        32,
    ]
    words += [
        "--train.max-steps",
        steps,
        "--train.save-every",
        2,
        "--data.eval-rows",
        16,
    ]
    words += [
        "--train.eval-every",
        4,
        "--train.micro-batch",
        8,
        "--train.grad-accum",
        1,
    ]
    words += ["--train.compute-dtype", "float32"]
    return [str(word) for word in words]


def start(words: list[str], log: Path) -> subprocess.Popen:
    """Starts the command; what it says is added to a file."""
    with log.open("ab") as stream:
        command = [sys.executable, "-m", "qlora_jax.cli.main", *words]
        return subprocess.Popen(command, stdout=stream, stderr=stream)


def next_words(out: Path, steps: int) -> list[str]:
    """Returns the words that go on with a run, or that begin it where there is nothing yet."""
    if (out / "checkpoints").is_dir() and any(
        path.name.isdigit() for path in (out / "checkpoints").iterdir()
    ):
        return ["train", "--resume", str(out)]
    if out.exists():  # nothing was saved
        shutil.rmtree(out)
    return flags(out, steps)


def ended_with(out: Path) -> tuple[list, dict]:
    """Returns a run's metrics that do not depend on the clock, and its arrays' digests."""
    rows = [
        [row.get(name) for name in MEASURED]
        for row in read_metrics(out / "metrics.jsonl")
    ]
    return rows, json.loads((out / "adapter" / "adapter.json").read_text())["sha256"]
