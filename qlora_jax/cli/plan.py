"""`qlora plan`: what a run would need, and the fastest settings that fit a budget."""

import dataclasses
import sys
from typing import Annotated, Any, Literal

import jax
import tyro

from qlora_jax.budget.estimate import Memory, Platform
from qlora_jax.budget.plan import (
    Plan,
    flags_of,
    free_streaming_tokens,
    parse_bytes,
    picked,
    plan_memory,
    said,
)
from qlora_jax.budget.setup import Setup
from qlora_jax.cli import options
from qlora_jax.config.lora import LoRAConfig
from qlora_jax.config.quant import QuantConfig, QuantOptions
from qlora_jax.config.train import Optimizer
from qlora_jax.errors import ConfigError
from qlora_jax.sources.source import open_source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Say what training a model needs of memory, and pick settings that fit.

    Nothing is loaded: config.json is enough.
    """

    model: str
    """Hugging Face folder or hub id."""

    memory: str
    """Device memory to keep to: 24GiB, 24GB, 500MiB."""

    host_memory: str | None = None
    """Host memory that may be pinned; without it there is no limit."""

    max_tokens: int = 2048
    """Longest row, in tokens."""

    rows: int = 16
    """Rows of a step; micro-batch and accumulation divide them."""

    packed_rows: int | None = None
    """Where rows are packed, a step's documents (--rows of them) fill so many rows of
    --max-tokens; `qlora data` says how many."""

    pairs: bool = False
    """Each row has another beside it, as preferences have."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Activations, and what stays dense of the base, have this dtype."""

    optimizer: Optimizer = "adamw"
    """adamw, or adamw8bit."""

    lora: LoRAConfig = LoRAConfig()
    quant: QuantOptions = QuantOptions()

    exact: bool = False
    """Compile the chosen step and show XLA's own account beside the plan."""

    gpu: Annotated[str | None, tyro.conf.arg(name="for")] = None
    """The device: h200, a100, rtx4090, rtx3090 (none has to be there) or cpu; without it, a
    GPU's plan, and --exact compiles for this process's device."""


def parse(args: list[str], prog: str) -> Args:
    """Parses the flags."""
    return options.parse(Args, args, prog)


def run(args: Args) -> dict[str, Any]:
    """Prints the plan; returns its figures."""
    source = open_source(args.model)
    quant = options.held_linears(args.quant, source, auto=QuantConfig())
    for name in ("max_tokens", "rows", "packed_rows"):
        if (value := getattr(args, name)) is not None and value < 1:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} is {value}, expected at least 1")
    if args.pairs and args.packed_rows is not None:
        raise ConfigError("--packed-rows: pairs are not packed; give it or --pairs")
    tables = options.held_tables(args.quant, source)
    setup = Setup(
        config=source.config,
        quant=quant or source.stored,
        lora=args.lora,
        compute_dtype=args.dtype,
        max_tokens=args.max_tokens,
        packed_rows=args.packed_rows,
        pairs=args.pairs,
        optimizer=args.optimizer,
        **tables,
    )
    platform: Platform = "cpu" if args.gpu == "cpu" else "gpu"
    if args.gpu is None and args.exact:
        platform = "gpu" if jax.default_backend() == "gpu" else "cpu"
    plan = plan_memory(
        setup,
        parse_bytes(args.memory),
        rows=args.rows,
        host_bytes=parse_bytes(args.host_memory) if args.host_memory else None,
        platform=platform,
        # What the flags, or the folder, decided already.
        fixed=(
            ()
            if {tables["embedding"], tables["head"]} == {"none"}
            else ("embedding", "head")
        ),
    )
    figures = _figures(plan)
    _print(args, plan)
    if args.exact:
        figures["xla"] = _exact(args, plan)
    return figures


def _figures(plan: Plan) -> dict[str, Any]:
    return {
        "budget_bytes": plan.budget,
        "device_bytes": plan.memory.device_bytes,
        "safe_bytes": plan.memory.safe_bytes,
        "host_bytes": plan.memory.host_bytes,
        "device": plan.memory.device,
        "host": plan.memory.host,
        "optimizer": plan.setup.train.optimizer,
        **picked(plan.setup),
        "flags": flags_of(plan.setup),
        "next": None if plan.next_step is None else list(plan.next_step),
    }


def _print(args: Args, plan: Plan) -> None:
    rows = f"{args.rows} {'pairs' if args.pairs else 'rows'} a step"
    if args.packed_rows is not None:
        rows = f"{args.packed_rows} a step, into which {args.rows} documents are packed"
    print(f"{args.model}: rows of {args.max_tokens} tokens, {rows}")
    print(f"  {flags_of(plan.setup)}")
    _table(plan.memory)
    memory = plan.memory
    print(
        f"  budget {said(plan.budget)}, {said(memory.device_bytes)} estimated; "
        f"{memory.margin:.0%} more are kept free, as the estimate may be too low"
    )
    if plan.setup.train.stream:
        free = free_streaming_tokens(plan.setup)
        print(
            f"  streaming hides behind arithmetic from about {free:,} tokens a step "
            "(at an H200's 44 GB/s and 550 TFLOP/s)"
        )
    if plan.next_step is not None:
        more, what = plan.next_step
        print(f"  {said(more)} more would buy: {what}")


def _table(memory: Memory) -> None:
    for place, parts in (("device", memory.device), ("host", memory.host)):
        for name, size in parts.items():
            if size:
                print(f"  {place:<7}{name:<28}{said(size):>12}")


def _exact(args: Args, plan: Plan) -> dict[str, int]:
    from qlora_jax.train.compiled import account, compile_step

    target = None if args.gpu in (None, "cpu") else args.gpu
    print("compiling the step ...", file=sys.stderr)
    xla = account(compile_step(plan.setup, target))
    planned = plan.memory.device_bytes
    where = args.gpu or jax.default_backend()
    print(
        f"  XLA for {where}: {said(xla.device)} of device memory ({said(xla.arguments)} "
        f"resident, {said(xla.temporaries)} for a while), {said(xla.host)} of host memory; "
        f"the plan is {planned / xla.device - 1:+.1%}"
    )
    return {**xla._asdict(), "device": xla.device}
