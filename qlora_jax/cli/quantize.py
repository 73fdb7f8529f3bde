"""`qlora quantize`: a 4-bit copy of a model folder, which other tools open too.

With --quant.embedding or --quant.head int8, or experts in MXFP4, it opens in qlora_jax alone.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from qlora_jax.cli import options
from qlora_jax.config.quant import QuantOptions
from qlora_jax.errors import ConfigError
from qlora_jax.files import check_output
from qlora_jax.sources.quantize import quantize_folder
from qlora_jax.sources.source import open_source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Write a 4-bit copy of a model folder, with bitsandbytes' keys."""

    model: str
    """Hugging Face folder or hub id."""

    out: Path
    """Folder to write."""

    quant: QuantOptions = QuantOptions()
    dtype: str = "bfloat16"
    """What stays dense is written in this dtype: bfloat16, float16 or float32."""

    overwrite: bool = False
    """Write into a folder that is not empty."""


def parse(args: list[str], prog: str) -> Args:
    """Parses the flags."""
    return options.parse(Args, args, prog)


def run(args: Args) -> dict[str, Any]:
    """Runs; returns the figures."""
    source = open_source(args.model)
    check_output(args.out, args.overwrite)
    if source.stored is not None or args.quant.codebook == "none":
        raise ConfigError(f"{source} is 4-bit already, or --quant.codebook is none")
    if "4bit" in (args.quant.embedding, args.quant.head):
        raise ConfigError(
            "--quant.embedding and --quant.head 4bit: no folder holds such tables, they are "
            "made as a model loads; give them to train and evaluate, or int8 here"
        )
    quant, tables = args.quant.config(), options.held_tables(args.quant, source)
    if quant.codebook == "int4":
        print("note: int4 folders open in qlora_jax alone", file=sys.stderr)
    if "int8" in tables.values():
        print("note: int8 tables open in qlora_jax alone", file=sys.stderr)
    if tables["mxfp4"] == "keep":
        print(
            "note: MXFP4 experts beside 4-bit linears open in qlora_jax alone; "
            "--quant.mxfp4 decode makes 4-bit linears of them too",
            file=sys.stderr,
        )
    saved = quantize_folder(
        source, args.out, quant, args.dtype, overwrite=args.overwrite, **tables
    )
    return {**saved, "base": options.describe_quant(source, quant, args.quant.mxfp4)}
