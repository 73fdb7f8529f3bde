"""Measures padding, and how long batches take to plan and to make.

    python -m scripts.bench.packing --model DIR --data FILE [--columns input=question ...]
        [--rows 10000000] [--append FILE]

--data has rows (such as shared/data/gsm8k's) whose padding is measured as they are drawn, by
length and packed, at the settings that `qlora train` has by default. Then an epoch of --rows
rows, drawn from those, is planned; memory is what the process takes at most above what it
held before, the list of rows included. A batch's time is the median of 200 in order.
"""

import statistics
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np

from qlora_jax.config.train import TrainConfig
from qlora_jax.data import DataConfig, Dataset, read_dataset
from qlora_jax.data.batches import Batches, Resolved
from qlora_jax.sources.source import open_source
from scripts.bench import harness

STEPS = 200


def made(dataset: Dataset, packing: Resolved) -> Batches:
    """Returns a run's batches at the default settings."""
    train = TrainConfig()
    return dataset.batches(
        documents=train.micro_batch * train.grad_accum,
        micro_batch=train.micro_batch,
        seed=0,
        packing=packing,
    )


def figures_of(dataset: Dataset, packing: Resolved) -> dict[str, Any]:
    """Returns what batches are, and how long they take."""
    may_forget = harness.forget_peak()
    before = harness.held_bytes("VmRSS")
    began = time.perf_counter()
    batches = made(dataset, packing)
    planned = time.perf_counter() - began
    peak = harness.held_bytes("VmHWM") - before
    times = []
    for step in range(STEPS):
        began = time.perf_counter()
        batches.at(step)
        times.append(time.perf_counter() - began)
    began = time.perf_counter()
    batches.at(2 * batches.steps(1) + 1)
    return {
        "lengths": batches.lengths if packing != "drawn" else len(batches.lengths),
        "rows_per_step": batches.rows,
        "documents_per_step": round(batches.documents, 3),
        "steps": batches.steps(1),
        "padding": round(batches.padding, 4),
        "plan_s": round(planned, 3),
        "plan_peak_mib": peak >> 20 if may_forget else None,
        "batch_ms": round(1000 * statistics.median(times), 3),
        "batch_two_epochs_on_s": round(time.perf_counter() - began, 3),
    }


def main() -> None:
    """Runs the benchmark; prints one JSON line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--columns", nargs="*", default=[])
    parser.add_argument("--rows", type=int, default=10_000_000)
    args = parser.parse_args()
    tokenizer = open_source(args.model).tokenizer
    assert tokenizer is not None
    config = DataConfig(columns=tuple(args.columns))
    dataset = read_dataset(args.data, tokenizer, config)
    sizes = np.array([len(row.tokens) for row in dataset.rows])
    ways = get_args(Resolved)
    figures: dict[str, Any] = {
        "rows": len(dataset),
        "tokens": {
            "mean": round(float(sizes.mean()), 1),
            "median": float(np.median(sizes)),
            "longest": int(sizes.max()),
        },
        **{way: figures_of(dataset, way) for way in ways},
    }
    picks = np.random.default_rng(0).integers(len(dataset), size=args.rows).tolist()
    many = Dataset([dataset.rows[i] for i in picks], dataset.max_tokens)
    del picks
    figures["many"] = {
        "rows": args.rows,
        **{way: figures_of(many, way) for way in ways},
    }
    harness.record("packing", args.append, figures=figures)


if __name__ == "__main__":
    main()
