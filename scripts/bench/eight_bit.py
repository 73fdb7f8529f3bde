"""State bytes and update time of adamw_8bit and optax.adamw, as ratios in one process.

    python -m scripts.bench.eight_bit [--layers N] [--rank R] [--append FILE]

The arrays are those of an adapter on all linears of Llama 3 8B, with fewer layers. What is
timed is the jitted update alone, state and parameters donated: no model is run, so that a
train step's own time is not in the ratio. `temporary` is what XLA's account of it adds to them,
gradients included. The cases take turns; medians, and quartiles of each
turn's ratio, since others may share the machine.
"""

import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pallas_kernels.shapes import SHAPES
from qlora_jax.optim import offload
from qlora_jax.optim.eight_bit import adamw_8bit
from scripts.bench import harness

LINEARS = {
    "q_proj": "llama3_8b_q_o",
    "k_proj": "llama3_8b_k_v",
    "v_proj": "llama3_8b_k_v",
    "o_proj": "llama3_8b_q_o",
    "gate_proj": "llama3_8b_gate_up",
    "up_proj": "llama3_8b_gate_up",
    "down_proj": "llama3_8b_down",
}
SETTINGS = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
CASES = {
    "adamw": optax.adamw(2e-4, **SETTINGS),
    "adamw_8bit": adamw_8bit(2e-4, **SETTINGS),
    "adamw paged": offload(optax.adamw(2e-4, **SETTINGS)),
    "adamw_8bit paged": offload(adamw_8bit(2e-4, **SETTINGS)),
}


def adapter(layers: int, rank: int) -> dict[str, jax.Array]:
    """Returns random factors, stacked over layers."""
    rng = np.random.default_rng(0)
    shapes = {}
    for name, shape in LINEARS.items():
        shapes[f"{name}.lora_a"] = (layers, SHAPES[shape].k, rank)
        shapes[f"{name}.lora_b"] = (layers, rank, SHAPES[shape].n)
    return {
        name: jnp.asarray(rng.standard_normal(shape, np.float32))
        for name, shape in shapes.items()
    }


def make_step(tx: optax.GradientTransformation) -> Any:
    """Returns the jitted update of gradients that are made on the spot."""

    def step(params: Any, state: Any) -> tuple[Any, Any]:
        grads = jax.tree.map(lambda x: x * 1e-3, params)
        grads = jax.lax.optimization_barrier(grads)  # as a backward pass leaves them
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def main() -> None:
    """Runs the benchmark; prints a table and one JSON line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    params = adapter(args.layers, args.rank)
    count = sum(x.size for x in params.values())
    runs: dict[str, Callable[[], None]] = {}
    sizes, temporary = {}, {}
    for name, tx in CASES.items():
        state = tx.init(params)
        step = make_step(tx).lower(params, state).compile()
        held = [jax.tree.map(jnp.copy, params), state]

        def run(step=step, held=held) -> None:
            held[:] = jax.block_until_ready(step(*held))

        runs[name] = run
        sizes[name] = sum(x.nbytes for x in jax.tree.leaves(state))
        temporary[name] = step.memory_analysis().temp_size_in_bytes
    times = harness.take_turns(runs, args.steps)
    plain = times["adamw"]
    rows = {}
    for name, taken in times.items():
        ratios = [a / b for a, b in zip(taken, plain, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "bytes_per_parameter": round(sizes[name] / count, 4),
            "temporary_bytes_per_parameter": round(temporary[name] / count, 4),
            "update_ns_per_parameter": round(statistics.median(taken) / count * 1e9, 3),
            "update_over_adamw": round(middle, 3),
            "update_over_adamw_quartiles": [round(low, 3), round(high, 3)],
        }
    print(f"{count:,} parameters, {args.layers} layers, rank {args.rank}")
    print(f"{'':<18}{'bytes/param':>12}{'temporary':>11}{'ns/param':>10}{'x adamw':>9}")
    for name, row in rows.items():
        print(
            f"{name:<18}{row['bytes_per_parameter']:12.3f}"
            f"{row['temporary_bytes_per_parameter']:11.3f}"
            f"{row['update_ns_per_parameter']:10.2f}{row['update_over_adamw']:9.2f}"
        )
    ratio = rows["adamw_8bit"]["bytes_per_parameter"]
    figures = {
        "parameters": count,
        "layers": args.layers,
        "rank": args.rank,
        "steps": args.steps,
        "state_bytes_over_adamw": round(
            ratio / rows["adamw"]["bytes_per_parameter"], 4
        ),
        "cases": rows,
    }
    harness.record("eight_bit", args.append, **figures)


if __name__ == "__main__":
    main()
