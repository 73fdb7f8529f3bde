"""Matrix products whose backward keeps what it needs and no more.

All accumulate in float32. Written out because autodiff of a float32-accumulating
product of bf16 operands multiplies in float32 on the way back.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8

from pallas_kernels.device import INT8_PIECE_BYTES, limit
from pallas_kernels.products import dot, fold_rows
from qlora_jax.quant.int8 import scales


@jax.custom_vjp
def frozen_matmul(
    x: Float[Array, "m k"], w: Float[Array, "n k"]
) -> Float[Array, "m n"]:
    """Computes x @ w.T in x's dtype; differentiable to x only."""
    return dot(x, w.astype(x.dtype), 1, 1).astype(x.dtype)


def _frozen_fwd(x, w):
    return frozen_matmul(x, w), w


def _frozen_bwd(w, dy):
    return dot(dy, w.astype(dy.dtype), 1, 0).astype(dy.dtype), None


frozen_matmul.defvjp(_frozen_fwd, _frozen_bwd)


@jax.custom_vjp
def factor_matmul(
    x: Float[Array, "m k"], factor: Float[Array, "k n"]
) -> Float[Array, "m n"]:
    """Computes x @ factor in x's dtype, for a trainable factor.

    The factor's gradient is accumulated and kept in the factor's own dtype (float32),
    never rounded to the compute dtype.
    """
    return dot(x, factor.astype(x.dtype), 1, 0).astype(x.dtype)


def _factor_fwd(x, factor):
    return factor_matmul(x, factor), (x, factor)


def _factor_bwd(residuals, dy):
    x, factor = residuals
    dx = dot(dy, factor.astype(dy.dtype), 1, 1).astype(x.dtype)
    return dx, dot(x, dy, 0, 0).astype(factor.dtype)


factor_matmul.defvjp(_factor_fwd, _factor_bwd)


@jax.custom_vjp
def int8_matmul(
    x: Float[Array, "m k"], codes: Int8[Array, "n k"], absmax: Float[Array, " n"]
) -> Float[Array, "m n"]:
    """Computes x @ w.T in x's dtype, of a w in int8 rows (quant/int8.py).

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
