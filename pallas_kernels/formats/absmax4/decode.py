"""Values of codes in plain jax.numpy: the definition of what a 4-bit weight means.

A code's value is picked by a tree of selects, bit by bit: on CPU a table gather does not
vectorize and a one-hot product is 65 times slower. Planar layouts are decoded one nibble
plane at a time, each a contiguous elementwise loop.
"""

import jax.numpy as jnp

from pallas_kernels.annotations import Array, Float, Shaped, UInt8
from pallas_kernels.formats.absmax4 import codebook as cb


def select(leaves: list, bits: list[Array]) -> Array:
    """Picks leaves[bits], bits most significant first, by a tree of selects."""
    for bit in reversed(bits):
        leaves = [
            jnp.where(bit, high, low)
            for low, high in zip(leaves[::2], leaves[1::2], strict=True)
        ]
    return leaves[0]


def decode_absmax(
    codes: UInt8[Array, " blocks"],
    scale: Float[Array, " scales"],
    offset: Float[Array, ""],
    each: int = cb.ABSMAX_BLOCK_SIZE,
) -> Float[Array, " blocks"]:
    """Decodes 8-bit absmax codes of which `each` share a scale."""
    table = jnp.asarray(cb.dynamic_map())
    values = table.at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")
    spread = jnp.repeat(scale, each)[: values.shape[0]]
    # torch rounds the product before the sum. The maximum changes no value, but keeps
    # LLVM from fusing the two into a multiply-add, which differs in the last bit.
    product = jnp.maximum(values * spread, jnp.finfo(jnp.float32).min)
    return product + offset


def decode_codes(
    words: Shaped[Array, "..."], codebook: cb.Codebook
) -> Float[Array, "..."]:
    """Maps the lowest four bits of each word to its float32 codebook value."""
    bits = [(words & words.dtype.type(1 << bit)) != 0 for bit in (3, 2, 1, 0)]
    return select([jnp.float32(v) for v in cb.values(codebook)], bits)


def plane_scales(
    absmax: Float[Array, "rows blocks"], block_size: int, width: int
) -> Float[Array, "rows groups planes"]:
    """Spreads absmax to the nibble planes of each group: 4 of them, or 1 for all.

    Args:
      absmax: The absmax of every block of some rows.
      block_size: Elements of a block.
      width: Elements of a plane; a group has four times as many.
    """
    fine = jnp.repeat(absmax, block_size // 64, axis=1)  # one for each 64 elements
    if width == 16:  # a group of 64 lies inside one block
        return fine[:, :, None]
    return fine.reshape(fine.shape[0], -1, 4)


def decode_planes(
    words: Shaped[Array, "rows columns"],
    scales: Float[Array, "rows groups planes"],
    width: int,
    codebook: cb.Codebook,
    dtype: jnp.dtype,
) -> list[Float[Array, "rows columns"]]:
    """Decodes planar words to their four planes of `dtype`."""
    rows = words.shape[0]
    grouped = words.reshape(rows, -1, width)
    planes = []
    for f in range(4):
        values = decode_codes(grouped >> (4 * f), codebook)
        scale = scales[:, :, min(f, scales.shape[2] - 1), None]
        planes.append((values * scale).astype(dtype).reshape(rows, -1))
    return planes


def interleaved(planes: list[Array], width: int) -> Float[Array, "rows k"]:
    """Puts four planes of some rows together in the order of their elements."""
    rows = planes[0].shape[0]
    grouped = [plane.reshape(rows, -1, width) for plane in planes]
    return jnp.stack(grouped, axis=2).reshape(rows, -1)
