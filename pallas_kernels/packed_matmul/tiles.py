"""Output tiles of the fused kernels: their order, their parts, what goes in and comes out."""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.annotations import Array
from pallas_kernels.packed_matmul.implementation import Addend
from pallas_kernels.packed_matmul.mosaic import Tiling


def place(
    linear: Array, mi: int, ni: int, config: Tiling
) -> tuple[Array, Array, Array]:
    """Returns the split of the linear-th tile, and its index along m and the other axis."""
    split = lax.div(linear, jnp.int32(mi * ni))
    linear = lax.rem(linear, jnp.int32(mi * ni))
    minor = 0 if config.minor == "m" else 1
    i, j = plgpu.planar_snake(linear, (mi, ni), minor, config.width)
    return split, i, j


def rank_steps(addend: Addend) -> int:
    """Returns the steps of 64 that a low-rank pair takes."""
    return 0 if addend is None else addend[0].shape[1] // 64


def in_first_split(steps: int, split: Array, config: Tiling) -> Any:
    """Returns the steps that a split does of what is done once."""
    return steps if config.split_k == 1 else jnp.where(split == 0, steps, 0)


def addend_operands(addend: Addend) -> list[Array]:
    """Returns what a kernel takes of a low-rank pair: v goes through the words' buffers."""
    if addend is None:
        return []
    u, v = addend
    return [u, lax.bitcast_convert_type(v, jnp.uint16)]


def out_type(
    m: int, columns: int, dtype: jnp.dtype, config: Tiling
) -> jax.ShapeDtypeStruct:
    """Returns (m, columns), or with splits their float32 parts (split_k, columns, m)."""
    if config.split_k == 1:
        return jax.ShapeDtypeStruct((m, columns), dtype)
    return jax.ShapeDtypeStruct((config.split_k, columns, m), jnp.float32)


def scaled(
    values: Array, scale: Array, axis: int, dtype: jnp.dtype, layout: Any = None
) -> Array:
    """Multiplies a tile in registers by one scale for each index of an axis.

    Args:
      values: (rows, columns).
      scale: One scale for each index of `axis`, in values' dtype.
      axis: 0 or 1.
      dtype: The dtype of the result.
      layout: The register layout of `values`, where it is not what broadcasting `scale`
        gives.
    """
    scale = lax.broadcast_in_dim(scale, values.shape, (axis,))
    if layout is not None:
        scale = plgpu.layout_cast(scale, layout)
    return (values * scale).astype(dtype)
