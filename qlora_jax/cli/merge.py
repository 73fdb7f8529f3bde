"""`qlora merge`: fold an adapter into a model folder, and say what that lost."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from qlora_jax.cli import options
from qlora_jax.config.quant import QuantConfig, QuantOptions
from qlora_jax.exchange.merge import Merging, merge_folder
from qlora_jax.sources.hub import find


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Fold an adapter into a base and save a Hugging Face folder.

    The base is what --model holds: a 4-bit folder gives its dequantized weights, the
    original folder its own; --quant.codebook nf4 quantizes the original first. What each
    weight lost against base + adapter in float32 is in merge_report.json. One weight at a
    time is in memory, never the model.
    """

    model: str
    """Hugging Face folder or hub id: 4-bit or original, your choice."""

    adapter: str
    """Run folder or adapter folder."""

    out: Path
    """Folder to write."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """The merged weights have this dtype. They are folded in float32 and rounded once."""

    requantize: Literal["nf4", "fp4", "int4"] | None = None
    """Save merged linears in 4 bits instead, which loses a part of the adapter."""

    correction_rank: int | None = None
    """With --requantize this writes, to adapter/ in --out, the best adapter of this rank for
    what that lost, to be loaded with the merged folder. A higher rank makes up for more of
    it."""

    correction_iterations: int = 1
    """Rounds of quantizing anew what that adapter leaves, and fitting it again. More than one
    lose less with the adapter, and more without it."""

    quant: QuantOptions = QuantOptions()
    """auto: --model as it is."""

    overwrite: bool = False
    """Write into a folder that is not empty."""


def parse(args: list[str], prog: str) -> Args:
    """Parses the flags."""
    return options.parse(Args, args, prog)


def run(args: Args) -> dict[str, Any]:
    """Runs; returns the figures."""
    source = options.open_base(args.model, args.adapter)
    quant = options.held_linears(args.quant, source, auto=None)
    requantize = None
    if args.requantize is not None:
        requantize = QuantConfig(
            codebook=args.requantize,
            block_size=args.quant.block_size,
            double_quant=args.quant.double_quant,
        )
    merging = Merging(
        quant=quant,
        tables=options.held_tables(args.quant, source),
        dtype=args.dtype,
        requantize=requantize,
        correction_rank=args.correction_rank,
        correction_iterations=args.correction_iterations,
    )
    saved, report, corrected = merge_folder(
        source, args.adapter, args.out, merging, overwrite=args.overwrite
    )
    said = {"relative_error": report.total[0], "error_of_update": report.total[1]}
    if corrected is not None:
        said["corrected_error"], said["corrected_error_of_update"] = corrected.total
    columns = {"relative error": report.relative, "of the update": report.of_update}
    options.print_figures(columns, dict(zip(columns, report.total, strict=True)))
    four_bit = quant or source.stored
    if four_bit is None:
        base = f"original weights of {args.model}"
    else:
        at = args.model if source.path == find(args.model) else source
        base = f"dequantized {four_bit.codebook} weights of {at}"
    return {**saved, "merged_onto": base, "dtype": args.dtype, **said}
