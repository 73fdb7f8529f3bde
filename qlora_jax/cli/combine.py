"""`qlora combine`: several adapters as one."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax

from qlora_jax.adapters.algebra import chain, update_norms
from qlora_jax.adapters.combine import MajoritySign, Method, combine
from qlora_jax.cli import options
from qlora_jax.errors import ConfigError
from qlora_jax.exchange.ours import save_adapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Combine adapters of one base into one adapter.

    concat is the exact weighted sum, svd its best approximation by a rank. linear, ties,
    dare_* and magnitude_prune are PEFT's: on the factors, or with _svd on whole updates;
    they are no sums. chain is for two that were trained in turn, the second on the base
    with the first merged.
    """

    adapters: tuple[str, ...]
    """Run folders, adapter folders or (with --model) PEFT folders."""

    out: Path
    """Adapter folder to write."""

    weights: tuple[float, ...] | None = None
    """One an adapter, which may be negative; without them all are 1."""

    method: Method | Literal["chain"] = "concat"
    """This is how they become one: concat is the exact sum, svd its best approximation of a
    rank; the others are PEFT's; chain is for an adapter that was trained upon another."""

    rank: int | None = None
    """The result has this rank with svd and methods that end in _svd; None for the largest of
    those given."""

    density: float = 1.0
    """Part of the entries that ties, dare and magnitude_prune keep."""

    majority_sign: MajoritySign = "total"
    """ties takes the sign of the values' sum (total), or the sign that more of them have
    (frequency)."""

    seed: int = 0
    """The values that dare drops are drawn from this number."""

    model: str | None = None
    """The base, which PEFT folders need."""

    overwrite: bool = False
    """Replace an adapter that is there."""


def parse(args: list[str], prog: str) -> Args:
    """Parses the flags."""
    return options.parse(Args, args, prog)


def run(args: Args) -> dict[str, Any]:
    """Runs; returns the figures."""
    adapters = options.open_adapters(args.adapters, args.model)
    if args.method == "chain":
        if len(adapters) != 2 or args.weights is not None:
            raise ConfigError("--method chain takes two --adapters, and no --weights")
        made = chain(*adapters)
    else:
        made = combine(
            adapters,
            args.weights or (1.0,) * len(adapters),
            args.method,
            rank=args.rank,
            density=args.density,
            majority_sign=args.majority_sign,
            key=jax.random.key(args.seed),
        )
    out = save_adapter(args.out, made.lora, made.config, overwrite=args.overwrite)
    return {
        "out": str(out),
        "method": args.method,
        "adapters": list(args.adapters),
        **options.describe_ranks(made),
        "norm": float(update_norms(made).total),
        "norms": [float(update_norms(adapter).total) for adapter in adapters],
    }
