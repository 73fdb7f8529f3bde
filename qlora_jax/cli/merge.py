"""`qlora merge`: fold an adapter into a model folder, and say what that lost."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx

from pallas_kernels.formats import PackedWeight
from qlora_jax.adapters import Adapter, detach, merge, merge_corrected
from qlora_jax.adapters.merge_report import merge_report
from qlora_jax.cli import options
from qlora_jax.config.quant import QuantConfig, QuantOptions
from qlora_jax.errors import ConfigError
from qlora_jax.exchange.ours import adapter_tokenizer, load_adapter, save_adapter
from qlora_jax.sources.hub import find
from qlora_jax.sources.load import load
from qlora_jax.sources.save import check_output, save_model

REPORT = "merge_report.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Fold an adapter into a base and save a Hugging Face folder.

    The base is what --model holds: a 4-bit folder gives its dequantized weights, the
    original folder its own; --quant.codebook nf4 quantizes the original first. What each
    weight lost against base + adapter in float32 is in merge_report.json.
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
    """With --requantize: the best adapter of this rank for what that lost, written to
    adapter/ in --out, to be loaded with it."""

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
    _check(args)
    source = options.open_base(args.model, args.adapter)
    check_output(args.out, args.overwrite)
    quant = options.held_linears(args.quant, source, auto=None)
    # Read in float32, so that original weights are not rounded before folding.
    model, tokenizer = load(
        source, quant, "float32", **options.held_tables(args.quant, source)
    )
    model = load_adapter(args.adapter, model)
    corrected = None
    if args.requantize is None:
        merged = merge(model, dtype=args.dtype)
        report = merge_report(model, merged)
    else:
        config = QuantConfig(
            codebook=args.requantize,
            block_size=args.quant.block_size,
            double_quant=args.quant.double_quant,
        )
        if args.correction_rank is None:
            merged = merge(model, requantize=config)
        else:
            corrected = merge_corrected(
                model,
                config,
                rank=args.correction_rank,
                iterations=args.correction_iterations,
            )
            merged = detach(corrected)
        report = merge_report(model, merged)
    merged = _cast(merged, args.dtype)
    saved = save_model(merged, args.out, source=source, overwrite=args.overwrite)
    if (larger := adapter_tokenizer(args.adapter, tokenizer)) is not tokenizer:
        assert larger is not None
        larger.save_vocabulary(args.out)
    figures = report.to_json()
    said = {"relative_error": report.total[0], "error_of_update": report.total[1]}
    if corrected is not None:
        after = merge_report(model, corrected)
        figures["corrected"] = after.to_json()
        said["corrected_error"], said["corrected_error_of_update"] = after.total
        adapter = Adapter.of(corrected)
        save_adapter(args.out / "adapter", adapter.lora, adapter.config, overwrite=True)
    (args.out / REPORT).write_text(json.dumps(figures, indent=2) + "\n")
    columns = {"relative error": report.relative, "of the update": report.of_update}
    options.print_figures(columns, dict(zip(columns, report.total, strict=True)))
    four_bit = quant or source.stored
    if four_bit is None:
        base = f"original weights of {args.model}"
    else:
        at = args.model if source.path == find(args.model) else source
        base = f"dequantized {four_bit.codebook} weights of {at}"
    return {**saved, "merged_onto": base, "dtype": args.dtype, **said}


def _check(args: Args) -> None:
    rank, rounds, problems = args.correction_rank, args.correction_iterations, []
    if rank is not None and args.requantize is None:
        problems.append("--correction-rank goes with --requantize")
    if rounds != 1 and rank is None:
        problems.append("--correction-iterations goes with --correction-rank")
    if rank is not None and rank < 1:
        problems.append(f"--correction-rank is {rank}, expected at least 1")
    if rounds < 1:
        problems.append(f"--correction-iterations is {rounds}, expected at least 1")
    if problems:
        raise ConfigError("; ".join(problems))


def _cast(model: Any, dtype: str) -> Any:
    graphdef, state = nnx.split(model)

    def to_dtype(value: Any) -> Any:
        if isinstance(value, PackedWeight):
            return dataclasses.replace(value, dtype=dtype)
        return value.astype(dtype)

    cast = nnx.merge(
        graphdef,
        jax.tree.map(to_dtype, state, is_leaf=lambda x: isinstance(x, PackedWeight)),
    )
    cast.dtype = dtype
    return cast
