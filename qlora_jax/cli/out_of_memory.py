"""What to say when XLA runs out of device memory: what the run needs, and what would fit."""

import contextlib
import re
from collections.abc import Callable, Iterator

import jax

from qlora_jax.budget.estimate import Platform, estimate
from qlora_jax.budget.plan import flags_of, plan_memory, said
from qlora_jax.budget.setup import Setup
from qlora_jax.errors import ConfigError, OutOfMemoryError

_ASKED = re.compile(r"allocat\w* ([\d.]+ ?(?:bytes|[KMGT]i?B))")
_MARGIN = 0.9
"""A run that did not fit, though it seemed to, is advised to need so much of it at most."""


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
