"""'xla': the product in plain jax.numpy, the definition that all others are tested against.

Large weights go plane by plane and tile by tile, so that the decoded weight is never
interleaved nor whole.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from pallas_kernels.annotations import Array, Float
from pallas_kernels.device import XLA_TILE_BYTES, XLA_WHOLE_BYTES, limit
from pallas_kernels.formats import QuantizedTensor
from pallas_kernels.packed_matmul.implementation import Implementation, plain
from pallas_kernels.products import dot


def matmul(x: Float[Array, "m k"], w: QuantizedTensor) -> Float[Array, "m n"]:
    """Computes x @ w.T with the weight decoded tile by tile over n.

    Products accumulate in float32 and are rounded once to x's dtype.
    """
    n, k = w.shape
    width = w.plane_width
    if width is None or n * k * x.dtype.itemsize <= limit(XLA_WHOLE_BYTES):
        return dot(x, w.decode_one(x.dtype), 1, 1).astype(x.dtype)
    absmax = w.decode_absmax()
    x_planes = _split_planes(x, width)

    def tile(start: Array, size: int) -> Array:
        codes = lax.dynamic_slice_in_dim(w.codes, start, size, 0)
        scales = lax.dynamic_slice_in_dim(absmax, start, size, 0)
        planes = w.decode_planes(codes, scales, x.dtype)
        parts = [dot(a, b, 1, 1) for a, b in zip(x_planes, planes, strict=True)]
        return sum(parts[1:], parts[0]).astype(x.dtype)

    return _map_tiles(tile, n, k * x.dtype.itemsize)


def matmul_dx(dy: Float[Array, "m n"], w: QuantizedTensor) -> Float[Array, "m k"]:
    """Computes dy @ w, the gradient of `matmul` to x, tile by tile over k.

    Tiling over k needs no accumulator: each tile of dx is finished when it is made.
    """
    n, k = w.shape
    width = w.plane_width
    if width is None or n * k * dy.dtype.itemsize <= limit(XLA_WHOLE_BYTES):
        return dot(dy, w.decode_one(dy.dtype), 1, 0).astype(dy.dtype)
    # A unit of tiling must hold whole groups and whole blocks.
    unit = math.lcm(4 * width, w.block_size)
    absmax = w.decode_absmax()

    def tile(start: Array, size: int) -> Array:
        columns, blocks = size * unit // 4, size * (unit // w.block_size)
        codes = lax.dynamic_slice_in_dim(w.codes, start * (unit // 4), columns, 1)
        first = start * (unit // w.block_size)
        scales = lax.dynamic_slice_in_dim(absmax, first, blocks, 1)
        planes = w.decode_planes(codes, scales, dy.dtype)
        parts = [dot(dy, p, 1, 0).astype(dy.dtype) for p in planes]
        grouped = [p.reshape(dy.shape[0], -1, width) for p in parts]
        return jnp.stack(grouped, axis=2).reshape(dy.shape[0], size * unit)

    return _map_tiles(tile, k // unit, n * unit * dy.dtype.itemsize)


def _split_planes(x: Array, width: int) -> list[Array]:
    groups = x.reshape(x.shape[0], -1, 4, width)
    return [groups[:, :, f].reshape(x.shape[0], -1) for f in range(4)]


def _map_tiles(
    tile: Callable[[Array, int], Array], count: int, unit_bytes: int
) -> Float[Array, "m count"]:
    """Concatenates tile(start, size) over [0, count) along the last axis."""
    tiles = max(1, -(-count * unit_bytes // limit(XLA_TILE_BYTES)))
    size = -(-count // tiles)
    whole = count // size
    if whole <= 1 and count == size:
        return tile(jnp.int32(0), count)
    starts = jnp.arange(whole, dtype=jnp.int32) * size
    parts = lax.map(lambda start: tile(start, size), starts)  # (whole, m, width)
    y = parts.transpose(1, 0, 2).reshape(parts.shape[1], -1)
    if rest := count - whole * size:
        y = jnp.concatenate([y, tile(jnp.int32(whole * size), rest)], axis=1)
    return y


IMPLEMENTATION = Implementation(
    forward=plain(matmul),
    backward=plain(matmul_dx),
    refuses=lambda problem, w, device, exact: None,
)
