"""NF4 matmul against a dense bf16 matmul of the same shape, forward and backward.

    python scripts/bench_matmul.py [--shapes square_2048 llama2_7b_down] [--m 1 64 512]

All variants of a shape are timed in turn, round after round, in one process; a ratio is
the median of the rounds' ratios, so that a noisy machine hits both sides alike. Prints a
table, and one JSON line last; --append FILE adds it there with versions and commit.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from bench_record import record

from pallas_kernels.packed_matmul import choose, nf4_matmul
from pallas_kernels.shapes import SHAPES
from qlora_jax.config.quant import QuantConfig
from qlora_jax.nn.matmul import frozen_matmul
from qlora_jax.nn.packing import quantize_tensor


def variants(m: int, n: int, k: int, dtype: str) -> dict:
    """Returns {name: (jitted function, arguments)} of one shape."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((n, k), np.float32) * 0.02)
    q, dense = quantize_tensor(w, QuantConfig()), w.astype(dtype)
    x = jnp.asarray(rng.standard_normal((m, k), np.float32), dtype)
    dy = jnp.asarray(rng.standard_normal((m, n), np.float32), dtype)

    def both(product):
        def run(x, dy, w):
            y, vjp = jax.vjp(lambda x: product(x, w), x)
            return y, vjp(dy)[0]

        return jax.jit(run)

    return {
        "dense forward": (jax.jit(frozen_matmul), (x, dense)),
        "nf4 forward": (jax.jit(nf4_matmul), (x, q)),
        "dense both": (both(frozen_matmul), (x, dy, dense)),
        "nf4 both": (both(nf4_matmul), (x, dy, q)),
    }


def time_rounds(runs: dict, rounds: int) -> dict[str, np.ndarray]:
    """Returns seconds of each variant, (rounds,); two warm-up calls each."""
    for run, args in runs.values():
        for _ in range(2):
            jax.block_until_ready(run(*args))
    seconds = {name: np.zeros(rounds) for name in runs}
    for i in range(rounds):
        for name, (run, args) in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run(*args))
            seconds[name][i] = time.perf_counter() - began
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = ["square_2048", "llama2_7b_down"]
    parser.add_argument("--shapes", nargs="+", default=default, choices=list(SHAPES))
    parser.add_argument("--m", nargs="+", type=int, default=[1, 64, 512])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--append", help="results file (.jsonl)")
    args = parser.parse_args()
    rows = []
    print(f"{'shape':<18}{'m':>5}  {'':<9}{'dense ms':>10}{'nf4 ms':>10}{'ratio':>8}")
    for name in args.shapes:
        for m in args.m:
            shape = SHAPES[name]
            seconds = time_rounds(
                variants(m, shape.n, shape.k, args.dtype), args.rounds
            )
            for part in ("forward", "both"):
                dense, nf4 = seconds[f"dense {part}"], seconds[f"nf4 {part}"]
                row = {
                    "shape": name,
                    "m": m,
                    "part": part,
                    "dense_ms": float(np.median(dense) * 1e3),
                    "nf4_ms": float(np.median(nf4) * 1e3),
                    "ratio": float(np.median(nf4 / dense)),
                }
                rows.append(row)
                print(
                    f"{name:<18}{m:>5}  {part:<9}{row['dense_ms']:>10.2f}"
                    f"{row['nf4_ms']:>10.2f}{row['ratio']:>8.2f}"
                )
    weight = quantize_tensor(jnp.ones((256, 256)))
    choice = choose("forward", args.m[-1], weight, jnp.dtype(args.dtype))
    result = record(
        "bench_matmul", args.append, implementation=choice.implementation, rows=rows
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
