"""Batches of a run, each a pure function of the data, the settings and the step."""

import bisect
import dataclasses
import math
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from qlora_jax.config.data import Packing
from qlora_jax.data.layout import Layout, padded_length
from qlora_jax.data.order import Share, epoch_order, epoch_rows
from qlora_jax.data.packing import (
    WINDOW,
    Packs,
    chosen_lengths,
    grouped,
    pack,
    packs_of_a_step,
)
from qlora_jax.data.tokenize import Row
from qlora_jax.errors import ConfigError

Resolved = Literal["on", "off", "drawn"]
"""Batches are made in one of these ways: "on" packs documents into rows, "off" groups rows by
length, and "drawn" takes rows in the order in which they are drawn."""

Batch = dict[str, np.ndarray]

_KEPT = 4
"""Epochs whose plans are kept; of 10 million documents one is 60 MB."""


@runtime_checkable
class HasRows(Protocol):
    """A dataset has these attributes that `resolve` looks at."""

    rows: list[Row]


def resolve(packing: Packing, data: HasRows, packs: bool, name: str) -> Resolved:
    """Returns how a run's batches are made.

    Args:
      packing: What the settings say.
      data: The dataset.
      packs: Whether the objective takes rows of several documents.
      name: The objective's name.

    Raises:
      ConfigError: packing is on, and cannot be.
    """
    if packing in ("off", "drawn"):
        return packing
    reason = against_packing(data, packs, name)
    if reason and packing == "on":
        raise ConfigError(
            f"--data.packing on: {reason}; choose auto or off, which group rows by length"
        )
    return "off" if reason else "on"


def against_packing(data: HasRows, packs: bool, name: str) -> str | None:
    """Says why documents cannot share a row; None where they can. Arguments as above."""
    if not packs:
        return f"objective {name} takes rows of one document"
    return _unpackable(data.rows)


def _unpackable(rows: Sequence[Row]) -> str | None:
    for row in rows:
        if row.other is not None:
            return "rows are pairs, which stand one below the other"
        if row.adapter is not None:
            return "rows name their adapters, and a row of a batch has one"
        for name, value in row.extras.items():
            if np.ndim(value) == 0:
                return f"rows have {name!r}, of which a row of a batch has one"
    return None


def _check_packable(rows: Sequence[Row]) -> None:
    if reason := _unpackable(rows):
        raise ConfigError(f"these rows cannot be packed: {reason}")


@dataclasses.dataclass(frozen=True)
class _Plan:
    """An epoch.

    Attributes:
      documents: Numbers of rows of the dataset, int32.
      starts: Where each pack begins there, and the end; None where each document is a row.
      order: The packs in the order of the steps, int32; None for the order that they have.
    """

    documents: np.ndarray
    starts: np.ndarray | None = None
    order: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.documents if self.starts is None else self.starts[1:])

    def unit(self, place: int) -> np.ndarray:
        """Returns the documents of the row at a place."""
        at = place if self.order is None else int(self.order[place])
        if self.starts is None:
            return self.documents[at : at + 1]
        return self.documents[self.starts[at] : self.starts[at + 1]]

    def sizes(self, sizes: np.ndarray) -> np.ndarray:
        """Returns the tokens of each row, of the sizes of the dataset's rows."""
        found = sizes[self.documents]
        if self.starts is not None:
            found = np.add.reduceat(found, self.starts[:-1])
        return found if self.order is None else found[self.order]


