"""Experts that a GGUF file has in MXFP4 are given as a folder has them.

Nothing is decoded: codes and scales of pallas_kernels/formats/mxfp4.py are the file's, and
bytes are packed anew. For each 32 elements of a row a file has a block of 17 bytes. The first
is the scale, and a folder's too, as ggml halves what it stands for and doubles what codes
stand for. Of the 16 others byte i has element i in its low half and element 16 + i in its
high one. Source: ggml of llama.cpp, block_mxfp4 in ggml-common.h and ggml_e8m0_to_fp32_half in
ggml-impl.h.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pallas_kernels.formats.mxfp4 import BLOCK

BLOCK_BYTES = 1 + BLOCK // 2


class Entry(NamedTuple):
    """One of the two tensors that a folder has of a weight.

    Attributes:
      end: What follows the weight's name in its own.
      axes: The axes that a block has in it.
      read: Makes it of a weight's blocks, (rows, blocks of a row, 17).
    """

    end: str
    axes: tuple[int, ...]
    read: Callable[[np.ndarray], np.ndarray]

    def shape(self, weight: tuple[int, ...]) -> tuple[int, ...]:
        """Returns its shape, of a weight's."""
        return (*weight[:-1], weight[-1] // BLOCK, *self.axes)

    def n_bytes(self, weight: int) -> int:
        """Returns its bytes, of all that a weight takes in the file."""
        return weight // BLOCK_BYTES * (self.axes or (1,))[0]

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Makes it of a weight's rows, as the file has them."""
        return self.read(rows.reshape(rows.shape[0], -1, BLOCK_BYTES))


def _codes(blocks: np.ndarray) -> np.ndarray:
    """Puts neighbours into one byte, the first in its low half."""
    first, second = blocks[..., 1::2], blocks[..., 2::2]
    low = (first & 15) | (second << 4)
    return np.concatenate([low, (first >> 4) | (second & 240)], axis=-1)


def _scales(blocks: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(blocks[..., 0])


ENTRIES = (Entry("_blocks", (BLOCK // 2,), _codes), Entry("_scales", (), _scales))
