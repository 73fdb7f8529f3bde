"""The order of an epoch's rows, which follows from seed and epoch alone."""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Share:
    """Rows of one source, and how often an epoch has each of them.

    Attributes:
      rows: The numbers of its rows in the dataset, int (n,).
      weight: 0.3: other 30 % of them in each epoch. 2: each twice.
    """

    rows: np.ndarray
    weight: float

    @property
    def count(self) -> int:
        """Rows of an epoch."""
        return max(1, round(len(self.rows) * self.weight))


def epoch_rows(rows: int, shares: Sequence[Share]) -> int:
    """Returns how many rows an epoch has; without shares, each once."""
    return sum(share.count for share in shares) if shares else rows


def epoch_order(
    rows: int, shares: Sequence[Share], seed: int, epoch: int
) -> np.ndarray:
    """Returns the numbers of an epoch's rows, in the order in which they are drawn."""
    count = epoch_rows(rows, shares)
    order = np.random.default_rng((seed, 0, epoch)).permutation(count)
    if not shares:
        return order
    parts = [_taken(share, (seed, 3, i), epoch) for i, share in enumerate(shares)]
    return np.concatenate(parts)[order]


def _taken(share: Share, seed: tuple[int, ...], epoch: int) -> np.ndarray:
    """Returns a source's rows of an epoch: all of them come before any comes again."""
    count = len(share.rows)
    positions = np.arange(epoch * share.count, (epoch + 1) * share.count)
    taken = np.empty_like(positions)
    for turn in np.unique(positions // count).tolist():
        order = np.random.default_rng((*seed, turn)).permutation(count)
        now = positions // count == turn
        taken[now] = order[positions[now] % count]
    return share.rows[taken]
