"""`qlora merge`: fold an adapter into a dense model folder."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx

from qlora_jax.adapters import merge
from qlora_jax.cli import options
from qlora_jax.cli.options import QuantOptions
from qlora_jax.io.adapter import adapter_tokenizer, load_adapter
from qlora_jax.io.hf import check_output, find, load, read_config, save_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Fold an adapter into a base and save a dense Hugging Face folder.

    The base is what --model holds: a 4-bit folder gives its dequantized weights, the
    original folder its own; --quant.codebook nf4 quantizes the original first.
    """

    model: str
    """Hugging Face folder or hub id: 4-bit or original, your choice."""

    adapter: str
    """Run folder or adapter folder."""

    out: Path
    """Folder to write."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the merged weights. Folding is in float32; this rounds once."""

    quant: QuantOptions = QuantOptions()
    """auto: --model as it is."""

    overwrite: bool = False
    """Write into a folder that is not empty."""


def parse(args: list[str], prog: str) -> Args:
    """Parses the flags."""
    return options.parse(Args, args, prog)


def run(args: Args) -> dict[str, Any]:
    """Runs; returns the figures."""
    folder = find(args.model)
    check_output(args.out, args.overwrite)
    quant = args.quant.resolve(folder, auto=None)
    # Read in float32, so that original weights are not rounded before folding.
    model, tokenizer = load(folder, quant, "float32", **args.quant.tables())
    merged = _cast(
        merge(load_adapter(args.adapter, model), dtype=args.dtype), args.dtype
    )
    saved = save_model(merged, args.out, source=folder, overwrite=args.overwrite)
    if (larger := adapter_tokenizer(args.adapter, tokenizer)) is not tokenizer:
        assert larger is not None
        larger.save_vocabulary(args.out)
    four_bit = quant or read_config(folder)[3]
    if four_bit is None:
        base = f"original weights of {args.model}"
    else:
        base = f"dequantized {four_bit.codebook} weights of {args.model}"
    return {**saved, "merged_onto": base, "dtype": args.dtype}


def _cast(model: Any, dtype: str) -> Any:
    graphdef, state = nnx.split(model)
    cast = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(dtype), state))
    cast.dtype = dtype
    return cast
