"""What warp.py does, in plain jax.numpy: what the interpreter runs.

The interpreter has no inline code, and gives a warpgroup's arrays whole: a tile of words
is (rows, 256), 64 words for each of four warps.
"""

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.packed_matmul import registers

WARPS = 4


def load_tile(kernel, refs, row, group) -> tuple[jax.Array, ...]:
    """Loads words (rows, 256), absmax or its codes (rows, 16), absmax_scale (rows, 4)."""
    words, absmax, *scale = refs
    rows = pl.ds(row, kernel.config.rows)
    loaded = (
        words[rows, pl.ds(group * 64, 64 * WARPS)],
        absmax[rows, pl.ds(group * 4, 4 * WARPS)],
    )
    if not scale:
        return loaded
    row = row + jnp.arange(kernel.config.rows, dtype=jnp.int32)
    warp = jnp.arange(WARPS, dtype=jnp.int32)
    block = row[:, None] * (kernel.k // 64) + (group + warp) * 4
    return *loaded, jnp.take(scale[0][...], block // kernel.scale_blocks)


def load_x(kernel, x, start) -> jax.Array:
    """Loads columns of x for a warpgroup, (tokens, 1024); the last token fills up."""
    tokens = jnp.minimum(jnp.arange(kernel.tokens, dtype=jnp.int32), kernel.m - 1)
    return jnp.take(x[:, pl.ds(start, 256 * WARPS)], tokens, axis=0)


def multiply(kernel, tile, x, table, skip, offset, sums) -> tuple[jax.Array, ...]:
    """Adds a tile's products to sums, each (64, 8): 16 rows a warp, 8 tokens."""
    words, absmax, *factor = tile
    if factor:
        dynamic_map = lax.bitcast_convert_type(table[:, 32], jnp.float32)
        absmax = jnp.take(dynamic_map, absmax.astype(jnp.int32))
        absmax = absmax * jnp.repeat(factor[0], 4, axis=1) + offset
    warp = jnp.arange(4 * WARPS, dtype=jnp.int32) // 4
    absmax = jnp.where(warp >= skip, absmax, jnp.float32(0))
    x = x.astype(jnp.float32).reshape(kernel.tokens, WARPS, 4, 64)
    result = []
    for number, total in enumerate(sums):
        i, j = divmod(number, kernel.token_blocks)
        rows, tokens = slice(16 * i, 16 * i + 16), slice(8 * j, 8 * j + 8)
        scale = absmax[rows].reshape(16, WARPS, 4)
        for plane in range(4):
            values = registers.select_plane(words[rows], plane, kernel.codebook)
            values = values.astype(kernel.dtype).astype(jnp.float32)
            values = values.reshape(16, WARPS, 64)
            product = jnp.einsum("twj,rwj->wrt", x[tokens, :, plane], values)
            product = product * scale[:, :, plane].T[:, :, None]
            total = total + product.reshape(64, 8)
        result.append(total)
    return tuple(result)


def totals(sums: jax.Array) -> jax.Array:
    """Adds (parts, row tiles, token blocks, 16 * parts, 8) to (..., ..., 16, 8)."""
    parts, row_tiles, token_blocks, rows, _ = sums.shape
    return sums.reshape(parts, row_tiles, token_blocks, rows // 16, 16, 8).sum((0, 3))


def write(kernel, totals: jax.Array, out, row) -> None:
    """Stores totals in columns row and on of out (m, n)."""
    tile = totals.transpose(1, 3, 0, 2).reshape(kernel.tokens, kernel.config.rows)
    out[:, pl.ds(row, kernel.config.rows)] = tile[: kernel.m].astype(out.dtype)
