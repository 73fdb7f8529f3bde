"""Trains for thousands of steps on rows of mixed lengths: does memory stay flat?

    python -m scripts.torture.long_run --model FOLDER --append scripts/results/torture.jsonl

A small model trains with evaluations and checkpoints. Along the way it is asked how much
memory the process holds, now and at most, how many arrays live, and how many programs were
compiled. After the first fifth, the warm-up, nothing may be compiled, no more arrays may live,
and the line through what the process holds may rise by `LIMIT_BYTES` in 5,000 steps at most.
"""

import gc
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qlora_jax.adapters import LoRAConfig, attach
from qlora_jax.cli.compile_cache import use_cache
from qlora_jax.config.quant import QuantConfig
from qlora_jax.config.train import TrainConfig
from qlora_jax.data import DataConfig, read_dataset
from qlora_jax.sources.load import load
from qlora_jax.train.loop import Trainer
from scripts.bench import harness
from scripts.torture.small_run import ASSETS

LIMIT_BYTES = 16 << 20
"""The allocators of Python and XLA return memory late, which moves the line by some MiB."""
SAMPLES = 100
COMPILED = "/jax/core/compile/backend_compile_duration"


def main() -> None:
    """Runs."""
    parser = harness.parser(__doc__)
    parser.add_argument("--model", type=Path, default=ASSETS / "base")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    use_cache()
    compiled = 0

    def count(event: str, duration_secs: float, **_: str | int) -> None:
        nonlocal compiled
        compiled += event == COMPILED

    jax.monitoring.register_event_duration_secs_listener(count)
    seen: list[dict[str, int]] = []

    def sample(row: dict[str, Any]) -> None:
        if "loss" in row and row["step"] % max(1, args.steps // SAMPLES) == 0:
            gc.collect()
            seen.append(
                {
                    "step": row["step"],
                    "held_bytes": harness.held_bytes("VmRSS"),
                    "peak_bytes": harness.held_bytes("VmHWM"),
                    "arrays": len(jax.live_arrays()),
                    "compiled": compiled,
                }
            )

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(args.model, Path(folder), args.steps, args.seed, sample)
        run.fit()
        lengths = {_length(run, step) for step in range(args.steps)}
    found = figures(seen)
    harness.record(
        "long_run",
        args.append,
        command=harness.command("torture.long_run"),
        steps=args.steps,
        seed=args.seed,
        seconds=round(time.monotonic() - began),
        lengths=sorted(lengths),
        **found,
        samples=seen[:: max(1, len(seen) // 10)],
    )
    if not found["flat"]:
        sys.exit("memory grows, or programs are compiled after the warm-up")


def trainer(
    base: Path, root: Path, steps: int, seed: int, progress: Any, longest: int = 128
) -> Trainer:
    """Returns what trains on rows of 2 to `longest` tokens, most of them short."""
    model, tokenizer = load(base, QuantConfig())
    assert tokenizer is not None
    chance, rows = random.Random(seed), []
    for _ in range(400):
        words = int(longest / 2.1 * chance.random() ** 3)
        text = " ".join(str(chance.randrange(10)) for _ in range(words))
        rows.append(f'{{"input": "{text}", "output": "{chance.randrange(100)}"}}\n')
    (root / "rows.jsonl").write_text("".join(rows))
    settings = DataConfig(max_tokens=longest)
    dataset = read_dataset((str(root / "rows.jsonl"),), tokenizer, settings)
    train, held = dataset.split(16, seed)
    lora = LoRAConfig(rank=4, dropout=0.1)
    config = TrainConfig(
        max_steps=steps,
        micro_batch=2,
        grad_accum=1,
        save_every=max(1, steps // 20),
        eval_every=max(1, steps // 20),
        compute_dtype="float32",
        seed=seed,
    )
    return Trainer(
        attach(model, lora, key=jax.random.key(seed)),
        train,
        config,
        root / "run",
        evaluation=held,
        lora=lora,
        progress=progress,
    )


def _length(run: Trainer, step: int) -> int:
    return run.batches.at(step)["tokens"].shape[-1]


def figures(seen: list[dict[str, int]]) -> dict[str, Any]:
    """Returns what memory did after the warm-up, and whether it was flat."""
    warm = seen[len(seen) // 5 :]
    steps, held = (np.array([x[key] for x in warm]) for key in ("step", "held_bytes"))
    slope = float(np.polyfit(steps, held, 1)[0])
    first, last = warm[0], warm[-1]
    return {
        "warm_up_steps": first["step"],
        "bytes_a_step": round(slope),
        "held_bytes": [first["held_bytes"], last["held_bytes"]],
        "peak_bytes": [first["peak_bytes"], last["peak_bytes"]],
        "arrays": [first["arrays"], last["arrays"]],
        "compiled": [first["compiled"], last["compiled"]],
        "flat": slope * 5000 <= LIMIT_BYTES
        and first["compiled"] == last["compiled"]
        and last["arrays"] <= first["arrays"],
    }


if __name__ == "__main__":
    main()
