"""NF4 matmul against a dense bf16 matmul of the same shape, forward and backward.

    python -m scripts.bench.matmul [--shapes square_2048 llama2_7b_down] [--m 1 64 512]

All variants of a shape are timed in turn, round after round, in one process; a ratio is
the median of the rounds' ratios, so that a noisy machine hits both sides alike. Prints a
table, and one JSON line last; --append FILE adds it there with versions and commit.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.packed_matmul import choose, nf4_matmul
from pallas_kernels.shapes import SHAPES
from qlora_jax.config.quant import QuantConfig
from qlora_jax.nn.matmul import frozen_matmul
from qlora_jax.nn.packing import quantize_tensor
from scripts.bench import harness


def variants(m: int, n: int, k: int, dtype: str) -> dict:
    """Returns {name: call} of one shape."""
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

    def call(run, *args):
        return lambda: jax.block_until_ready(run(*args))

    return {
        "dense forward": call(jax.jit(frozen_matmul), x, dense),
        "nf4 forward": call(jax.jit(nf4_matmul), x, q),
        "dense both": call(both(frozen_matmul), x, dy, dense),
        "nf4 both": call(both(nf4_matmul), x, dy, q),
    }


def main() -> None:
    parser = harness.parser(__doc__)
    default = ["square_2048", "llama2_7b_down"]
    parser.add_argument("--shapes", nargs="+", default=default, choices=list(SHAPES))
    parser.add_argument("--m", nargs="+", type=int, default=[1, 64, 512])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    rows = []
    print(f"{'shape':<18}{'m':>5}  {'':<9}{'dense ms':>10}{'nf4 ms':>10}{'ratio':>8}")
    for name in args.shapes:
        for m in args.m:
            shape = SHAPES[name]
            runs = variants(m, shape.n, shape.k, args.dtype)
            seconds = harness.take_turns(runs, args.rounds, warm_up=2)
            for part in ("forward", "both"):
                dense, nf4 = seconds[f"dense {part}"], seconds[f"nf4 {part}"]
                row = {
                    "shape": name,
                    "m": m,
                    "part": part,
                    "dense_ms": float(np.median(dense) * 1e3),
                    "nf4_ms": float(np.median(nf4) * 1e3),
                    "ratio": harness.median_ratio(nf4, dense),
                }
                rows.append(row)
                print(
                    f"{name:<18}{m:>5}  {part:<9}{row['dense_ms']:>10.2f}"
                    f"{row['nf4_ms']:>10.2f}{row['ratio']:>8.2f}"
                )
    weight = quantize_tensor(jnp.ones((256, 256)))
    choice = choose("forward", args.m[-1], weight, jnp.dtype(args.dtype))
    harness.record(
        "matmul", args.append, implementation=choice.implementation, rows=rows
    )


if __name__ == "__main__":
    main()
