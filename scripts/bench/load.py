"""Quantize-on-load: time and peak memory; quantizing one matrix against bitsandbytes.

    python -m scripts.bench.load MODEL_FOLDER [--bnb-python PYTHON] [--append FILE]

Memory is the peak resident set of a process that loads, above that of one that has only
imported the library and started JAX; it is set against the loaded model's own bytes
plus twice its largest tensor in float32. With --bnb-python (an environment with torch
and bitsandbytes) quantizing 4096 x 4096 is timed there and here, in turn.
"""

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from scripts.bench import harness

SIDE = 4096
"""Rows and columns of the matrix that is quantized there and here."""


def loaded(folder: str) -> dict[str, Any]:
    """Loads and quantizes a folder in this process; returns the figures."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import qlora_jax as qlora
    from qlora_jax.sources.hub import find
    from qlora_jax.sources.safetensors import Checkpoint

    jax.block_until_ready(jnp.zeros(8) + 1)
    idle, began = harness.held_bytes("VmHWM"), time.perf_counter()
    model, _ = qlora.load(folder, qlora.QuantConfig(), "bfloat16")
    leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    seconds = time.perf_counter() - began
    infos = Checkpoint(find(folder)).infos.values()
    return {
        "seconds": seconds,
        "peak_above_idle_bytes": harness.held_bytes("VmHWM") - idle,
        "model_bytes": sum(x.nbytes for x in leaves),
        "largest_tensor_f32_bytes": 4 * max(math.prod(i.shape) for i in infos),
        "checkpoint_bytes": sum(math.prod(i.shape) * i.dtype.itemsize for i in infos),
    }


def ours() -> Callable[[], Any]:
    """Returns a call that quantizes a matrix here."""
    import jax

    import qlora_jax as qlora

    w = jax.random.normal(jax.random.key(0), (SIDE, SIDE))
    return lambda: jax.block_until_ready(qlora.quantize_tensor(w))


def bitsandbytes() -> Callable[[], Any]:
    """Returns the same of bitsandbytes."""
    import torch
    from bitsandbytes import functional

    torch.manual_seed(0)
    w = torch.randn(SIDE, SIDE)
    return lambda: functional.quantize_4bit(
        w, quant_type="nf4", compress_statistics=True
    )


def answer(call: Callable[[], Any]) -> None:
    """Times a call for each line of the standard input."""
    call()
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        call()
        print(time.perf_counter() - began, flush=True)


class Child:
    """A process that times one call for each line it is sent."""

    def __init__(self, python: str, whose: str):
        self.process = subprocess.Popen(
            harness.worker("load", whose, python=python),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout and self.process.stdout.readline().strip() == "ready"

    def time(self) -> float:
        """Returns the seconds of one call."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def compared(bnb_python: str, rounds: int) -> dict[str, float]:
    """Returns milliseconds of a matrix on both sides, and the median of their ratios."""
    mine, other = Child(sys.executable, "ours"), Child(bnb_python, "bitsandbytes")
    pairs = [(mine.time(), other.time()) for _ in range(rounds)]
    here, there = (list(times) for times in zip(*pairs, strict=True))
    return {
        "quantize_4096_ms": 1e3 * statistics.median(here),
        "bitsandbytes_4096_ms": 1e3 * statistics.median(there),
        "speed_over_bitsandbytes": harness.median_ratio(there, here),
    }


def main() -> None:
    """Runs the benchmark; prints a table and one JSON line."""
    parser = harness.parser(__doc__)
    parser.add_argument("model")
    parser.add_argument(
        "--bnb-python", help="python of an environment with bitsandbytes"
    )
    parser.add_argument("--rounds", type=int, default=10)
    sides = {"ours": ours, "bitsandbytes": bitsandbytes}
    parser.add_argument("--worker", choices=sides, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        answer(sides[args.worker]())
        return
    figures = loaded(args.model)
    allowed = figures["model_bytes"] + 2 * figures["largest_tensor_f32_bytes"]
    figures["peak_over_allowed"] = figures["peak_above_idle_bytes"] / allowed
    if args.bnb_python:
        figures |= compared(args.bnb_python, args.rounds)
    for name, value in figures.items():
        text = f"{value / 2**20:.0f} MiB" if name.endswith("_bytes") else f"{value:.2f}"
        print(f"{name:<28}{text}")
    harness.record("load", args.append, **figures)


if __name__ == "__main__":
    main()
