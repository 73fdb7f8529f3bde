"""Quantize-on-load: time and peak memory; quantizing one matrix against bitsandbytes.

    python scripts/bench_load.py MODEL_FOLDER [--bnb-python PYTHON] [--append FILE]

Memory is the peak resident set of a process that loads, above that of one that has only
imported the library and started JAX; it is set against the loaded model's own bytes
plus twice its largest tensor in float32. With --bnb-python (an environment with torch
and bitsandbytes) quantizing 4096 x 4096 is timed there and here, in turn.
"""

import argparse
import json
import subprocess
import sys

from bench_record import record

_LOAD = """
import json, resource, sys, time
import jax
import qlora_jax
from qlora_jax.sources.load import load
import jax.numpy as jnp
jax.block_until_ready(jnp.zeros(8) + 1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
idle, began = peak(), time.perf_counter()
if sys.argv[1] == "load":
    model, _ = load(sys.argv[2], qlora_jax.QuantConfig(), "bfloat16")
    from flax import nnx
    leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    seconds = time.perf_counter() - began
    from qlora_jax.sources.safetensors import Checkpoint
    from qlora_jax.sources.hub import find
    infos = Checkpoint(find(sys.argv[2])).infos.values()
    import math
    print(json.dumps({
        "seconds": seconds,
        "peak_above_idle_bytes": peak() - idle,
        "model_bytes": sum(x.nbytes for x in leaves),
        "largest_tensor_f32_bytes": 4 * max(math.prod(i.shape) for i in infos),
        "checkpoint_bytes": sum(math.prod(i.shape) * i.dtype.itemsize for i in infos),
    }))
else:
    w = jax.random.normal(jax.random.key(0), (4096, 4096))
    quantize = lambda: jax.block_until_ready(qlora_jax.quantize_tensor(w))
    quantize()
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        quantize()
        print(time.perf_counter() - began, flush=True)
"""

_BNB = """
import sys, time, torch
import bitsandbytes.functional as F
torch.manual_seed(0)
w = torch.randn(4096, 4096)
quantize = lambda: F.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
quantize()
print("ready", flush=True)
for _ in sys.stdin:
    began = time.perf_counter()
    quantize()
    print(time.perf_counter() - began, flush=True)
"""


class Child:
    """A process that times one call for each line it is sent."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout and self.process.stdout.readline().strip() == "ready"

    def time(self) -> float:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument(
        "--bnb-python", help="python of an environment with bitsandbytes"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--append", help="results file (.jsonl)")
    args = parser.parse_args()
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, "load", args.model],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr)
    figures = json.loads(done.stdout.splitlines()[-1])
    allowed = figures["model_bytes"] + 2 * figures["largest_tensor_f32_bytes"]
    figures["peak_over_allowed"] = figures["peak_above_idle_bytes"] / allowed
    for name, value in figures.items():
        text = f"{value / 2**20:.0f} MiB" if name.endswith("bytes") else f"{value:.2f}"
        print(f"{name:<28}{text}")
    if args.bnb_python:
        ours = Child([sys.executable, "-c", _LOAD, "quantize"])
        theirs = Child([args.bnb_python, "-c", _BNB])
        pairs = [(ours.time(), theirs.time()) for _ in range(args.rounds)]
        ratios = sorted(b / a for a, b in pairs)
        figures["quantize_4096_ms"] = 1e3 * sorted(a for a, _ in pairs)[len(pairs) // 2]
        figures["bitsandbytes_4096_ms"] = (
            1e3 * sorted(b for _, b in pairs)[len(pairs) // 2]
        )
        figures["speed_over_bitsandbytes"] = ratios[len(ratios) // 2]
        print(
            f"quantize 4096^2: {figures['quantize_4096_ms']:.0f} ms, bitsandbytes "
            f"{figures['bitsandbytes_4096_ms']:.0f} ms, "
            f"{figures['speed_over_bitsandbytes']:.1f} x as fast"
        )
    print(json.dumps(record("bench_load", args.append, **figures)))


if __name__ == "__main__":
    main()
