"""What an implementation of the product is: its two directions, and when it runs."""

import dataclasses
from collections.abc import Callable
from typing import Any

from pallas_kernels.annotations import Array
from pallas_kernels.device import Device
from pallas_kernels.formats import QuantizedTensor
from pallas_kernels.products import dot
from pallas_kernels.tuning import Choice, Problem

Addend = tuple[Array, Array] | None
"""A low-rank pair (u (m, r), v (width, r)) whose product u @ v.T is added."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implementation:
    """The two products, and when they can run.

    Attributes:
      forward: (x (m, k), w, addend, choice, device) -> (m, n) in x's dtype.
      backward: (dy (m, n), w, addend, choice, device) -> (m, k) in dy's dtype, or None
        where there is none; then backward is chosen freely.
      refuses: (problem, w, device, exact) -> why it cannot run, or None.
      configure: (problem, device, exact) -> Config fields where no table has them.
      suits: (problem, device) -> whether a free choice takes it, where it can run.
      candidates: (problem, device) -> the Config fields that are worth timing for a table,
        those that should be best first.
    """

    forward: Callable[..., Array]
    backward: Callable[..., Array] | None
    refuses: Callable[[Problem, QuantizedTensor, Device, bool], str | None]
    configure: Callable[[Problem, Device, bool], dict[str, Any]] = lambda *_: {}
    suits: Callable[[Problem, Device], bool] = lambda *_: True
    candidates: Callable[[Problem, Device], list[dict[str, Any]]] = lambda *_: []


def plain(product: Callable[[Array, QuantizedTensor], Array]) -> Callable[..., Array]:
    """Makes an implementation's product of one that knows no addend."""

    def run(x, w, addend: Addend, choice: Choice, device: Device) -> Array:
        return added(product(x, w), addend)

    return run


def added(y: Array, addend: Addend) -> Array:
    """Adds the low-rank product to one that is done."""
    if addend is None:
        return y
    u, v = addend
    return y + dot(u, v, 1, 1).astype(y.dtype)
