"""Does the device wait for the host in a real run, and how much of what it computes is padding?

    python -m scripts.bench.pipeline MODEL DATA --columns input=question output=answer \
        --append scripts/results/pipeline.jsonl

A run's own steps (batches made ahead, put on the device, metrics read a step later, no
checkpoint) are timed beside the same compiled step on one batch that is on the device
already, in turns of --steps steps; the ratio is the median over the rounds. `--packing`
says how rows make batches; a figure of useful tokens leaves padding out.
"""

import contextlib
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax

import qlora_jax as qlora
from qlora_jax.config.data import DataConfig
from qlora_jax.data import Dataset, read_dataset
from qlora_jax.train.loop import Trainer
from scripts.bench import harness


def timed_run(trainer: Trainer, steps: range) -> tuple[float, int]:
    """Returns the seconds of some of a run's own steps, and the tokens of their documents."""
    state, tokens, before = trainer.state, 0, None
    with contextlib.closing(trainer._steps.feed(steps.stop)) as feed:
        fed = feed(steps.start)
        began = time.perf_counter()
        for step in steps:
            state, metrics = trainer._steps.take(state, trainer.base, fed)
            tokens += fed.tokens
            if before is not None:
                {name: float(x) for name, x in before.items()}
            before = metrics
            if step + 1 < steps.stop:
                fed = feed(step + 1)
        jax.block_until_ready(before)
        seconds = time.perf_counter() - began
    trainer.state = state
    return seconds, tokens


def timed_constant(trainer: Trainer, steps: range) -> float:
    """Returns the seconds of as many steps, each on a batch that is on the device already."""
    made = {}
    for step in steps:
        fed = trainer._steps._fed(step)
        made.setdefault(fed.batch["tokens"].shape, fed)
    shapes = [trainer.batches.at(step)["tokens"].shape for step in steps]
    jax.block_until_ready([fed.batch for fed in made.values()])
    state, metrics = trainer.state, None
    began = time.perf_counter()
    for shape in shapes:
        state, metrics = trainer._steps.take(state, trainer.base, made[shape])
    jax.block_until_ready(metrics)
    seconds = time.perf_counter() - began
    trainer.state = state
    return seconds


def main() -> None:
    """Runs the benchmark; prints one JSON line."""
    parser = harness.parser(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", help="rows, as qlora train takes them")
    parser.add_argument(
        "--columns", nargs="*", default=(), help="as --data.columns has them"
    )
    parser.add_argument("--packing", choices=("on", "off", "drawn"), default="on")
    parser.add_argument("--steps", type=int, default=8, help="of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=16, help="documents of a step")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument(
        "--repeat", type=int, default=1, help="times that the rows are taken as others"
    )
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    compiles: list[tuple[str, float]] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiles.append((threading.current_thread().name, seconds))

    model, tokenizer = qlora.load(args.model, qlora.QuantConfig(), dtype=args.dtype)
    assert tokenizer is not None
    data = DataConfig(max_tokens=args.max_tokens, columns=tuple(args.columns))
    rows = read_dataset((args.data,), tokenizer, data)
    rows = Dataset(rows.rows * args.repeat, args.max_tokens)
    lora = qlora.LoRAConfig(rank=16, dropout=0.05)
    config = qlora.TrainConfig(
        max_steps=10**6,
        micro_batch=args.micro_batch,
        grad_accum=args.rows // args.micro_batch,
        compute_dtype=args.dtype,
    )
    model = qlora.attach(model, lora, key=jax.random.key(0))
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(
            model, rows, config, Path(out), lora=lora, packing=args.packing
        )
        planned = time.perf_counter() - began
        jax.monitoring.register_event_duration_secs_listener(listen)
        began = time.perf_counter()
        trainer._steps.compile(trainer.state, trainer.base, None, evaluates_first=False)
        timed_run(trainer, range(1))
        first = time.perf_counter() - began
        timed_run(trainer, range(1, 3))
        last, seen = 3 + args.rounds * args.steps, set()
        for step in range(
            3, last
        ):  # as they are drawn, lengths are compiled when they come
            shape = trainer.batches.at(step)["tokens"].shape
            if shape not in seen:
                seen.add(shape)
                timed_constant(trainer, range(step, step + 1))
        warm = len(compiles)
        runs, constants, useful = [], [], 0
        for turn in range(args.rounds):
            steps = range(3, last)[turn * args.steps :][: args.steps]
            seconds, tokens = timed_run(trainer, steps)
            runs.append(seconds)
            useful += tokens
            constants.append(timed_constant(trainer, steps))
        began = time.perf_counter()
        for step in range(100):
            trainer.batches.at(step)
        host = (time.perf_counter() - began) / 100
    harness.record(
        "pipeline",
        args.append,
        model=args.model.name,
        packing=args.packing,
        rows=len(rows.rows),
        shapes=[list(shape) for shape in trainer.batches.shapes],
        documents=round(trainer.batches.documents, 2),
        padding=round(trainer.batches.padding, 4),
        throughput_of_constant=harness.median_ratio(constants, runs),
        step_s=round(sum(runs) / len(runs) / args.steps, 4),
        useful_tokens_per_s=round(useful / sum(runs), 1),
        host_s_a_batch=round(host, 5),
        plan_s=round(planned, 2),
        first_step_s=round(first, 2),
        compilations_after_warm_up=len(compiles) - warm,
    )


if __name__ == "__main__":
    main()
