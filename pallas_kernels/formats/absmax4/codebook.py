"""The 16-value codebooks and the 256-value map of double quantization.

Constants are those of bitsandbytes (functional.py: get_4bit_type, create_dynamic_map),
reproduced to the last bit, because checkpoints are exchanged with it (contract C2).
"""

import functools
from typing import Literal, get_args

import numpy as np

Codebook = Literal["nf4", "fp4", "int4"]
CODEBOOKS: tuple[Codebook, ...] = get_args(Codebook)

BLOCK_SIZES = tuple(2**i for i in range(5, 13))
"""Numbers of elements that may share one absmax."""

ABSMAX_BLOCK_SIZE = 256
"""Absmax values that share one `absmax_scale` in double quantization."""

# QLoRA (arXiv 2305.14314) appendix E: quantiles of N(0, 1) with an exact zero.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# E2M1 magnitudes by code, before division by the largest; bit 3 is the sign.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_FP4 = tuple(v / 12 for v in _FP4_MAGNITUDES) + tuple(
    0 - v / 12 for v in _FP4_MAGNITUDES
)
# Symmetric integers -8..7 over 7; no element reaches -8/7, so 15 codes are in use.
_INT4 = tuple(i / 7 for i in range(-8, 8))

_VALUES = {"nf4": _NF4, "fp4": _FP4, "int4": _INT4}


@functools.cache
def values(codebook: Codebook) -> np.ndarray:
    """Returns the 16 float32 values of a codebook, indexed by code."""
    table = np.array(_VALUES[codebook], np.float32)
    table.setflags(write=False)
    return table


@functools.cache
def thresholds(codebook: Codebook) -> tuple[np.ndarray, np.ndarray]:
    """Returns what maps a value in [-1, 1] to its nearest code.

    Returns:
      15 ascending float32 midpoints, and the 16 codes in ascending order of value: an
      element gets the code whose index is the number of midpoints below it. A tie goes
      to the lower value, as in bitsandbytes.
    """
    table = values(codebook)
    order = np.argsort(table, kind="stable")
    ascending = table[order]
    return (ascending[1:] + ascending[:-1]) / np.float32(2), order.astype(np.uint8)


@functools.cache
def dynamic_map(signed: bool = True) -> np.ndarray:
    """Returns an 8-bit dynamic map: 256 ascending float32 values in (-1, 1], or in [0, 1].

    Seven decades of linearly spaced midpoints, and 0 and 1. With signs each is there
    twice, but for -1, which is not; without, a decade has twice as many. float32(float64)
    at each step reproduces the fused multiply-add of torch's linspace, so the bits equal
    those bitsandbytes stores.

    Source: bitsandbytes functional.py, create_dynamic_map (Dettmers, arXiv 1511.04561).
    """
    start, stop = np.float32(0.1), np.float32(1.0)
    table = [np.float32(0.0), np.float32(1.0)]
    for decade in range(7):
        count = 2 ** (decade if signed else decade + 1) + 1
        step = np.float64(np.float32((stop - start) / np.float32(count - 1)))
        index = np.arange(count)
        edges = np.where(
            index < count // 2, start + step * index, stop - step * (count - 1 - index)
        ).astype(np.float32)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (decade - 6)) * middles
        table += [*scaled, *-scaled] if signed else [*scaled]
    result = np.sort(np.array(table, np.float32))
    result.setflags(write=False)
    return result