class Batches:
    """The batches of a run. Epochs follow one another without a seam.

    Attributes:
      packing: How they are made.
      rows: Rows of a step that hold documents: packs, or documents.
      lengths: Tokens of a row: one of these, at most three unless rows come as drawn.
      shapes: Every shape that a batch's tokens can have.
      documents: Documents of a step, on average.
      steps_by_length: Steps of the first epoch by their length, with the one that goes on in
        the second.
      padding: The share of padding in those.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        max_tokens: int,
        shares: Sequence[Share] = (),
        *,
        documents: int,
        micro_batch: int,
        seed: int,
        packing: Resolved,
    ):
        """Plans the first epoch; `Dataset.batches` has the arguments."""
        if packing == "on":
            _check_packable(rows)
        self.packing: Resolved = packing
        self._rows, self._shares, self._seed = rows, shares, seed
        self._max_tokens = max_tokens
        self._layout = Layout(rows)
        self._count = epoch_rows(len(rows), shares)
        self._plans: dict[int, _Plan] = {}
        self._begins = [0]
        self._lock = threading.RLock()
        self._capacity, self.rows = 0, documents
        if packing == "on":
            order = epoch_order(len(rows), shares, seed, 0).astype(np.int32)
            lengths = self._layout.sizes[order]
            self.rows, self._capacity = packs_of_a_step(lengths, documents, max_tokens)
            packs = self._packed(order)
            self._plans[0] = self._arranged(0, 0, order, packs)
        self._accum = -(-self.rows // micro_batch)
        self._slots = -(-self.rows // self._accum)
        self.documents = float(documents)
        self._measure()

    def _measure(self) -> None:
        """Sets what follows from the first epoch."""
        first, layout = self._plan(0), self._layout
        if self.packing == "on":
            self.documents = self.rows * self._count / len(first)
        steps = len(first) // self.rows
        whole = steps * self.rows
        sizes = first.sizes(layout.sizes)[:whole].reshape(steps, self.rows)
        longest = sizes.max(axis=1)
        tokens = int(first.sizes(layout.tokens)[:whole].sum())
        if whole < len(first):
            units = self._units(steps)
            size = max(int(layout.sizes[unit].sum()) for unit in units)
            longest = np.append(longest, size)
            tokens += sum(int(layout.tokens[unit].sum()) for unit in units)
        if self.packing == "drawn":
            sizes = np.unique(layout.sizes).tolist()
            padded = {padded_length(size, self._max_tokens) for size in sizes}
            self.lengths = tuple(sorted(padded))
        else:
            most = max(int(layout.sizes.max()), self._capacity)
            self.lengths = chosen_lengths(longest, most, self._max_tokens)
        self.steps_by_length = Counter[int]()
        for size, number in zip(*np.unique(longest, return_counts=True), strict=True):
            self.steps_by_length[self._length(int(size))] += int(number)
        slots = self._slots * layout.width
        lead = () if self._accum == 1 else (self._accum,)
        self.shapes = tuple((*lead, slots, length) for length in self.lengths)
        laid = sum(length * n for length, n in self.steps_by_length.items())
        self.padding = 1 - tokens / (laid * slots * self._accum)

    def steps(self, epochs: float) -> int:
        """Returns the optimizer steps of so many passes over the data."""
        if self.packing != "on":
            return max(1, math.ceil(self._count * epochs / self.rows))
        whole = int(epochs)
        packs = self._begin(whole)
        if epochs > whole:
            packs += math.ceil((epochs - whole) * len(self._plan(whole)))
        return max(1, math.ceil(packs / self.rows))

    def at(self, step: int) -> Batch:
        """Returns the batch of a step, 0, 1, 2, ...

        Its arrays are (micro, length), or (accum, micro, length) where the micro-batches of a
        step are several.
        """
        units = self._units(step)
        longest = max(int(self._layout.sizes[unit].sum()) for unit in units)
        rows = [[self._rows[i] for i in unit.tolist()] for unit in units]
        return self._laid(rows, self._length(longest))

    def _laid(self, units: list[list[Row]], length: int) -> Batch:
        """Lays documents into a batch, a list of them for each row."""
        batch = self._layout.lay(
            units,
            self._accum * self._slots,
            length,
            packed=self.packing == "on",
        )
        if self._accum == 1:
            return batch
        return {
            name: x.reshape(self._accum, -1, *x.shape[1:]) for name, x in batch.items()
        }

    @property
    def pairs(self) -> bool:
        """Whether each document has another beside it, in a row of its own."""
        return self._layout.pairs

    def examples(self) -> list[Batch]:
        """Returns a batch without any document of each shape, to compile for."""
        return [self._laid([], length) for length in self.lengths]

    def tokens(self, step: int) -> int:
        """Returns the tokens of a step's documents, padding left out."""
        return sum(int(self._layout.tokens[unit].sum()) for unit in self._units(step))

    def numbers(self, step: int) -> list[int]:
        """Returns the numbers of the documents of a step, in the dataset."""
        return [i for unit in self._units(step) for i in unit.tolist()]

    def said(self) -> str:
        """Says what batches are, in a sentence."""
        lengths = " or ".join(map(str, self.lengths))
        if self.packing == "drawn":
            lengths = f"{self.lengths[0]} to {self.lengths[-1]}"
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        if self.packing == "on":
            what = (
                f"a step packs {self.documents:.4g} documents, on average, into {rows}"
            )
        else:
            ways = {"off": "like lengths", "drawn": "any length"}
            pairs = "1 pair" if self.rows == 1 else f"{self.rows} pairs"
            of = pairs if self._layout.pairs else rows
            what = f"a step has {of} of {ways[self.packing]}, each one document"
        return f"{what}, padded to {lengths} tokens; {self.padding:.1%} of those is padding"

    def _length(self, longest: int) -> int:
        if self.packing == "drawn":
            return padded_length(longest, self._max_tokens)
        return next(length for length in self.lengths if length >= longest)

    def _units(self, step: int) -> list[np.ndarray]:
        """Returns the documents of each row of a step."""
        place, units = step * self.rows, []
        epoch = self._epoch(place)
        while len(units) < self.rows:
            plan, begin = self._plan(epoch), self._begin(epoch)
            start = place + len(units) - begin
            end = min(len(plan), start + self.rows - len(units))
            units += [plan.unit(i) for i in range(start, end)]
            epoch += 1
        return units

    def _epoch(self, place: int) -> int:
        """Returns the epoch in which the row at a place of the run is."""
        if self.packing != "on":
            return place // self._count
        with self._lock:
            while self._begins[-1] <= place:
                self._begin(len(self._begins))
            return bisect.bisect_right(self._begins, place) - 1

    def _begin(self, epoch: int) -> int:
        """Returns how many rows come before an epoch."""
        if self.packing != "on":
            return epoch * self._count
        with self._lock:
            while len(self._begins) <= epoch:
                plan = self._plan(len(self._begins) - 1)
                if len(self._begins) <= epoch:
                    self._begins.append(self._begins[-1] + len(plan))
            return self._begins[epoch]

    def _plan(self, epoch: int) -> _Plan:
        """Returns an epoch's plan; made once, and kept for some epochs."""
        with self._lock:
            if epoch not in self._plans:
                begin = self._begin(epoch)
                made = self._planned(epoch, begin)
                if len(self._plans) >= _KEPT:
                    del self._plans[next(iter(self._plans))]
                self._plans[epoch] = made
            return self._plans[epoch]

    def _planned(self, epoch: int, begin: int) -> _Plan:
        order = epoch_order(len(self._rows), self._shares, self._seed, epoch)
        order = order.astype(np.int32)
        if self.packing == "drawn":
            return _Plan(order)
        if self.packing == "off":
            rng = np.random.default_rng((self._seed, 4, epoch))
            lead = -begin % self.rows
            by = grouped(self._layout.sizes[order], lead, self.rows, rng)
            return _Plan(order[by])
        return self._arranged(epoch, begin, order, self._packed(order))

    def _arranged(
        self, epoch: int, begin: int, order: np.ndarray, packs: Packs
    ) -> _Plan:
        """Returns the plan of an epoch with an order and packs of it."""
        rng = np.random.default_rng((self._seed, 4, epoch))
        shuffled = rng.permutation(len(packs.starts) - 1).astype(np.int32)
        plan = _Plan(order[packs.documents], packs.starts, shuffled)
        # Packs are like each other, but those of one document that is longer.
        sizes = np.maximum(plan.sizes(self._layout.sizes), self._capacity)
        by = grouped(sizes, -begin % self.rows, self.rows, rng)
        return dataclasses.replace(plan, order=shuffled[by])

    def _packed(self, order: np.ndarray) -> Packs:
        return pack(self._layout.sizes[order], self._capacity)


