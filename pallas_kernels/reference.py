"""Quantizing and decoding in plain jax.numpy: the definition of a weight's values.

Decoding picks a code's value by a tree of selects, bit by bit: on CPU a table gather
does not vectorize and a one-hot product is 65 times slower. Planar layouts decode one
nibble plane at a time, each a contiguous elementwise loop.
"""

import dataclasses
import math

import jax.numpy as jnp

from pallas_kernels import codebook as cb
from pallas_kernels.annotations import Array, Float, Int, Shaped, UInt8
from pallas_kernels.layout import QuantizedTensor, plane_width


def encode(
    w: Float[Array, "..."], block_size: int, codebook: cb.Codebook
) -> tuple[UInt8[Array, " padded"], Float[Array, " blocks"]]:
    """Quantizes to codes, one an element, with one absmax a block.

    Args:
      w: Any shape and float dtype; taken in row-major order.
      block_size: Elements that share one absmax; the last block may be partial.
      codebook: 'nf4', 'fp4' or 'int4'.

    Returns:
      Codes uint8 (size,), one more when size is odd, and absmax float32
      (ceil(size / block_size),).

    Source: bitsandbytes backends/default/ops.py, quantize_4bit: midpoints of the sorted
    codebook, ties to the lower value, multiplication by the reciprocal.
    """
    size = w.size
    flat = w.reshape(-1).astype(jnp.float32)
    flat = jnp.pad(flat, (0, -size % block_size))
    blocks = flat.reshape(-1, block_size)
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    # A zero block has value 0 whatever its absmax; 1 keeps 0 * inf out.
    scaled = blocks * (1.0 / jnp.where(absmax == 0, 1.0, absmax))[:, None]
    codes = _nearest(scaled, codebook).reshape(-1)
    # An odd size keeps one padding element: bitsandbytes packs it as a zero.
    return codes[: size + size % 2], absmax


def _nearest(x: Float[Array, "..."], codebook: cb.Codebook) -> UInt8[Array, "..."]:
    """Finds the nearest code by four compares, a binary search of the midpoints."""
    midpoints, order = cb.thresholds(codebook)
    above: list[Array] = []  # answers so far, most significant first
    for depth in range(4):
        step = 8 >> depth
        bounds = [jnp.float32(v) for v in midpoints[step - 1 :: 2 * step]]
        above.append(x > _select(bounds, above))
    if (order == range(16)).all():
        bits = [bit.astype(jnp.uint8) << (3 - i) for i, bit in enumerate(above)]
        return bits[0] | bits[1] | bits[2] | bits[3]
    return _select([jnp.uint8(code) for code in order], above)


def _select(leaves: list, bits: list[Array]) -> Array:
    """Picks leaves[bits], bits most significant first, by a tree of selects."""
    for bit in reversed(bits):
        leaves = [
            jnp.where(bit, high, low)
            for low, high in zip(leaves[::2], leaves[1::2], strict=True)
        ]
    return leaves[0]


def decode_absmax(w: QuantizedTensor) -> Float[Array, " blocks"]:
    """Returns the float32 absmax of every block of one tensor."""
    if w.absmax is not None:
        return w.absmax
    return _spread_absmax(w, cb.ABSMAX_BLOCK_SIZE)


def _spread_absmax(w: QuantizedTensor, each: int) -> Float[Array, " blocks"]:
    """Decodes absmax codes of which `each` share a scale."""
    assert w.absmax_codes is not None and w.absmax_scale is not None
    assert w.absmax_offset is not None
    table = jnp.asarray(cb.dynamic_map())
    values = table.at[w.absmax_codes.astype(jnp.int32)].get(mode="promise_in_bounds")
    scale = jnp.repeat(w.absmax_scale, each)[: values.shape[0]]
    # torch rounds the product before the sum. The maximum changes no value, but keeps
    # LLVM from fusing the two into a multiply-add, which differs in the last bit.
    product = jnp.maximum(values * scale, jnp.finfo(jnp.float32).min)
    return product + w.absmax_offset


