"""`qlora compress`: an adapter of lower rank, and what that loses."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from qlora_jax.adapters.algebra import compress, difference, update_norms
from qlora_jax.cli import options
from qlora_jax.exchange.ours import save_adapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Bring an adapter's rank down: the best approximation of each linear's update."""

    adapter: str
    """Run folder, adapter folder or (with --model) PEFT folder."""

    out: Path
    """Adapter folder to write."""

    rank: int | None = None
    """Every linear gets this rank; give it or --tolerance."""

    tolerance: float | None = None
    """Largest relative error of a linear's update; each gets the rank that it needs."""

    model: str | None = None
    """The base, which a PEFT folder needs."""

    overwrite: bool = False
    """Replace an adapter that is there."""


def parse(args: list[str], prog: str) -> Args:
    """Parses the flags."""
    return options.parse(Args, args, prog)


def run(args: Args) -> dict[str, Any]:
    """Prints a table of errors; returns the figures."""
    (adapter,) = options.open_adapters((args.adapter,), args.model)
    made = compress(adapter, args.rank, args.tolerance)
    lost, whole = update_norms(difference(adapter, made)), update_norms(adapter)
    errors = {
        name: float(lost.linears[name] / norm) if norm else 0.0
        for name, norm in whole.linears.items()
    }
    total = float(lost.total / whole.total) if whole.total else 0.0
    options.print_figures({"relative error": errors}, {"relative error": total})
    out = save_adapter(args.out, made.lora, made.config, overwrite=args.overwrite)
    return {
        "out": str(out),
        **options.describe_ranks(made),
        "relative_error": total,
        "largest_relative_error": max(errors.values(), default=0.0),
        "parameters": sum(x.size for x in jax.tree.leaves(made.lora)),
    }
