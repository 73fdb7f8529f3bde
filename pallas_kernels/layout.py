"""The storage contract (C1): how 4-bit codes lie in memory, and their tensor.

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

import dataclasses
import math
from typing import Any, Literal

import jax
import numpy as np

from pallas_kernels.annotations import Array, Float, Shaped, UInt8
from pallas_kernels.codebook import ABSMAX_BLOCK_SIZE, Codebook

Layout = Literal["planar256", "planar64", "flat"]


def choose_layout(shape: tuple[int, ...], block_size: int) -> Layout:
    """Returns the layout for a tensor: by its last axis, as contract C1 says."""
    k = shape[-1] if shape else 1
    if block_size % 64 or k % block_size:
        return "flat"
    if k % 256 == 0:
        return "planar256"
    return "planar64"


def plane_width(layout: Layout) -> int:
    """Returns the elements of one nibble plane in a group: 64 or 16."""
    return {"planar256": 64, "planar64": 16}[layout]


def pack(codes: Any, layout: Layout, shape: tuple[int, ...]) -> Any:
    """Packs one code an element into stored words.

    Args:
      codes: uint8 (size,), values 0 to 15, in row-major order of `shape`; in the flat
        layout one more behind an odd size.
      layout: Where they go.
      shape: Shape of the tensor.

    Returns:
      uint16 (size/k, k/4) for planar layouts, uint8 (ceil(size/2),) for flat.
    """
    if layout == "flat":
        pairs = codes.reshape(-1, 2)
        return (pairs[:, 0] << 4) | pairs[:, 1]
    width = plane_width(layout)
    planes = codes.reshape(-1, shape[-1] // (4 * width), 4, width)
    f0, f1, f2, f3 = (planes[:, :, f].astype(np.uint16) for f in range(4))
    return (f0 | (f1 << 4) | (f2 << 8) | (f3 << 12)).reshape(-1, shape[-1] // 4)


def unpack(stored: Any, layout: Layout, shape: tuple[int, ...]) -> Any:
    """Inverts `pack`: stored words to uint8 (size,) codes, one an element."""
    xp = np if isinstance(stored, np.ndarray) else jax.numpy
    size = math.prod(shape)
    if layout == "flat":
        return xp.stack([stored >> 4, stored & 15], -1).reshape(-1)[:size]
    width = plane_width(layout)
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


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """A 4-bit tensor with one absmax a block, itself quantized to 8 bits or kept.

    Invariants:
      element i (row-major) = codebook[code i] * absmax[i // block_size], in float32,
        rounded once to the wanted dtype.
      absmax[b] = dynamic_map[absmax_codes[b]] * absmax_scale[b // 256] + absmax_offset
        when double-quantized; then `absmax` is None. Otherwise the three are None.
      `shape` is that of one tensor. Arrays may have more leading axes than the layout
        says (layers stacked for a scan): jax.vmap or an index on all leaves gets one.
      Blocks follow the row-major order and straddle rows in the flat layout only.

    Attributes:
      codes: Packed codes (see `pack`).
      absmax: float32 (blocks,) or None.
      absmax_codes: uint8 (blocks,) or None.
      absmax_scale: float32 (ceil(blocks/256),) or None.
      absmax_offset: float32 () or None.
      shape: Shape of the tensor; (n, k) for a linear weight.
      block_size: Elements that share one absmax.
      codebook: 'nf4', 'fp4' or 'int4'.
      layout: 'planar256', 'planar64' or 'flat'.
      dtype: Name of the dtype it was quantized from; what dequantize gives by default.
    """

    codes: Shaped[Array, "..."]
    absmax: Float[Array, "..."] | None = None
    absmax_codes: UInt8[Array, "..."] | None = None
    absmax_scale: Float[Array, "..."] | None = None
    absmax_offset: Float[Array, "..."] | None = None
    shape: tuple[int, ...]
    block_size: int = 64
    codebook: Codebook = "nf4"
    layout: Layout
    dtype: str = "float32"

    @property
    def double_quant(self) -> bool:
        """Whether absmax is kept in 8 bits."""
        return self.absmax is None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, stacked layers included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def blocks(self) -> int:
        """Number of blocks of one tensor; the last may be partial."""
        return -(-math.prod(self.shape) // self.block_size)

    def tree_flatten_with_keys(self):
        """Arrays with their names, and the static fields."""
        keys = [(jax.tree_util.GetAttrKey(k), getattr(self, k)) for k in _ARRAYS]
        return keys, tuple(getattr(self, k) for k in _STATIC)

    @classmethod
    def tree_unflatten(cls, static, arrays):
        """Inverts tree_flatten_with_keys."""
        # Past __init__: transformations put bools, shapes and None in place of arrays.
        self = object.__new__(cls)
        for key, value in zip(_ARRAYS + _STATIC, (*arrays, *static), strict=True):
            object.__setattr__(self, key, value)
        return self


_ARRAYS = ("codes", "absmax", "absmax_codes", "absmax_scale", "absmax_offset")
_STATIC = ("shape", "block_size", "codebook", "layout", "dtype")


def array_shapes(
    shape: tuple[int, ...], block_size: int, layout: Layout, double_quant: bool
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns {array name: (shape, dtype)} of a tensor stored so, for planning."""
    size = math.prod(shape)
    blocks = -(-size // block_size)
    k = shape[-1] if shape else 1
    if layout == "flat":
        arrays = {"codes": ((-(-size // 2),), "uint8")}
    else:
        arrays = {"codes": ((size // k, k // 4), "uint16")}
    if not double_quant:
        return arrays | {"absmax": ((blocks,), "float32")}
    return arrays | {
        "absmax_codes": ((blocks,), "uint8"),
        "absmax_scale": ((-(-blocks // ABSMAX_BLOCK_SIZE),), "float32"),
        "absmax_offset": ((), "float32"),
    }


def abstract_tensor(
    shape: tuple[int, ...],
    stack: tuple[int, ...] = (),
    *,
    block_size: int = 64,
    codebook: Codebook = "nf4",
    double_quant: bool = True,
    dtype: str = "float32",
) -> QuantizedTensor:
    """Returns a tensor, or a stack, whose arrays are shapes alone (jax.ShapeDtypeStruct)."""
    where = choose_layout(shape, block_size)
    shapes = array_shapes(shape, block_size, where, double_quant)
    arrays = [
        jax.ShapeDtypeStruct((*stack, *shapes[name][0]), shapes[name][1])
        if name in shapes
        else None
        for name in _ARRAYS
    ]
    static = (shape, block_size, codebook, where, dtype)
    return QuantizedTensor.tree_unflatten(static, arrays)
