"""Measures kernel configs on the GPU here, and fills its table of choices.

    python scripts/tune_kernels.py                       # into pallas_kernels/tuned/
    QLORA_JAX_TUNED=~/tuned python scripts/tune_kernels.py --out ~/tuned --n 5120 --k 13824

For every product (direction, tokens, n, k) all candidates of pallas_kernels.tuning are
timed as gpu_suite.py times (device time, rotating weights, scales decoded along), and the
fastest is kept. Entries that are there are not measured again unless --again is given;
candidates that fail are kept under "failures" with their reason. Stops after
--budget-seconds; the file is written after each product.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from gpu_suite import LARGE, SMALL, Bench  # noqa: E402

from pallas_kernels import matmul, tuning  # noqa: E402
from pallas_kernels.shapes import SHAPES  # noqa: E402
from pallas_kernels.tuning import Choice, Problem  # noqa: E402


def candidates(problem: Problem, cores: int) -> list[Choice]:
    """What may run a product, the model's favourites first."""
    found = []
    if problem.direction == "forward" and problem.m <= 16:
        fields = tuning.decode_config(problem, cores)
        found.append(Choice("decode", tuple(sorted(fields.items()))))
    hopper = sorted(
        tuning.hopper_candidates(problem), key=lambda c: tuning.cost(problem, cores, c)
    )
    found += [Choice("hopper", tuple(sorted(fields.items()))) for fields in hopper[:6]]
    return [*found, Choice("two_pass")]


def measure(bench: Bench, problem: Problem, choice: Choice) -> float:
    """Returns device microseconds of one product."""
    import jax
    import jax.numpy as jnp

    device = tuning.current_device()
    one = matmul.IMPLEMENTATIONS[choice.implementation]
    run = one.forward if problem.direction == "forward" else one.backward
    assert run is not None
    w = bench.weight(problem.n, problem.k)
    width = problem.k if problem.direction == "forward" else problem.n
    x = jax.ShapeDtypeStruct((problem.m, width), jnp.dtype(problem.dtype))
    compiled = (
        jax.jit(lambda x, w: run(x, w, None, choice, device)).lower(x, w).compile()
    )
    return bench.time({}, compiled, [x], [w])["us"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "pallas_kernels" / "tuned")
    parser.add_argument("--budget-seconds", type=float, default=600)
    parser.add_argument("--n", type=int, help="one shape instead of Llama-3 8B's")
    parser.add_argument("--k", type=int)
    parser.add_argument("--large", action="store_true", help="Llama-3 70B's too")
    parser.add_argument("--tokens", type=int, nargs="+", default=[
        1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384])  # fmt: skip
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument(
        "--again", action="store_true", help="measure what is there too"
    )
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = tuning.current_device()
    if device.platform != "gpu":
        print(f"error: tuning needs a GPU, this is {device.platform}", file=sys.stderr)
        return 2
    if (args.n is None) != (args.k is None):
        print("error: give both --n and --k, or neither", file=sys.stderr)
        return 2
    names = SMALL + (LARGE if args.large else ())
    shapes = [(SHAPES[name].n, SHAPES[name].k) for name in names]
    if args.n:
        shapes = [(args.n, args.k)]
    path = args.out / tuning.table_name(device.kind)
    table = {"device": device.kind, "entries": {}, "failures": {}}
    if path.exists():
        table |= json.loads(path.read_text())
    args.out.mkdir(parents=True, exist_ok=True)
    end, bench, filled = time.time() + args.budget_seconds, Bench(0), 0
    for n, k in shapes:
        for m in args.tokens:
            for direction in ("forward", "backward"):
                problem = Problem(direction, m, n, k, args.dtype)
                if problem.key in table["entries"] and not args.again:
                    continue
                if time.time() > end:
                    print(
                        f"stopped after {filled} products: out of time", file=sys.stderr
                    )
                    print(json.dumps({"out": path.name, "filled": filled}))
                    return 0
                tune(bench, problem, device.cores, table)
                path.write_text(json.dumps(table, indent=1) + "\n")
                filled += 1
    print(json.dumps({"out": path.name, "filled": filled}))
    return 0


def tune(bench: Bench, problem: Problem, cores: int, table: dict) -> None:
    """Measures one product's candidates into the table."""
    best: tuple[float, Choice] | None = None
    for choice in candidates(problem, cores):
        label = json.dumps([problem.key, choice.implementation, dict(choice.config)])
        try:
            us = measure(bench, problem, choice)
        except Exception as error:  # a config that does not fit is a finding
            table["failures"][label] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        if best is None or us < best[0]:
            best = us, choice
    if best is not None:
        us, choice = best
        table["entries"][problem.key] = {
            "implementation": choice.implementation,
            "config": dict(choice.config),
            "us": round(us, 2),
            "source": "tune_kernels.py",
        }
        print(f"{problem.key}: {choice.implementation} {us:.1f} us", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
