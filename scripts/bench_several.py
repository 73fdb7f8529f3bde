"""A batch whose rows have adapters of their own, against a batch with one adapter.

    python scripts/bench_several.py --model DIR [--adapters 8] [--append FILE]

The base in NF4, random adapters of one rank on all linears. Greedy tokens of a batch whose
rows take the adapters in turn, and the loss of a batch of sequences: by the base alone, with
one adapter attached as ever, with a bank that gives each row its own, with that bank and all
rows on one adapter, and row by row (batches of one). Rounds of all in turn; medians; ratios to
one adapter.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_record import record
from flax import nnx

import qlora_jax as qlora
from qlora_jax.adapters import Adapter
from qlora_jax.adapters.bank import AdapterBank
from qlora_jax.nn import LoRA
from qlora_jax.objectives import SFT


def random_adapter(model: Any, rank: int, seed: int) -> Any:
    """Returns the model with an adapter that changes what it says."""
    model = qlora.attach(model, qlora.LoRAConfig(rank=rank), key=jax.random.key(seed))
    rng = np.random.default_rng(seed)
    for _, node in nnx.iter_graph(model):
        if isinstance(node, LoRA):
            b = 0.01 * rng.standard_normal(node.lora_b[...].shape, np.float32)
            node.lora_b.set_value(jnp.asarray(b))
    return model


def measure(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Returns the median seconds of each, taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()  # compiles
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return {name: round(statistics.median(s), 4) for name, s in seconds.items()}


def main() -> None:
    """Runs the benchmark; prints a table and one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rows", type=int, help="of a batch; as many as adapters")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--append", help="a .jsonl file")
    args = parser.parse_args()
    base, _ = qlora.load(args.model, qlora.QuantConfig(), args.dtype)
    count = args.adapters
    models = [random_adapter(base, args.rank, seed) for seed in range(count)]
    adapters = {f"adapter{i}": Adapter.of(m) for i, m in enumerate(models)}
    bank = AdapterBank.of(base, adapters)
    rows = args.rows or count
    names = [f"adapter{i % count}" for i in range(rows)]
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, base.config.vocab_size, (rows, args.seq)).astype(np.int32)
    prompts = tokens[:, :32].tolist()
    sample = qlora.SampleConfig(max_new_tokens=args.new_tokens)

    losses: dict[Any, Callable] = {}

    def loss_of(model: Any, tokens: np.ndarray) -> None:
        graphdef, state = nnx.split(model)
        if graphdef not in losses:
            losses[graphdef] = jax.jit(
                lambda state, batch: SFT(nnx.merge(graphdef, state), batch)[0]
            )
        batch = {"tokens": tokens, "weights": np.ones(tokens.shape, np.float32)}
        jax.block_until_ready(losses[graphdef](state, batch))

    def each(call: Callable[[Any, Any], Any], rows: Any) -> None:
        for i, row in enumerate(rows):
            one = row[None] if isinstance(row, np.ndarray) else [row]
            call(models[i % count], one)

    def new(model: Any, rows: list[list[int]]) -> Any:
        return qlora.generate(model, rows, sample)

    figures = {}
    for what, call, batch in (
        (f"{args.new_tokens} tokens a row", new, prompts),
        (f"loss of {rows} x {args.seq}", loss_of, tokens),
    ):
        seconds = measure(
            {
                "base alone": lambda c=call, r=batch: c(base, r),
                "one adapter": lambda c=call, r=batch: c(models[0], r),
                "an adapter a row": lambda c=call, r=batch: c(bank.route(names), r),
                "bank, all on one": lambda c=call, r=batch: c(bank.route(names[0]), r),
                "row by row": lambda c=call, r=batch: each(c, r),
            },
            args.rounds,
        )
        figures[what] = seconds
        for name, value in seconds.items():
            ratio = value / seconds["one adapter"]
            print(f"{what:<24}{name:<20}{value:9.3f} s{ratio:8.2f} x", flush=True)
    row = record(
        "bench_several",
        args.append,
        adapters=count,
        rows=rows,
        rank=args.rank,
        dtype=args.dtype,
        seconds=figures,
    )
    print(json.dumps(row))


if __name__ == "__main__":
    main()
