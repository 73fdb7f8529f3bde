"""The storage contract (C1): how 4-bit codes lie in memory.

A weight is kept in Hugging Face orientation (n out, k in). Its blocks run along k in
row-major order. Three layouts hold the same codes, each an exact permutation of the
others; only this file knows them:

  planar256  k % 256 == 0. uint16 (n, k/4); word [n, 64*g + j] holds in nibble f (bits
             4f to 4f+3) the code of element k = 256*g + 64*f + j. A nibble plane of 64
             words is 64 consecutive elements: one block.
  planar64   k % 64 == 0. The same with groups of 64 and planes of 16.
  flat       anything. bitsandbytes' own bytes: uint8 (ceil(size/2),), element 2i in the
             high nibble of byte i, 2i+1 in the low one.

The functions take numpy or jax arrays and return the same kind.
"""

import math
from typing import Any, Literal

import jax
import numpy as np

Layout = Literal["planar256", "planar64", "flat"]


def choose_layout(shape: tuple[int, ...], block_size: int) -> Layout:
    """Returns the layout for a tensor: by its last axis, as contract C1 says."""
    k = shape[-1] if shape else 1
    if block_size % 64 or k % block_size:
        return "flat"
    if k % 256 == 0:
        return "planar256"
    return "planar64"


def plane_width(layout: Layout) -> int | None:
    """Returns the elements of one nibble plane in a group, 64 or 16; None if flat."""
    return {"planar256": 64, "planar64": 16, "flat": None}[layout]


def pack(codes: Any, layout: Layout, shape: tuple[int, ...]) -> Any:
    """Packs one code an element into stored words.

    Args:
      codes: uint8 (size,), values 0 to 15, in row-major order of `shape`; in the flat
        layout one more behind an odd size.
      layout: The layout to pack into: 'planar256', 'planar64' or 'flat'.
      shape: Shape of the tensor.

    Returns:
      uint16 (size/k, k/4) for planar layouts, uint8 (ceil(size/2),) for flat.
    """
    if (width := plane_width(layout)) is None:
        pairs = codes.reshape(-1, 2)
        return (pairs[:, 0] << 4) | pairs[:, 1]
    planes = codes.reshape(-1, shape[-1] // (4 * width), 4, width)
    f0, f1, f2, f3 = (planes[:, :, f].astype(np.uint16) for f in range(4))
    return (f0 | (f1 << 4) | (f2 << 8) | (f3 << 12)).reshape(-1, shape[-1] // 4)


def unpack(stored: Any, layout: Layout, shape: tuple[int, ...]) -> Any:
    """Inverts `pack`: stored words to uint8 (size,) codes, one an element."""
    xp = np if isinstance(stored, np.ndarray) else jax.numpy
    size = math.prod(shape)
    if (width := plane_width(layout)) is None:
        return xp.stack([stored >> 4, stored & 15], -1).reshape(-1)[:size]
    words = stored.reshape(-1, shape[-1] // (4 * width), width)
    planes = xp.stack([(words >> (4 * f)) & 15 for f in range(4)], 2)
    return planes.reshape(-1).astype(np.uint8)


def from_bitsandbytes(packed: Any, layout: Layout, shape: tuple[int, ...]) -> Any:
    """Permutes bitsandbytes' bytes, uint8 (ceil(size/2),), into a layout."""
    if layout == "flat":
        return packed
    return pack(unpack(packed, "flat", shape), layout, shape)


def to_bitsandbytes(stored: Any, layout: Layout, shape: tuple[int, ...]) -> Any:
    """Permutes stored words into bitsandbytes' bytes, uint8 (ceil(size/2),)."""
    if layout == "flat":
        return stored
    return pack(unpack(stored, layout, shape), "flat", shape)
