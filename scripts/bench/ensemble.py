"""Two adapters of two styles, weighted against each other: what each weight costs both.

    python -m scripts.bench.ensemble --model stories15m --first shakespeare.txt \\
        --second rows.jsonl --out FOLDER [--append FILE]

Trains an adapter on each of two data sets (a text in pieces, or rows), then evaluates
(1 - t) * first + t * second, the exact weighted sum, on held-out rows of both. Writes
tradeoff.png, and says how far the sum is from its merged float32 model.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import qlora_jax as qlora
from qlora_jax.adapters.algebra import cosine_similarity, interpolate
from qlora_jax.adapters.value import Adapter
from qlora_jax.data import DataConfig, Dataset, read_dataset
from qlora_jax.evaluate import row_loss
from qlora_jax.text.tokenizer import Tokenizer
from scripts.bench import harness

PIECE = 400
"""Characters of a text that make a row."""
WEIGHTS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


def rows_of(path: Path, out: Path, tokenizer: Tokenizer) -> Dataset:
    """Reads rows, or cuts a text into some."""
    if path.suffix != ".jsonl":
        text = path.read_text(encoding="utf-8")[: 1200 * PIECE]
        pieces = [text[i : i + PIECE] for i in range(0, len(text), PIECE)]
        path = out / f"{path.stem}.jsonl"
        path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    return read_dataset(path, tokenizer, DataConfig(max_tokens=192))


def main() -> None:
    """Trains, weighs, plots."""
    parser = harness.parser(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--first", type=Path, required=True)
    parser.add_argument("--second", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    base, tokenizer = qlora.load(args.model, qlora.QuantConfig(), "float32")
    adapters, held = [], []
    for path in (args.first, args.second):
        rows, kept = rows_of(path, args.out, tokenizer).split(48, 0)
        model = qlora.attach(base, qlora.LoRAConfig(rank=16), key=jax.random.key(0))
        config = qlora.TrainConfig(
            max_steps=args.steps,
            micro_batch=8,
            grad_accum=1,
            learning_rate=1e-3,
            compute_dtype="float32",
        )
        trainer = qlora.Trainer(model, rows, config, args.out / path.stem)
        trainer.fit()
        adapters.append(Adapter.of(trainer.model))
        held.append(kept)
    before = [row_loss(base, rows, 8)[0] for rows in held]
    curve = []
    for t in WEIGHTS:
        model = interpolate(*adapters, t).on(base)
        curve.append([row_loss(model, rows, 8)[0] for rows in held])
        print(f"t {t:5.3f}   first {curve[-1][0]:.4f}   second {curve[-1][1]:.4f}")
    model = interpolate(*adapters, 0.5).on(base)
    merged = qlora.merge(model, dtype="float32")
    ids = jnp.asarray([held[0].rows[0].tokens[:64]])
    ours, theirs = (np.asarray(m(ids), np.float64) for m in (model, merged))
    apart = float(np.abs(ours - theirs).max() / np.abs(ours).max())
    plot(args, before, curve)
    figures = {
        "t": list(WEIGHTS),
        "losses": curve,
        "base": before,
        "cosine": float(cosine_similarity(*adapters).total),
        "merged_apart": apart,
    }
    harness.record("ensemble", args.append, **figures)


def plot(
    args: argparse.Namespace, before: list[float], curve: list[list[float]]
) -> None:
    """Draws one loss against the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4.5))
    axes.plot(*zip(*curve, strict=True), marker="o", label="(1 - t) first + t second")
    for t, point in zip(WEIGHTS[::2], curve[::2], strict=True):
        axes.annotate(f"t {t:g}", point, xytext=(5, 5), textcoords="offset points")
    axes.plot(*before, marker="x", linestyle="none", label="base")
    axes.set_xlabel(f"loss on {args.first.stem}")
    axes.set_ylabel(f"loss on {args.second.stem}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(args.out / "tradeoff.png", dpi=120)


if __name__ == "__main__":
    main()
