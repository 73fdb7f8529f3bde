"""`qlora quantize`: a 4-bit copy of a model folder, which other tools open too."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from qlora_jax.cli import options
from qlora_jax.cli.options import QuantOptions
from qlora_jax.errors import ConfigError
from qlora_jax.io.hf import check_output, find, load, read_config, save_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Write a 4-bit copy of a model folder, with bitsandbytes' keys."""

    model: str
    """Hugging Face folder or hub id."""

    out: Path
    """Folder to write."""

    quant: QuantOptions = QuantOptions()
    dtype: str = "bfloat16"
    """Of what stays dense: bfloat16, float16 or float32."""

    overwrite: bool = False
    """Write into a folder that is not empty."""


def parse(args: list[str], prog: str) -> Args:
    """Parses the flags."""
    return options.parse(Args, args, prog)


def run(args: Args) -> dict[str, Any]:
    """Runs; returns the figures."""
    folder = find(args.model)
    check_output(args.out, args.overwrite)
    if read_config(folder)[3] is not None or args.quant.codebook == "none":
        raise ConfigError(f"{folder} is 4-bit already, or --quant.codebook is none")
    quant = args.quant.config()
    if quant.codebook == "int4":
        print("note: int4 folders open in qlora_jax alone", file=sys.stderr)
    model, _ = load(folder, quant, args.dtype)
    saved = save_model(model, args.out, source=folder, overwrite=args.overwrite)
    return {**saved, "base": options.describe_quant(folder, quant)}
