"""What does a training step of a mixture cost, beside a dense model of as many active weights?

    python -m scripts.bench.mixture --append scripts/results/mixture.jsonl

Both have --layers layers of small attention; one has 8 experts of which a token takes 2, the
other one feed-forward twice as wide, so that a token meets the same weights. Adapters of
rank 16 are on every linear, the base is in NF4. Steps are timed in turns; a ratio is the median
of the rounds' ratios. Memory is XLA's own account of the compiled step.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import qlora_jax as qlora
from qlora_jax.models import Decoder, DecoderConfig
from scripts.bench import harness


def config(args: Any, *, experts: bool) -> DecoderConfig:
    """Returns the shape of the mixture, or of the dense model."""
    dense = DecoderConfig(
        vocab_size=512,
        hidden_size=args.hidden,
        intermediate_size=args.top * args.width,
        num_layers=args.layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
    )
    if not experts:
        return dense
    return dataclasses.replace(
        dense,
        intermediate_size=args.width,
        num_experts=args.experts,
        experts_per_token=args.top,
    )


def prepared(args: Any, *, experts: bool) -> tuple[Any, Any]:
    """Returns a call that takes a step, and the compiled step."""
    model: Any = Decoder(config(args, experts=experts), key=jax.random.key(0))
    if args.format != "dense":
        model = qlora.quantize(model, qlora.QuantConfig())
    model = qlora.attach(model, qlora.LoRAConfig(rank=16), key=jax.random.key(1))
    graphdef, lora, base = qlora.split(model)
    tx = optax.adam(1e-4)
    step = qlora.make_train_step(graphdef, tx)
    rng = np.random.default_rng(0)
    batch = {
        "tokens": jnp.asarray(rng.integers(0, 512, (1, args.tokens)), jnp.int32),
        "weights": jnp.ones((1, args.tokens), jnp.float32),
    }
    state = [lora, tx.init(lora)]
    compiled = step.lower(state[0], base, state[1], batch).compile()

    def run() -> None:
        state[0], state[1], metrics = step(state[0], base, state[1], batch)
        jax.block_until_ready(metrics)

    return run, compiled


def main() -> None:
    """Runs the benchmark; prints one JSON line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=2816, help="of an expert")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top", type=int, default=2, help="experts a token")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--format", choices=("nf4", "dense"), default="nf4")
    args = parser.parse_args()
    made = {
        name: prepared(args, experts=name == "mixture") for name in ("mixture", "dense")
    }
    calls = {name: run for name, (run, _) in made.items()}
    times = harness.take_turns(calls, args.rounds, clock=time.process_time)
    wall = harness.take_turns(calls, args.rounds, warm_up=0)
    harness.record(
        "mixture",
        args.append,
        format=args.format,
        shape=[args.experts, args.top, args.hidden, args.width, args.layers],
        tokens=args.tokens,
        processor_s=harness.medians(times),
        wall_s=harness.medians(wall),
        ratio=harness.median_ratio(times["mixture"], times["dense"]),
        wall_ratio=harness.median_ratio(wall["mixture"], wall["dense"]),
        temporary_bytes={
            name: compiled.memory_analysis().temp_size_in_bytes
            for name, (_, compiled) in made.items()
        },
    )


if __name__ == "__main__":
    main()
