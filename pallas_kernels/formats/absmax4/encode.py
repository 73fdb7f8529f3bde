"""Choosing codes: a weight to 4 bits, and its absmax to 8, as bitsandbytes does (C2)."""

import jax.numpy as jnp

from pallas_kernels.annotations import Array, Float, UInt8
from pallas_kernels.formats.absmax4 import codebook as cb
from pallas_kernels.formats.absmax4.decode import select


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
        above.append(x > select(bounds, above))
    if (order == range(16)).all():
        bits = [bit.astype(jnp.uint8) << (3 - i) for i, bit in enumerate(above)]
        return bits[0] | bits[1] | bits[2] | bits[3]
    return select([jnp.uint8(code) for code in order], above)


def encode_absmax(absmax: Float[Array, " blocks"]) -> dict[str, Array]:
    """Double quantization: 8-bit codes, a scale for each 256, the mean as offset.

    Source: QLoRA section 3, Double Quantization; bitsandbytes quantize_blockwise.
    """
    offset = absmax.mean()
    blocks = absmax.shape[0]
    centred = jnp.pad(absmax - offset, (0, -blocks % cb.ABSMAX_BLOCK_SIZE))
    centred = centred.reshape(-1, cb.ABSMAX_BLOCK_SIZE)
    scale = jnp.max(jnp.abs(centred), axis=1)
    scaled = centred / jnp.where(scale == 0, 1.0, scale)[:, None]
    codes = _nearest_in_map(scaled.reshape(-1))[:blocks]
    return {"absmax_codes": codes, "absmax_scale": scale, "absmax_offset": offset}


def _nearest_in_map(x: Float[Array, " blocks"]) -> UInt8[Array, " blocks"]:
    table = cb.dynamic_map()
    midpoints = jnp.asarray((table[1:] + table[:-1]) / 2)
    return jnp.searchsorted(midpoints, x, side="left").astype(jnp.uint8)
