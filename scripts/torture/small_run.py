"""The small run that the programs here break: what is trained, and what it ends with."""

import json
import subprocess
import sys
from pathlib import Path

from qlora_jax.train.metrics import read_metrics

ASSETS = Path(__file__).parents[2] / "qlora_jax" / "assets"
MEASURED = ("step", "loss", "grad_norm", "learning_rate", "tokens", "eval_loss")


def flags(out: Path, steps: int, *more: str) -> list[str]:
    """Returns the command's words for a run on the embedded model.

    Args:
      out: The run's folder.
      steps: Steps to take.
      *more: Words after these.
    """
    words = ["train", "--model", ASSETS / "base", "--data", ASSETS / "train.jsonl"]
    words += ["--out", out, "--lora.rank", 4, "--lora.dropout", 0.1]
    words += [
        "--lora.targets",
        "q_proj",
        "--data.max-tokens",
        32,
        "--data.eval-rows",
        8,
    ]
    words += ["--train.max-steps", steps, "--train.save-every", 2]
    words += ["--train.eval-every", 4, "--train.compute-dtype", "float32"]
    if "--train.micro-batch" not in more:
        more = ("--train.micro-batch", "8", "--train.grad-accum", "1", *more)
    return [*map(str, words), *more]


def start(words: list[str], log: Path) -> subprocess.Popen:
    """Starts the command; what it says is added to a file."""
    with log.open("ab") as stream:
        command = [sys.executable, "-m", "qlora_jax.cli.main", *words]
        return subprocess.Popen(command, stdout=stream, stderr=stream)


def next_words(out: Path, steps: int, *more: str) -> list[str]:
    """Returns the words that go on with a run, or begin it where nothing is saved yet."""
    if (out / "checkpoints").is_dir() and any(
        path.name.isdigit() for path in (out / "checkpoints").iterdir()
    ):
        return ["train", "--resume", str(out)]
    return [*flags(out, steps, *more), "--overwrite"]


def ended_with(out: Path) -> tuple[list, dict]:
    """Returns a run's metrics that do not depend on the clock, and its arrays' digests."""
    rows = [
        [row.get(name) for name in MEASURED]
        for row in read_metrics(out / "metrics.jsonl")
    ]
    return rows, json.loads((out / "adapter" / "adapter.json").read_text())["sha256"]
