"""Which documents share a row, which rows share a step, and what lengths batches have.

All of it follows from lengths alone: integers in, integers out.
"""

import bisect
from typing import NamedTuple

import numpy as np

WINDOW = 16_384
"""Documents that are packed together: of so many, nearly every row is filled to the last
token, and packing takes as long as drawing their order does."""

STEPS_SORTED = 50
"""Steps whose rows are sorted by length together, before the steps are shuffled."""

MOST_LENGTHS = 3
"""Lengths of a run's batches, since each compiles anew."""

WORTH = 0.01
"""Another length has to save this part of all tokens."""


class Packs(NamedTuple):
    """Documents in rows.

    Attributes:
      documents: Indices into the lengths, pack after pack, int32 (documents,).
      starts: Where each pack begins there, and the end, int64 (packs + 1,).
    """

    documents: np.ndarray
    starts: np.ndarray


def pack(lengths: np.ndarray, capacity: int, window: int | None = None) -> Packs:
    """Lays documents into packs: the longest first, each into the fullest that it fits in.

    Equal lengths keep their order, so that a shuffled order gives other packs each time.

    Args:
      lengths: Tokens of each document, int (documents,).
      capacity: Tokens of a pack. A longer document is a pack of its own.
      window: Neighbours that are packed together; None for WINDOW, or a quarter of a small
        epoch, since packs of all its documents would be nearly the same every time.
    """
    count = len(lengths)
    if window is None:
        window = min(WINDOW, max(1000, count // 4))
    bounds = np.linspace(0, count, max(1, -(-count // window)) + 1).astype(np.int64)
    documents = np.empty(count, np.int32)
    sizes: list[np.ndarray] = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        order, filled = _best_fit(lengths[start:end], capacity)
        documents[start:end] = order + start
        sizes.append(filled)
    starts = np.zeros(sum(map(len, sizes)) + 1, np.int64)
    np.cumsum(np.concatenate(sizes), out=starts[1:])
    return Packs(documents, starts)


def _best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the documents of a window, pack after pack, and how many each pack has.

    Documents of one length, and packs with one room left, are handled together, so that the
    time goes with the number of different lengths.
    """
    # Keys of 16 bits are sorted by radix, several times as fast.
    key = np.uint16 if lengths.max() < 1 << 16 else np.int64
    order = np.argsort((lengths.max() - lengths).astype(key), kind="stable")
    different, counts = np.unique(lengths, return_counts=True)
    shortest = int(different[0])
    rooms: list[int] = []  # tokens left in packs, sorted
    having: dict[
        int, list[tuple[int, int]]
    ] = {}  # room -> first pack and count of each run
    placed: list[tuple[int, int, int]] = []  # first pack, packs, documents in each
    packs = 0

    def leave(room: int, first: int, count: int) -> None:
        if room < shortest or not count:
            return
        if room not in having:
            having[room] = []
            bisect.insort(rooms, room)
        having[room].append((first, count))

    for length, count in zip(
        different[::-1].tolist(), counts[::-1].tolist(), strict=True
    ):
        while count:
            at = bisect.bisect_left(rooms, length)
            if at == len(rooms):
                room = max(length, capacity)
                most = room // length
                first, there = packs, -(-count // most)
                packs += there
            else:
                room = rooms[at]
                most = room // length
                first, there = having[room].pop()
                if not having[room]:
                    del having[room], rooms[at]
            full = min(there, count // most)
            if full:
                placed.append((first, full, most))
                leave(room - most * length, first, full)
                count -= full * most
            rest = min(count, most) if full < there else 0
            if rest:
                placed.append((first + full, 1, rest))
                leave(room - rest * length, first + full, 1)
                count -= rest
                full += 1
            leave(room, first + full, there - full)
    first, run, each = np.array(placed, np.int64).T
    amount = run * each
    within = np.arange(len(lengths)) - np.repeat(np.cumsum(amount) - amount, amount)
    pack_of = np.repeat(first, amount) + within // np.repeat(each, amount)
    by_pack = np.argsort(pack_of, kind="stable")
    return order[by_pack], np.bincount(pack_of, minlength=packs)


def grouped(
    sizes: np.ndarray, lead: int, each: int, rng: np.random.Generator
) -> np.ndarray:
    """Puts rows of like sizes into one step.

    Args:
      sizes: Tokens of each row, in the shuffled order of an epoch.
      lead: Rows at the beginning that belong to the epoch before's last step.
      each: Rows of a step.
      rng: Shuffles the steps.

    Returns:
      The new order, as indices into the old, int32. The first `lead` rows and those that
      are too few for another whole step stay where they are.
    """
    order = np.arange(len(sizes), dtype=np.int32)
    steps = max(0, len(sizes) - lead) // each
    if not steps:
        return order
    whole = slice(lead, lead + steps * each)
    together = min(STEPS_SORTED, max(1, steps // 4)) * each
    window = np.arange(steps * each, dtype=np.int64) // together
    by_size = np.argsort(
        window * (int(sizes.max()) + 1) + sizes[whole], kind="stable"
    ).reshape(steps, each)
    order[whole] = lead + by_size[rng.permutation(steps)].ravel()
    return order


def rounded(length: int, max_tokens: int) -> int:
    """Returns the length rounded up to a multiple of 32, 64 or 128, by at most a sixteenth of
    what is over 512."""
    step = 32
    while step * 32 < length and step < 128:
        step *= 2
    return max(length, min(-(-length // step) * step, max_tokens))


def chosen_lengths(
    longest: np.ndarray, most: int, max_tokens: int, count: int = MOST_LENGTHS
) -> tuple[int, ...]:
    """Returns the few lengths that pad steps the least; more than one where it is worth it.

    Args:
      longest: Tokens of the longest row of each step that counts, int (steps,).
      most: The largest value that any step has.
      max_tokens: No length is larger.
      count: The largest number of lengths.
    """
    steps, number = np.unique(longest, return_counts=True)
    last = rounded(most, max_tokens)
    amounts: dict[int, int] = {last: 0}
    for length, times in zip(steps.tolist(), number.tolist(), strict=True):
        length = rounded(length, max_tokens)
        amounts[length] = amounts.get(length, 0) + times
    lengths = np.array(sorted(amounts), np.int64)
    upto = np.cumsum([amounts[length] for length in lengths.tolist()])
    # cost[j]: tokens of the steps up to lengths[j], where that is the last length taken.
    cost = upto * lengths
    ways: list[list[tuple[int, ...]]] = [[(length,) for length in lengths.tolist()]]
    costs = [int(cost[-1])]
    for _ in range(1, min(count, len(lengths))):
        now, way = cost.copy(), list(ways[-1])
        for j in range(1, len(lengths)):
            split = cost[:j] + (upto[j] - upto[:j]) * lengths[j]
            i = int(np.argmin(split))
            if split[i] < now[j]:
                now[j], way[j] = split[i], (*ways[-1][i], int(lengths[j]))
        cost = now
        ways.append(way)
        costs.append(int(cost[-1]))
    enough = next(i for i, c in enumerate(costs) if c <= costs[-1] + WORTH * costs[0])
    return ways[enough][-1]
