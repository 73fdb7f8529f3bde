"""Which implementation runs a product, how it is tiled, and why.

Implementations register in `IMPLEMENTATIONS`, each with its own refusals and heuristics;
callers choose by name or leave the choice to `choose`.
"""

import dataclasses
import functools
import logging

import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.annotations import Array
from pallas_kernels.device import Device, current_device
from pallas_kernels.formats import QuantizedTensor
from pallas_kernels.packed_matmul import ampere, decode, hopper, two_pass, xla
from pallas_kernels.packed_matmul.implementation import Addend, Implementation
from pallas_kernels.tuning import Choice, Direction, Problem

logger = logging.getLogger(__name__)

IMPLEMENTATIONS: dict[str, Implementation] = {
    "decode": decode.IMPLEMENTATION,
    "hopper": hopper.IMPLEMENTATION,
    "ampere": ampere.IMPLEMENTATION,
    "two_pass": two_pass.IMPLEMENTATION,
    "xla": xla.IMPLEMENTATION,
}
"""The names stand best first. 'two_pass' and 'xla' run everywhere; 'xla' stays last."""


def choose(
    direction: Direction,
    m: int,
    w: QuantizedTensor,
    dtype: jnp.dtype,
    *,
    device: Device | None = None,
    name: str | None = None,
    exact: bool = False,
) -> Choice:
    """Returns what runs a product and how it is tiled; logs a free choice once.

    A free choice is the tuned table's, else the first of `IMPLEMENTATIONS` that can run
    and suits the problem.

    Args:
      direction: 'forward' or 'backward'.
      m: The number of tokens, which are the rows of x or dy.
      w: The weight.
      dtype: The dtype of x, or of dy in backward.
      device: What to choose for; None is the one being traced for.
      name: The implementation to take; None chooses freely.
      exact: Whether weights must be decoded exactly.

    Raises:
      ValueError: `name` is unknown or cannot run, with the reason (contract C7).
    """
    device = device or current_device()
    n, k = w.shape
    problem = Problem(direction, m, n, k, jnp.dtype(dtype).name)
    tuned = None if exact else tuning.look_up(problem, device)
    if name is None:
        return _best(problem, w, device, exact, tuned)
    if name not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation {name!r} is not known here; known: {known}")
    if reason := _refusal(name, problem, w, device, exact):
        raise ValueError(f"implementation {name!r} cannot run: {reason}")
    return _configured(name, problem, device, exact, tuned, "named by the caller")


def _best(
    problem: Problem,
    w: QuantizedTensor,
    device: Device,
    exact: bool,
    tuned: Choice | None,
) -> Choice:
    """Returns the first that can run and suits, the table's before all others."""
    refused = {}
    preferred = [tuned.implementation] if tuned else []
    for name in [*preferred, *IMPLEMENTATIONS]:
        if (one := IMPLEMENTATIONS.get(name)) is None:
            refused[name] = "in the table, but not known here"
        elif reason := _refusal(name, problem, w, device, exact):
            refused[name] = reason
        elif name not in preferred and not one.suits(problem, device):
            refused[name] = "slower here"
        else:
            why = tuned.why if tuned and name in preferred else "the best that runs"
            passed_over = "; ".join(f"{k}: {v}" for k, v in refused.items())
            where = device.kind or device.platform
            _log_choice(problem.direction, name, where, passed_over)
            return _configured(name, problem, device, exact, tuned, why)
    raise ValueError(f"no implementation can run this product: {refused}")


def run(
    direction: Direction,
    x: Array,
    w: QuantizedTensor,
    addend: Addend,
    name: str | None,
    exact: bool,
) -> Array:
    """Computes a product by what `choose` gives; a name without backward is free there.

    Args:
      direction: 'forward' or 'backward'.
      x: x (m, k) or dy (m, n).
      w: The weight.
      addend: A low-rank pair to add.
      name: An implementation, or None.
      exact: Whether weights must be decoded exactly.
    """
    device = current_device()
    if direction == "backward" and name and IMPLEMENTATIONS[name].backward is None:
        name = None
    choice = choose(
        direction, x.shape[0], w, x.dtype, device=device, name=name, exact=exact
    )
    one = IMPLEMENTATIONS[choice.implementation]
    product = one.forward if direction == "forward" else one.backward
    assert product is not None
    return product(x, w, addend, choice, device)


def _refusal(
    name: str, problem: Problem, w: QuantizedTensor, device: Device, exact: bool
) -> str | None:
    one = IMPLEMENTATIONS[name]
    if problem.direction == "backward" and one.backward is None:
        return "it has no backward"
    return one.refuses(problem, w, device, exact)


def _configured(
    name: str,
    problem: Problem,
    device: Device,
    exact: bool,
    tuned: Choice | None,
    why: str,
) -> Choice:
    if tuned is not None and tuned.implementation == name:
        return dataclasses.replace(tuned, why=why)
    fields = IMPLEMENTATIONS[name].configure(problem, device, exact)
    return Choice(name, tuple(sorted(fields.items())), why)


@functools.cache
def _log_choice(direction: str, name: str, device: str, passed_over: str) -> None:
    why = f"passed over {passed_over}" if passed_over else "the best registered"
    logger.info("nf4_matmul runs %r %s on %s (%s)", name, direction, device, why)
