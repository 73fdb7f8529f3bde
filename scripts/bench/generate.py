"""Tokens a second of generation: a base in NF4 against the same base dense.

    python -m scripts.bench.generate --model DIR [--adapters 0] [--append FILE]

Greedy continuations by `generate`, as users call it. A call with one new token is the
prefill with what comes before it; the tokens after the first give the rate of decoding.
The third is the NF4 base decoded anew for every token, as where memory does not suffice.
Rounds of all in turn; the least of each, as other processes only add. CPU seconds, of all
threads, say the same on a machine that is busy with others.
"""

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
from flax import nnx

import qlora_jax as qlora
from qlora_jax.adapters import Adapter
from qlora_jax.adapters.bank import AdapterBank
from scripts.bench import harness
from scripts.bench.several import random_adapter


def opened(model: str, quant: Any, dtype: str, adapters: int, rows: int) -> Any:
    """Returns a base, with one adapter, or with a bank of several for the rows in turn."""
    base, _ = qlora.load(model, quant, dtype)
    if adapters == 0:
        return base
    models = [random_adapter(base, 16, seed) for seed in range(adapters)]
    if adapters == 1:
        return models[0]
    bank = AdapterBank.of(base, {f"a{i}": Adapter.of(m) for i, m in enumerate(models)})
    return bank.route([f"a{i % adapters}" for i in range(rows)])


@contextlib.contextmanager
def packed() -> Iterator[None]:
    """Keeps `generate` from decoding the base, as where memory does not suffice."""
    module = importlib.import_module("qlora_jax.inference.decoded")
    with mock.patch.object(module, "available_host_bytes", lambda: 0):
        yield


def clocks() -> np.ndarray:
    """Returns the time, and the processor's time of all threads."""
    return np.array([time.perf_counter(), time.process_time()])


def main() -> None:
    """Runs the benchmark; prints a table and one JSON line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapters", type=int, default=0)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=17)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    quants = {"nf4": qlora.QuantConfig(), "dense": None}
    models = {
        name: opened(args.model, quant, args.dtype, args.adapters, args.rows)
        for name, quant in quants.items()
    }
    rng = np.random.default_rng(0)
    size = models["dense"].config.vocab_size
    prompts = rng.integers(0, size, (args.rows, args.prompt_tokens)).tolist()

    def run(name: str, new_tokens: int) -> Callable[[], None]:
        config = qlora.SampleConfig(max_new_tokens=new_tokens)
        model = models[name.partition(" ")[0]]

        def call() -> None:
            with packed() if name.endswith("packed") else contextlib.nullcontext():
                qlora.generate(model, prompts, config)

        return call

    names, counts = ["nf4", "nf4 packed", "dense"], (1, args.new_tokens)
    runs = {f"{name}, {n}": run(name, n) for name in names for n in counts}
    taken = harness.take_turns(runs, args.rounds, clock=clocks)
    figures: dict[str, dict[str, float]] = {}
    for name in names:
        prefill, whole = (np.min(taken[f"{name}, {n}"], axis=0) for n in counts)
        each = (whole - prefill) / (args.rows * (args.new_tokens - 1))
        figures[name] = {
            "first_token_s": round(prefill[0], 4),
            "tokens_per_s": round(1 / each[0], 2),
            "first_token_cpu_s": round(prefill[1], 4),
            "tokens_per_cpu_s": round(1 / each[1], 2),
        }
        print(
            f"{name:<12}{prefill[0]:8.3f} s to the first token{1 / each[0]:10.2f} tokens/s "
            f"after it; in CPU seconds {prefill[1]:.3f} and {1 / each[1]:.2f}",
            flush=True,
        )
    harness.record(
        "generate",
        args.append,
        adapters=args.adapters,
        rows=args.rows,
        dtype=args.dtype,
        backend=jax.default_backend(),
        parameters=sum(x.size for x in jax.tree.leaves(nnx.state(models["dense"]))),
        figures=figures,
    )


if __name__ == "__main__":
    main()
