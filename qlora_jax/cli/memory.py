"""A run and its memory: what it needs is compared with what there is before it starts, and
XLA's running out all the same is answered with settings that need less."""

import contextlib
import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import tyro

from qlora_jax.budget.estimate import Platform, estimate
from qlora_jax.budget.host import available_host_bytes
from qlora_jax.budget.plan import PICKED, flags_of, parse_bytes, plan_memory, said
from qlora_jax.budget.setup import Setup
from qlora_jax.cli import options
from qlora_jax.config.quant import QuantConfig
from qlora_jax.config.run import RunConfig
from qlora_jax.data.batches import Batches
from qlora_jax.errors import ConfigError, OutOfMemoryError
from qlora_jax.sources.source import Source

A = TypeVar("A", bound="Auto")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Auto(RunConfig):
    """A run some of whose settings are to be picked for its memory."""

    auto: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Names of the settings that were given as auto: micro_batch, offload."""


_ASKED = re.compile(r"allocat\w* ([\d.]+ ?(?:bytes|[KMGT]i?B))")
_MARGIN = 0.9
"""A run that did not fit, though it seemed to, is advised to need so much of it at most."""


def within_memory(
    args: A, source: Source, quant: QuantConfig | None, batches: Batches
) -> A:
    """Refuses a run that its memory cannot hold; picks settings that are auto.

    Raises:
      ConfigError: it does not fit, with the settings that would; or there is no limit to
        pick them for.
    """
    limit, host = memory_limit(args), available_host_bytes()
    if limit is None:
        if args.auto:
            flags = " and ".join(
                f"--train.{x.replace('_', '-')} auto" for x in args.auto
            )
            raise ConfigError(
                f"{flags}: a {jax.default_backend()} reports no memory to keep to; give "
                "--memory, such as --memory 16GiB"
            )
        return args
    setup = setup_of(args, source, quant, batches)
    platform: Platform = "gpu" if jax.default_backend() == "gpu" else "cpu"
    if args.auto:
        chosen = plan_memory(
            setup,
            limit,
            host_bytes=host,
            platform=platform,
            fixed=set(PICKED) - set(args.auto),
        ).setup
        print(f"{args.memory or 'the GPU'}: {flags_of(chosen)}", file=sys.stderr)
        return dataclasses.replace(args, train=chosen.train, auto=())
    need = estimate(setup, platform)
    if need.device_bytes <= limit and (host is None or need.host_bytes <= host):
        if need.safe_bytes > limit:
            print(
                f"this run needs about {said(need.device_bytes)} of {said(limit)} of "
                f"device memory and may run out: such an estimate can be {need.margin:.0%} "
                "too low",
                file=sys.stderr,
            )
        return args
    try:
        plan = plan_memory(setup, limit, host_bytes=host, platform=platform)
        way_out = f"It would fit with {flags_of(plan.setup)}."
    except ConfigError as error:
        way_out = f"With other settings too, {error}"
    if need.device_bytes > limit:
        parts = sorted(need.device.items(), key=lambda part: -part[1])[:3]
        said_parts = ", ".join(f"{name} {said(size)}" for name, size in parts)
        what = (
            f"needs about {said(need.device_bytes)} of device memory and has "
            f"{said(limit)} ({said_parts})"
        )
    else:
        assert host is not None
        what = (
            f"keeps about {said(need.host_bytes)} in host memory, of which {said(host)} "
            "are free"
        )
    raise ConfigError(f"this run {what}. {way_out}")


def setup_of(
    args: RunConfig, source: Source, quant: QuantConfig | None, batches: Batches
) -> Setup:
    """Returns what the memory of a run depends on."""
    return Setup(
        config=source.config,
        train=args.train,
        lora=args.lora,
        quant=quant or source.stored,
        max_tokens=batches.lengths[-1],
        packed_rows=batches.rows if batches.packing == "on" else None,
        pairs=batches.pairs,
        **options.held_tables(args.quant, source),
    )


def memory_limit(args: RunConfig) -> int | None:
    """Returns the device memory that a run may take, in bytes; None where it is not known."""
    if args.memory is not None:
        return parse_bytes(args.memory)
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") if jax.default_backend() == "gpu" else None


@contextlib.contextmanager
def advised(
    setup: Callable[[], Setup], limit: int | None, host: int | None
) -> Iterator[None]:
    """Answers XLA's out of memory with the plan's advice.

    Args:
      setup: Returns what the memory of the run depends on.
      limit: Device memory that the run may take, in bytes; None where it is not known.
      host: Host memory that may be pinned, in bytes; None for no limit.

    Raises:
      OutOfMemoryError: in the place of XLA's error; what it needs, and settings that fit.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemoryError(_advice(setup(), limit, host, str(error))) from error


def _advice(setup: Setup, limit: int | None, host: int | None, error: str) -> str:
    platform: Platform = "gpu" if jax.default_backend() == "gpu" else "cpu"
    need = estimate(setup, platform).device_bytes
    asked = _ASKED.search(error)
    more = f", asking for {asked[1]} more" if asked else ""
    had = "" if limit is None else f", and {said(limit)} were there"
    aim = int(_MARGIN * min(need, limit or need))
    try:
        plan = plan_memory(setup, aim, host_bytes=host, platform=platform)
        way_out = f"Settings that need less: {flags_of(plan.setup)}"
    except ConfigError as problem:
        way_out = f"With other settings too, {problem}"
    return (
        f"the device ran out of memory{more}. By estimate this run needs {said(need)}{had}; "
        f"other programs on the device take their part. {way_out}. A run that had begun goes "
        "on from its last checkpoint (--resume)"
    )
