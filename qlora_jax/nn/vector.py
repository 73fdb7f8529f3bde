"""Frozen vectors: one number a head, or an expert."""

from typing import Any, ClassVar

from jaxtyping import Array

from qlora_jax.nn.frozen import Weighted
from qlora_jax.nn.variables import FrozenParam


class Vector(Weighted):
    """Numbers that a mixer or router reads, such as attention's sinks.

    Attributes:
      weight: FrozenParam, (..., numbers); neither quantized nor adapted.
    """

    NDIM = 1
    AXES: ClassVar = {"weight": ("numbers",)}

    def __init__(self, weight: Array):
        self.weight = FrozenParam(weight)

    def holding(self, weight: Any, bias: Any = None) -> "Vector":
        """Returns the vector of other numbers."""
        return type(self)(weight)


class RowVector(Vector):
    """A Vector that files have as a matrix of one row, (..., 1, numbers)."""

    NDIM = 2
    AXES: ClassVar = {"weight": ("one", "numbers")}
