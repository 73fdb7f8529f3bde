"""A batch whose rows have adapters of their own, against a batch with one adapter.

    python -m scripts.bench.several --model DIR [--adapters 8] [--append FILE]

The base in NF4, random adapters of one rank on all linears. Greedy tokens of a batch whose
rows take the adapters in turn, and the loss of a batch of sequences: by the base alone, with
one adapter attached as ever, with a bank that gives each row its own, with that bank and all
rows on one adapter, and row by row (batches of one). Rounds of all in turn; medians; ratios to
one adapter.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import qlora_jax as qlora
from qlora_jax.adapters import Adapter
from qlora_jax.adapters.bank import AdapterBank
from qlora_jax.nn import LoRA
from scripts.bench import harness


def random_adapter(model: Any, rank: int, seed: int) -> Any:
    """Returns the model with an adapter that changes what it says."""
    model = qlora.attach(model, qlora.LoRAConfig(rank=rank), key=jax.random.key(seed))
    rng = np.random.default_rng(seed)
    for _, node in nnx.iter_graph(model):
        if isinstance(node, LoRA):
            b = 0.01 * rng.standard_normal(node.lora_b[...].shape, np.float32)
            node.lora_b.set_value(jnp.asarray(b))
    return model


def loss_call() -> Callable[[Any, np.ndarray], None]:
    """Returns a call that computes a batch's loss, compiled once a structure of model."""
    compiled: dict[Any, Callable] = {}

    def loss_of(model: Any, tokens: np.ndarray) -> None:
        graphdef, state = nnx.split(model)
        if graphdef not in compiled:
            compiled[graphdef] = jax.jit(
                lambda state, batch: SFT(nnx.merge(graphdef, state), batch)[0]
            )
        batch = {"tokens": tokens, "weights": np.ones(tokens.shape, np.float32)}
        jax.block_until_ready(compiled[graphdef](state, batch))

    return loss_of


def main() -> None:
    """Runs the benchmark; prints a table and one JSON line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rows", type=int, help="of a batch; as many as adapters")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    base, _ = qlora.load(args.model, qlora.QuantConfig(), args.dtype)
    count = args.adapters
    models = [random_adapter(base, args.rank, seed) for seed in range(count)]
    adapters = {f"adapter{i}": Adapter.of(m) for i, m in enumerate(models)}
    bank = AdapterBank.of(base, adapters)
    rows = args.rows or count
    names = [f"adapter{i % count}" for i in range(rows)]
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, base.config.vocab_size, (rows, args.seq)).astype(np.int32)
    sample = qlora.SampleConfig(max_new_tokens=args.new_tokens)

    def new(model: Any, rows: np.ndarray) -> None:
        qlora.generate(model, rows[:, :32].tolist(), sample)

    figures = {}
    for what, call in (
        (f"{args.new_tokens} tokens a row", new),
        (f"loss of {rows} x {args.seq}", loss_call()),
    ):

        def each(call: Callable[[Any, Any], None] = call) -> None:
            for i, row in enumerate(tokens):
                call(models[i % count], row[None])

        runs: dict[str, Callable[[], None]] = {
            "base alone": lambda c=call: c(base, tokens),
            "one adapter": lambda c=call: c(models[0], tokens),
            "an adapter a row": lambda c=call: c(bank.route(names), tokens),
            "bank, all on one": lambda c=call: c(bank.route(names[0]), tokens),
            "row by row": each,
        }
        medians = harness.medians(harness.take_turns(runs, args.rounds))
        figures[what] = {name: round(value, 4) for name, value in medians.items()}
        for name, value in medians.items():
            ratio = value / medians["one adapter"]
            print(f"{what:<24}{name:<20}{value:9.3f} s{ratio:8.2f} x", flush=True)
    harness.record(
        "several",
        args.append,
        adapters=count,
        rows=rows,
        rank=args.rank,
        dtype=args.dtype,
        seconds=figures,
    )


if __name__ == "__main__":
    main()
