"""Means with their standard errors."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Mean(NamedTuple):
    """A mean over independent questions, rows or windows.

    Attributes:
      value: The mean.
      stderr: Its standard error; None where there are fewer than two.
    """

    value: float
    stderr: float | None


def mean_of(values: Sequence[float] | np.ndarray) -> Mean:
    """Returns the mean of values, its error by their sample variance.

    For zeros and ones that is the binomial standard error with n - 1 for n, as
    lm-evaluation-harness has it: sqrt(p (1 - p) / (n - 1)).
    """
    values = np.asarray(values, np.float64)
    return ratio_of(values, np.ones_like(values))


def ratio_of(sums: np.ndarray, counts: np.ndarray) -> Mean:
    """Returns sum(sums) / sum(counts), where rows are drawn, not what they count.

    The error is that of a ratio estimator (Cochran, Sampling Techniques, section 6.4): rows
    with more tokens count more, and what a row's sum differs from its share is the noise.
    """
    value = float(sums.sum() / counts.sum())
    size = len(sums)
    if size < 2:
        return Mean(value, None)
    noise = ((sums - value * counts) ** 2).sum() * size / (size - 1)
    return Mean(value, float(math.sqrt(noise) / counts.sum()))
