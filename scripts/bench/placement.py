"""Step time of paged, streamed and plain runs, as ratios in one process, and their losses.

    python -m scripts.bench.placement --model DIR [--append FILE]

Steps of the four take turns, so that a noisy machine slows them alike; medians over steps.
On a CPU host and device are one memory: what is measured is the machinery, not a link.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

import qlora_jax as qlora
from scripts.bench import harness

CASES = {
    "plain": (False, "device"),
    "paged": (False, "pinned_host"),
    "streamed": (True, "device"),
    "both": (True, "pinned_host"),
}


def main() -> None:
    """Runs the benchmark; prints a table and one JSON line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    model, _ = qlora.load(args.model, qlora.QuantConfig())
    model = qlora.attach(model, qlora.LoRAConfig(rank=16), key=jax.random.key(0))
    size = model.config.vocab_size
    tokens = jax.random.randint(jax.random.key(1), (4, 256), 0, size, jnp.int32)
    batch = {"tokens": tokens, "weights": jnp.ones(tokens.shape, jnp.float32)}
    runs: dict[str, Callable[[], None]] = {}
    losses: dict[str, list[float]] = {name: [] for name in CASES}
    for name, (stream, kind) in CASES.items():
        graphdef, lora, base = qlora.split(model)
        lora = jax.tree.map(jnp.copy, lora)
        base = qlora.stream(base) if stream else base
        tx = qlora.offload(optax.adamw(1e-4), kind)
        step = qlora.make_train_step(graphdef, tx, checkpoint="layer")
        state = [lora, base, tx.init(lora)]

        def run(step=step, state=state, losses=losses[name]) -> None:
            state[0], state[2], metrics = step(*state, batch)
            losses.append(float(metrics["loss"]))

        runs[name] = run
    medians = harness.medians(harness.take_turns(runs, args.steps))
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
    harness.record("placement", args.append, **figures)


if __name__ == "__main__":
    main()
