"""Does a merged folder say in transformers what base and adapter say here?

    python -m scripts.bench.merged MERGED --model MODEL --adapter RUN --torch-python PY

Compares the logits of one text: transformers on MERGED (bfloat16 weights, computed in
float32) against MODEL (held as the run held it) with the adapter applied, in float32.
What is left is the one rounding of the merged weights to bfloat16, 2**-9 a weight.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from scripts.bench import harness


def transformers_logits(folder: str, ids: str, out: str) -> None:
    """Writes what a folder says in transformers, in a Python that has torch."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        np.save(out, model(torch.tensor(np.load(ids))).logits.numpy())


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """Returns |a - b| / |b|, Frobenius."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def main() -> None:
    """Compares; prints one JSON line."""
    parser = harness.parser(__doc__)
    parser.add_argument("merged")
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--torch-python", required=True)
    parser.add_argument("--codebook", default="auto", help="how MODEL is held")
    parser.add_argument("--text", default="Natalia sold 48 clips in April. In May she")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        transformers_logits(args.merged, *args.worker)
        return
    import qlora_jax as qlora
    from qlora_jax.cli.options import open_model
    from qlora_jax.config.quant import QuantOptions

    quant = QuantOptions(codebook=args.codebook)
    model, tokenizer, said = open_model(args.model, args.adapter, quant, "float32")
    ids = np.array([tokenizer.encode(args.text)], np.int32)
    applied = np.asarray(model(ids))
    in_bf16, _, _ = open_model(args.model, args.adapter, quant, "bfloat16")
    rounded = np.asarray(in_bf16(ids))
    merged, _ = qlora.load(args.merged, dtype="float32")
    ours = np.asarray(merged(ids))
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "ids.npy"), Path(folder, "logits.npy")
        np.save(given, ids.astype(np.int64))
        harness.ran(harness.worker("merged", given, found, python=args.torch_python))
        theirs = np.load(found)
    figures = {
        **said,
        **{
            name: Path(vars(args)[name]).name for name in ("model", "adapter", "merged")
        },
        "transformers_vs_ours_on_merged": relative(theirs, ours),
        "transformers_on_merged_vs_applied": relative(theirs, applied),
        # The yardstick: the same adapter applied, but computed in bfloat16.
        "bfloat16_evaluation_vs_applied": relative(rounded, applied),
        "greedy_tokens_equal": bool((theirs.argmax(-1) == applied.argmax(-1)).all()),
    }
    harness.record("merged", args.append, **figures)


if __name__ == "__main__":
    main()