class Every:
    """Batches that have each row of a dataset once, to evaluate on.

    Attributes:
      lengths, shapes: As `Batches` has them.
    """

    def __init__(
        self, rows: Sequence[Row], max_tokens: int, micro_batch: int, packing: Resolved
    ):
        """Plans them; `Dataset.every` has the arguments."""
        if packing == "on":
            _check_packable(rows)
        self._rows, self._packed = rows, packing == "on"
        self._layout = Layout(rows)
        sizes = self._layout.sizes
        self._slots, plan, least = micro_batch, _Plan(np.arange(len(rows))), 0
        if packing == "on":
            # Files may be sorted, and neighbours of one length do not fill a pack.
            shuffled = np.random.default_rng(0).permutation(len(rows))
            mixed = sizes[shuffled]
            self._slots, least = packs_of_a_step(mixed, micro_batch, max_tokens)
            packs = pack(mixed, least, WINDOW)
            plan = _Plan(shuffled[packs.documents], packs.starts)
        # Full packs keep their order.
        order = np.argsort(np.maximum(plan.sizes(sizes), least), kind="stable")
        self._plan = dataclasses.replace(plan, order=order)
        ends = [*range(self._slots, len(plan), self._slots), len(plan)]
        longest = plan.sizes(sizes)[order]
        self._longest = np.maximum.reduceat(
            longest, range(0, len(plan), self._slots)
        ).tolist()
        self._places = [
            range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)
        ]
        if packing == "drawn":
            self.lengths = tuple(
                sorted({padded_length(size, max_tokens) for size in self._longest})
            )
        else:
            most = int(longest.max())
            self.lengths = chosen_lengths(np.array(self._longest), most, max_tokens)
        self.shapes = tuple(
            (self._slots * self._layout.width, length) for length in self.lengths
        )

    def examples(self) -> list[Batch]:
        """Returns a batch without any document of each shape, to compile for."""
        return [
            self._layout.lay([], self._slots, length, packed=self._packed)
            for length in self.lengths
        ]

    def __len__(self) -> int:
        """Counts the batches."""
        return len(self._places)

    def __iter__(self) -> Iterator[Batch]:
        """Yields them; the last is filled up with rows of weight 0."""
        for places, longest in zip(self._places, self._longest, strict=True):
            units = [
                [self._rows[i] for i in self._plan.unit(place).tolist()]
                for place in places
            ]
            length = next(n for n in self.lengths if n >= longest)
            yield self._layout.lay(units, self._slots, length, packed=self._packed)
