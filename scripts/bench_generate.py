"""Tokens a second of generation: a base in NF4 against the same base dense.

    python scripts/bench_generate.py --model DIR [--adapters 0] [--append FILE]

Greedy continuations by `generate`, as users call it. A call with one new token is the
prefill with what comes before it; the tokens after the first give the rate of decoding.
Rounds of both in turn; medians. The logits after the prompts are compared too.
"""

import argparse
import json
import statistics
import time
from typing import Any

import jax
import numpy as np
from bench_record import record
from bench_several import random_adapter
from flax import nnx

import qlora_jax as qlora
from qlora_jax.adapters import Adapter
from qlora_jax.adapters.bank import AdapterBank


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


def seconds(call: Any) -> float:
    """Returns how long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    """Runs the benchmark; prints a table and one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapters", type=int, default=0)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=17)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--append", help="a .jsonl file")
    args = parser.parse_args()
    quants = {"nf4": qlora.QuantConfig(), "dense": None}
    models = {
        name: opened(args.model, quant, args.dtype, args.adapters, args.rows)
        for name, quant in quants.items()
    }
    rng = np.random.default_rng(0)
    size = models["dense"].config.vocab_size
    prompts = rng.integers(0, size, (args.rows, args.prompt_tokens)).tolist()
    first, longer = (
        qlora.SampleConfig(max_new_tokens=n) for n in (1, args.new_tokens)
    )
    taken: dict[tuple[str, int], list[float]] = {}
    for i in range(args.rounds + 1):  # the first compiles
        for name, model in models.items():
            for config in (first, longer):
                time_s = seconds(lambda m=model, c=config: qlora.generate(m, prompts, c))
                if i:
                    taken.setdefault((name, config.max_new_tokens), []).append(time_s)
    figures: dict[str, dict[str, float]] = {}
    for name in models:
        prefill, whole = (
            statistics.median(taken[name, n]) for n in (1, args.new_tokens)
        )
        new = args.rows * (args.new_tokens - 1)
        figures[name] = {
            "first_token_s": round(prefill, 4),
            "tokens_per_s": round(new / (whole - prefill), 2),
        }
        print(f"{name:<8}{prefill:8.3f} s to the first token", end="")
        print(f"{figures[name]['tokens_per_s']:10.2f} tokens/s after it", flush=True)
    row = record(
        "bench_generate",
        args.append,
        adapters=args.adapters,
        rows=args.rows,
        dtype=args.dtype,
        backend=jax.default_backend(),
        parameters=sum(x.size for x in jax.tree.leaves(nnx.state(models["dense"]))),
        figures=figures,
    )
    print(json.dumps(row))


if __name__ == "__main__":
    main()
