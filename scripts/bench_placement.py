"""Step time of paged, streamed and plain runs, as ratios in one process, and their losses.

    python scripts/bench_placement.py --model DIR [--append FILE]

Steps of the four take turns, so that a noisy machine slows them alike; medians over steps.
On a CPU host and device are one memory: what is measured is the machinery, not a link.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import optax
from bench_record import record

import qlora_jax as qlora

CASES = {
    "plain": (False, "device"),
    "paged": (False, "pinned_host"),
    "streamed": (True, "device"),
    "both": (True, "pinned_host"),
}


def main() -> None:
    """Runs the benchmark; prints a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--append")
    args = parser.parse_args()
    model, _ = qlora.load(args.model, qlora.QuantConfig())
    model = qlora.attach(model, qlora.LoRAConfig(rank=16), key=jax.random.key(0))
    size = model.config.vocab_size
    tokens = jax.random.randint(jax.random.key(1), (4, 256), 0, size, jnp.int32)
    batch = {"tokens": tokens, "weights": jnp.ones(tokens.shape, jnp.float32)}
    runs, times, losses = {}, {}, {}
    for name, (stream, kind) in CASES.items():
        graphdef, lora, base = qlora.split(model)
        lora = jax.tree.map(jnp.copy, lora)
        base = qlora.stream(base) if stream else base
        tx = qlora.offload(optax.adamw(1e-4), kind)
        step = qlora.make_train_step(graphdef, tx, checkpoint="layer")
        runs[name] = [step, lora, base, tx.init(lora)]
        times[name], losses[name] = [], []
    for _ in range(args.steps + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run[1], run[3], metrics = run[0](run[1], run[2], run[3], batch)
            losses[name].append(float(metrics["loss"]))
            times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(t[1:]) for name, t in times.items()}
    ratios = {n: round(t / medians["plain"], 3) for n, t in medians.items()}
    equal = all(x == losses["plain"] for x in losses.values())
    for name, ratio in ratios.items():
        print(f"{name:<10}{ratio:6.3f} x plain's step")
    print(f"losses bit-equal: {equal}")
    figures = {
        "step_s_plain": round(medians["plain"], 4),
        "step_over_plain": ratios,
        "losses_bit_equal": equal,
        "steps": args.steps,
        "tokens": list(tokens.shape),
    }
    print(json.dumps(record("bench_placement", args.append, **figures)))


if __name__ == "__main__":
    main()
