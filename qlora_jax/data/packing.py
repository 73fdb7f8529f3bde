"""Lengths decide which documents share a row, which rows share a step, and how long rows are.

All of it follows from lengths alone: integers in, integers out.
"""

import bisect
import math
from typing import NamedTuple

import numpy as np

WINDOW = 65_536
"""Documents that are packed together. Their packs take as long to find as those of a tenth."""

SAMPLE = 4096
"""Documents that packs are tried on, to find their capacity."""

NEARLY = 0.95
"""A step may have so many of its documents, on average, where it then takes fewer packs."""

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
    """Lays documents into packs, so that next to nothing of them is empty.

    A pack begins with the longest document that is left, and goes on with the longest that
    fits until one or two fill it to the last token. Which of equal length it is, their order
    decides, so that a shuffled order gives other packs each time.

    Args:
      lengths: Tokens of each document, int (documents,), 1 at least.
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
        order, filled = _packed(lengths[start:end], capacity)
        documents[start:end] = order + start
        sizes.append(filled)
    starts = np.zeros(sum(map(len, sizes)) + 1, np.int64)
    np.cumsum(np.concatenate(sizes), out=starts[1:])
    return Packs(documents, starts)


def _packed(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the documents of a window, pack after pack, and how many each pack has."""
    patterns = _patterns(lengths, capacity)
    size = np.array([len(pattern) for pattern, _ in patterns])
    times = np.array([number for _, number in patterns])
    # A place of a pattern: its length, its pattern, and the documents that come there.
    length = np.array([one for pattern, _ in patterns for one in pattern])
    of = np.repeat(np.arange(len(patterns)), size)
    place = np.arange(len(length)) - np.repeat(np.cumsum(size) - size, size)
    place += (np.cumsum(size * times) - size * times)[of]
    # Documents and places in the order of lengths stand one beside the other.
    by_length = np.argsort(length, kind="stable")
    of, place = of[by_length], place[by_length]
    turns = times[of]
    turn = np.arange(len(lengths)) - np.repeat(np.cumsum(turns) - turns, turns)
    documents = np.empty(len(lengths), np.int64)
    documents[np.repeat(place, turns) + turn * np.repeat(size[of], turns)] = _sorted(
        lengths
    )
    return documents, np.repeat(size, times)


def _sorted(lengths: np.ndarray) -> np.ndarray:
    """Returns the order by length; equal ones keep theirs."""
    # Keys of 16 bits are sorted by radix, several times as fast.
    few = lengths.max() < 1 << 16
    return np.argsort(lengths.astype(np.uint16) if few else lengths, kind="stable")


def _patterns(lengths: np.ndarray, capacity: int) -> list[tuple[list[int], int]]:
    """Returns the lengths of the documents of a pack, and how many packs are like it.

    As many as there are documents for, after which one length is used up. So patterns are
    about as many as different lengths, however many documents there are.
    """
    counted = np.bincount(lengths, minlength=capacity + 1)
    there, left = counted > 0, counted.tolist()
    shortest, patterns = int(there.argmax()), []
    for longest in range(len(left) - 1, 0, -1):
        while left[longest]:
            pattern = _pattern(longest, capacity - longest, shortest, left, there)
            times = min(left[one] // pattern.count(one) for one in set(pattern)) + 1
            for one in pattern:
                left[one] -= times - 1
                there[one] = left[one] > 0
            patterns.append((pattern, times))
    return patterns


def _pattern(
    longest: int, room: int, shortest: int, left: list[int], there: np.ndarray
) -> list[int]:
    """Takes the documents of a pack; returns their lengths.

    Args:
      longest: The longest that is left, which is taken in any case.
      room: Tokens that are left beside it.
      shortest: No document is shorter.
      left: How many documents of each length are left.
      there: Whether there are any.
    """
    pattern = [_took(longest, left, there)]
    while room >= shortest:
        fitting = there[: room + 1]
        if fitting[room]:
            pattern.append(_took(room, left, there))
            break
        half = -(-room // 2)
        pairs = fitting[half:] & fitting[room - half :: -1]
        if room % 2 == 0 and left[half] < 2:
            pairs[0] = False
        first = int(pairs.argmax())
        if pairs[first]:
            pattern.append(_took(half + first, left, there))
            pattern.append(_took(room - half - first, left, there))
            break
        longest = room - int(fitting[::-1].argmax())
        if not fitting[longest]:
            break
        pattern.append(_took(longest, left, there))
        room -= longest
    return pattern


def _took(length: int, left: list[int], there: np.ndarray) -> int:
    left[length] -= 1
    there[length] = left[length] > 0
    return length


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
    together = min(STEPS_SORTED, max(8, steps // 4)) * each
    window = np.arange(steps * each, dtype=np.int64) // together
    by_size = np.argsort(
        window * (int(sizes.max()) + 1) + sizes[whole], kind="stable"
    ).reshape(steps, each)
    order[whole] = lead + by_size[rng.permutation(steps)].ravel()
    return order


def packs_of_a_step(
    lengths: np.ndarray, documents: int, max_tokens: int
) -> tuple[int, int]:
    """Returns how many packs a step has, and their capacity, so that it has its documents.

    The packs are the least of 1, 2, 4, 6, 8, 12, 16, 24, ... that can hold them: numbers that
    micro-batches of a power of two divide with no row left empty.

    Args:
      lengths: Tokens of each document, in a shuffled order, int (documents,).
      documents: Documents of a step, on average.
      max_tokens: The largest capacity.
    """
    some = lengths[:SAMPLE]
    tokens, packs = documents * float(some.mean()), 1
    while packs * max_tokens < NEARLY * tokens:
        half = 3 if packs % 3 == 0 else 2  # 6 of 4 is 3 / 2, 8 of 6 is 4 / 3
        packs = 2 * packs if packs < 4 else packs * (half + 1) // half
    wanted = max(1.0, packs * len(some) / documents)
    steps = range(16, max_tokens + 16, 16)
    sizes = sorted({rounded(min(n, max_tokens), max_tokens) for n in steps})
    enough = bisect.bisect_left(
        sizes, -wanted, hi=len(sizes) - 1, key=lambda size: -_count(some, size)
    )
    near = sizes[max(0, enough - 1) : enough + 1]
    return packs, min(near, key=lambda size: abs(math.log(_count(some, size) / wanted)))


def _count(lengths: np.ndarray, capacity: int) -> int:
    """Returns how many packs documents make."""
    return sum(times for _, times in _patterns(lengths, capacity))


def rounded(length: int, max_tokens: int) -> int:
    """Returns a length rounded up, by about a thirty-second: 32 at least, then multiples of 16
    up to 512, and of 32, 64 and 128 beyond that, 1024 and 2048."""
    step = 16
    while step * 32 < length and step < 128:
        step *= 2
    return max(length, min(max(32, -(-length // step) * step), max_tokens))


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