def decode_codes(
    words: Shaped[Array, "..."], codebook: cb.Codebook
) -> Float[Array, "..."]:
    """Maps the lowest four bits of each word to its float32 codebook value."""
    bits = [(words & words.dtype.type(1 << bit)) != 0 for bit in (3, 2, 1, 0)]
    return _select([jnp.float32(v) for v in cb.values(codebook)], bits)


def dequantize(
    w: QuantizedTensor, dtype: jnp.dtype | str | None = None
) -> Float[Array, "..."]:
    """Decodes one tensor: float32 value times absmax, rounded once to `dtype`."""
    dtype = jnp.dtype(dtype or w.dtype)
    absmax = decode_absmax(w)
    if w.layout == "flat":
        codes = jnp.stack([w.codes >> 4, w.codes], -1).reshape(-1)
        values = decode_codes(codes, w.codebook)[: math.prod(w.shape)]
        values = jnp.pad(values, (0, -values.size % w.block_size))
        scaled = values.reshape(-1, w.block_size) * absmax[:, None]
        flat = scaled.reshape(-1)[: math.prod(w.shape)].astype(dtype)
        return flat.reshape(w.shape)
    rows = w.codes.shape[0]
    scales = plane_scales(w, absmax.reshape(rows, -1))
    planes = decode_planes(w.codes, scales, w, dtype)
    width = plane_width(w.layout)
    grouped = [p.reshape(rows, -1, width) for p in planes]
    return jnp.stack(grouped, axis=2).reshape(w.shape)


def dequantize_rows(
    w: QuantizedTensor, rows: Int[Array, " m"], dtype: jnp.dtype | str
) -> Float[Array, "m k"]:
    """Decodes some rows of a (n, k) tensor, as `dequantize(w, dtype)[rows]`."""
    k = w.shape[1]
    if w.layout == "flat":
        element = rows[:, None] * k + jnp.arange(k, dtype=jnp.int32)
        words = w.codes[element // 2]
        words = jnp.where(element % 2 == 0, words >> 4, words)
        absmax = _absmax_of(w, element // w.block_size)
        return (decode_codes(words, w.codebook) * absmax).astype(dtype)
    blocks = k // w.block_size
    block = rows[:, None] * blocks + jnp.arange(blocks, dtype=jnp.int32)
    scales = plane_scales(w, _absmax_of(w, block))
    planes = decode_planes(w.codes[rows], scales, w, jnp.dtype(dtype))
    grouped = [p.reshape(rows.shape[0], -1, plane_width(w.layout)) for p in planes]
    return jnp.stack(grouped, axis=2).reshape(rows.shape[0], k)


def _absmax_of(w: QuantizedTensor, block: Int[Array, "..."]) -> Float[Array, "..."]:
    if w.absmax is not None:
        return w.absmax[block]
    assert w.absmax_codes is not None and w.absmax_scale is not None
    part = dataclasses.replace(
        w,
        absmax_codes=w.absmax_codes[block].reshape(-1),
        absmax_scale=w.absmax_scale[block // cb.ABSMAX_BLOCK_SIZE].reshape(-1),
    )
    return _spread_absmax(part, 1).reshape(block.shape)


def plane_scales(w: QuantizedTensor, absmax: Array) -> Array:
    """Spreads absmax, (rows, blocks a row), to (rows, groups, 4 planes or 1)."""
    fine = jnp.repeat(absmax, w.block_size // 64, axis=1)  # one for each 64 elements
    if w.layout == "planar64":  # a group of 64 lies inside one block
        return fine[:, :, None]
    return fine.reshape(fine.shape[0], -1, 4)


def decode_planes(
    codes: Array, scales: Array, w: QuantizedTensor, dtype: jnp.dtype
) -> list[Array]:
    """Decodes (rows, columns) words to four (rows, columns) planes of `dtype`."""
    rows = codes.shape[0]
    words = codes.reshape(rows, -1, plane_width(w.layout))
    planes = []
    for f in range(4):
        values = decode_codes(words >> (4 * f), w.codebook)
        scale = scales[:, :, min(f, scales.shape[2] - 1), None]
        planes.append((values * scale).astype(dtype).reshape(rows, -1))
    return planes
