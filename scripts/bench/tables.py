"""What a quantized embedding and head cost in perplexity, beside 4-bit linears alone.

    python -m scripts.bench.tables --model DIR --text FILE [--max-chars N] [--append FILE]

The text's perplexity with the base dense, with its linears 4-bit, and with the tables in int8
or 4-bit too (a tied head follows the embedding), all computed in bfloat16; and the bytes of
each.
"""

from pathlib import Path
from typing import Any

import jax
from flax import nnx

import qlora_jax as qlora
from scripts.bench import harness

NF4 = qlora.QuantConfig()
CASES: dict[str, tuple[qlora.QuantConfig | None, dict[str, Any]]] = {
    "dense": (None, {}),
    "nf4": (NF4, {}),
    "nf4, int8 embedding": (NF4, {"embedding": "int8"}),
    "nf4, 4-bit embedding": (NF4, {"embedding": "4bit"}),
    "nf4, int8 embedding and head": (NF4, {"embedding": "int8", "head": "int8"}),
    "nf4, 4-bit embedding and head": (NF4, {"embedding": "4bit", "head": "4bit"}),
}


def main() -> None:
    """Runs the cases; prints a table and one JSON line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--max-chars", type=int, default=60_000)
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8")[: args.max_chars]
    found, tokens = {}, 0
    for name, (quant, tables) in CASES.items():
        model, tokenizer = qlora.load(args.model, quant, **tables)
        assert tokenizer is not None
        if "head" in tables and model.lm_head is None:
            continue  # the same as the embedding alone
        ids = tokenizer.encode(text)
        window = min(512, model.config.max_position_embeddings - 1)
        value, tokens = qlora.perplexity(
            model, ids, window=window, bos_id=tokenizer.bos_id, batch_size=4
        )
        size = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
        found[name] = {"perplexity": round(value, 4), "bytes": size}
        print(f"{name:<32}{value:10.4f}{size / 2**20:10.1f} MiB", flush=True)
    base = found["nf4"]["perplexity"]
    cost = {n: round(f["perplexity"] / base - 1, 5) for n, f in found.items()}
    figures = {"cases": found, "over_nf4": cost, "tokens": tokens}
    harness.record("tables", args.append, **figures)


if __name__ == "__main__":
    main()
