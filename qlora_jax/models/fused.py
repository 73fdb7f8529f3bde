"""Tensors of a folder that hold all experts of a layer: cut into one a linear, and joined.

Families whose files have such tensors list them as FUSED. Everywhere else an expert's linear
is a parameter of its own, under the name that NAMES gives it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from qlora_jax.names import template_of

T = TypeVar("T")
Place = tuple[int, int]
"""An expert, and which of an expert's tensors."""


class Fused(NamedTuple):
    """A tensor that holds the same linear, or several, of all experts of a layer.

    Its first axis counts the experts. What follows is one matrix (or vector) for an expert,
    whose rows are those of all parts.

    Attributes:
      name: Its name, with {} for the layer.
      parts: The names of what it is cut into, with {} for layer and expert.
      transposed: Whether an expert's matrix is (in, out), and not (out, in).
      interleaved: Whether rows of the parts take turns; else each part follows the one
        before.
    """

    name: str
    parts: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False

    def part_shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of a part; of a tensor that cannot be cut a shape of zeros."""
        one = whole[:0:-1] if self.transposed else whole[1:]
        if not one or one[0] % len(self.parts) or (self.transposed and len(one) != 2):
            return (0,) * max(1, len(one))
        return (one[0] // len(self.parts), *one[1:])

    def cut(self, whole: Any, place: Place) -> np.ndarray:
        """Returns one part as a view of the whole: an array, or what has each expert's."""
        expert, part = place
        one = whole[expert].T if self.transposed else whole[expert]
        return one[self.rows(part, one.shape[0])]

    def rows(self, part: int, count: int) -> slice:
        """Returns which of an expert's rows, so many in all, are a part's."""
        if self.interleaved:
            return slice(part, None, len(self.parts))
        size = count // len(self.parts)
        return slice(part * size, (part + 1) * size)

    def join(self, parts: Mapping[Place, np.ndarray]) -> np.ndarray:
        """Returns the whole of all parts of all experts."""
        count = len(self.parts)
        first = parts[0, 0]
        one = (count * first.shape[0], *first.shape[1:])
        shape = one[::-1] if self.transposed else one
        whole = np.empty((len(parts) // count, *shape), first.dtype)
        for place, array in parts.items():
            self.cut(whole, place)[...] = array
        return whole


def cuts(
    fused: Iterable[Fused], shapes: Mapping[str, tuple[int, ...]], experts: int
) -> Iterator[tuple[str, Fused, dict[str, Place]]]:
    """Finds which tensors of a folder are to be cut.

    Args:
      fused: A family's FUSED.
      shapes: The shape of every tensor, by its usual name.
      experts: The number of experts.

    Yields:
      (name of a tensor, what it is, {name of a part: its place}); without parts where it
      does not hold that number of experts.
    """
    known = {one.name: one for one in fused}
    for name, shape in shapes.items():
        if (one := known.get(template_of(name))) is None:
            continue
        places = {}
        if shape[:1] == (experts,) and math.prod(one.part_shape(shape)):
            layer = _number(name)
            places = {
                part.format(layer, expert): (expert, i)
                for expert in range(experts)
                for i, part in enumerate(one.parts)
            }
        yield name, one, places


class Joining:
    """Puts the parts of fused tensors together again, as they come.

    Args:
      fused: A family's FUSED.
      experts: The number of experts.
    """

    def __init__(self, fused: Iterable[Fused], experts: int):
        self._fused = {part: one for one in fused for part in one.parts}
        self._experts = experts
        self._waiting: dict[str, dict[Place, np.ndarray]] = {}

    def takes(self, name: str) -> bool:
        """Whether a tensor of this name is a part of a whole."""
        return template_of(name) in self._fused

    def add(self, name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Takes a tensor; yields it, or the whole that it was the last part of."""
        one = self._fused.get(template_of(name))
        if one is None:
            yield name, array
            return
        layer, expert = _numbers(name)
        whole = one.name.format(layer)
        parts = self._waiting.setdefault(whole, {})
        parts[expert, one.parts.index(template_of(name))] = array
        if len(parts) == len(one.parts) * self._experts:
            yield whole, one.join(self._waiting.pop(whole))

    def incomplete(self) -> list[str]:
        """Returns a sentence for each whole of which parts have not come."""
        return [
            f"{name} was not written: {len(parts)} of its parts are there, and others are not"
            for name, parts in self._waiting.items()
        ]

    def ordered(self, items: Iterable[T], name: Callable[[T], str]) -> list[T]:
        """Returns items in an order in which few parts wait: those of one whole together.

        Args:
          items: What will be written, in any order.
          name: What an item is called in the folder.
        """
        groups: dict[str, list[T]] = {}
        for item in items:
            own = name(item)
            one = self._fused.get(template_of(own))
            key = own if one is None else one.name.format(_number(own))
            groups.setdefault(key, []).append(item)
        return [item for group in groups.values() for item in group]


def _numbers(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]


def _number(name: str) -> int:
    return _numbers(name)[0]
