"""`int8_matmul`: the product with a weight in int8 rows, differentiable to its input."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.annotations import Array, Float, Int
from pallas_kernels.device import INT8_PIECE_BYTES, limit
from pallas_kernels.formats.int8_rows import scales
from pallas_kernels.products import dot, fold_rows


@jax.custom_vjp
def int8_matmul(
    x: Float[Array, "m k"], codes: Int[Array, "n k"], absmax: Float[Array, " n"]
) -> Float[Array, "m n"]:
    """Computes x @ w.T in x's dtype, of a w in int8 rows (Int8Rows).

    Differentiable to x only; backward keeps the codes. Forward multiplies the codes, which
    any compute dtype holds exactly, and then their scales in float32. Backward rounds
    decoded rows to the compute dtype. Either way pieces of the rows follow one another, so
    that no whole table is decoded.
    """

    def add(y: Array, codes: Array, absmax: Array, start: Array) -> Array:
        part = dot(x, codes.astype(x.dtype), 1, 1) * scales(absmax).T
        return lax.dynamic_update_slice_in_dim(y, part.astype(x.dtype), start, 1)

    y = jnp.zeros((x.shape[0], codes.shape[0]), x.dtype)
    return _fold(add, y, codes, absmax, x.dtype.itemsize)


def _int8_fwd(x, codes, absmax):
    return int8_matmul(x, codes, absmax), (codes, absmax)


def _int8_bwd(residuals, dy):
    def add(dx: Array, codes: Array, absmax: Array, start: Array) -> Array:
        rows = (codes.astype(jnp.float32) * scales(absmax)).astype(dy.dtype)
        part = lax.dynamic_slice_in_dim(dy, start, rows.shape[0], 1)
        return dx + dot(part, rows, 1, 0)

    codes, absmax = residuals
    dx = jnp.zeros((dy.shape[0], codes.shape[1]), jnp.float32)
    dx = _fold(add, dx, codes, absmax, dy.dtype.itemsize)
    return dx.astype(dy.dtype), None, None


int8_matmul.defvjp(_int8_fwd, _int8_bwd)


def _fold(
    add: Callable[[Array, Array, Array, Array], Array],
    total: Array,
    codes: Array,
    absmax: Array,
    item: int,
) -> Array:
    """Folds add(total, codes, absmax, first row) over pieces of a table's rows, of values of
    `item` bytes."""
    n, k = codes.shape
    row = max(k * item, 4 * total.shape[0])
    size = min(n, max(1, limit(INT8_PIECE_BYTES) // row))
    return fold_rows(add, total, (codes, absmax), size)
