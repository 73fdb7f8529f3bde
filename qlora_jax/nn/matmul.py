"""Matrix products whose backward keeps what it needs and no more.

All accumulate in float32. Written out because autodiff of a float32-accumulating
product of bf16 operands multiplies in float32 on the way back.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8

from pallas_kernels.tuning import current_device
from qlora_jax.quant.int8 import scales

PIECE_BYTES = {"cpu": 4 << 20, "gpu": 32 << 20}
"""Of an int8 table's rows in the compute dtype, and of their float32 product, alive at once;
as 4-bit weights have it."""


def _dot(a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
    dims = (((contract_a,), (contract_b,)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


@jax.custom_vjp
def frozen_matmul(
    x: Float[Array, "m k"], w: Float[Array, "n k"]
) -> Float[Array, "m n"]:
    """Computes x @ w.T in x's dtype; differentiable to x only."""
    return _dot(x, w.astype(x.dtype), 1, 1).astype(x.dtype)


def _frozen_fwd(x, w):
    return frozen_matmul(x, w), w


def _frozen_bwd(w, dy):
    return _dot(dy, w.astype(dy.dtype), 1, 0).astype(dy.dtype), None


frozen_matmul.defvjp(_frozen_fwd, _frozen_bwd)


@jax.custom_vjp
def factor_matmul(
    x: Float[Array, "m k"], factor: Float[Array, "k n"]
) -> Float[Array, "m n"]:
    """Computes x @ factor in x's dtype, for a trainable factor.

    The factor's gradient is accumulated and kept in the factor's own dtype (float32),
    never rounded to the compute dtype.
    """
    return _dot(x, factor.astype(x.dtype), 1, 0).astype(x.dtype)


def _factor_fwd(x, factor):
    return factor_matmul(x, factor), (x, factor)


def _factor_bwd(residuals, dy):
    x, factor = residuals
    dx = _dot(dy, factor.astype(dy.dtype), 1, 1).astype(x.dtype)
    return dx, _dot(x, dy, 0, 0).astype(factor.dtype)


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
        part = _dot(x, codes.astype(x.dtype), 1, 1) * scales(absmax).T
        return lax.dynamic_update_slice_in_dim(y, part.astype(x.dtype), start, 1)

    y = jnp.zeros((x.shape[0], codes.shape[0]), x.dtype)
    return _by_rows(add, y, codes, absmax, x.dtype.itemsize)


def _int8_fwd(x, codes, absmax):
    return int8_matmul(x, codes, absmax), (codes, absmax)


def _int8_bwd(residuals, dy):
    def add(dx: Array, codes: Array, absmax: Array, start: Array) -> Array:
        rows = (codes.astype(jnp.float32) * scales(absmax)).astype(dy.dtype)
        part = lax.dynamic_slice_in_dim(dy, start, rows.shape[0], 1)
        return dx + _dot(part, rows, 1, 0)

    codes, absmax = residuals
    dx = jnp.zeros((dy.shape[0], codes.shape[1]), jnp.float32)
    dx = _by_rows(add, dx, codes, absmax, dy.dtype.itemsize)
    return dx.astype(dy.dtype), None, None


int8_matmul.defvjp(_int8_fwd, _int8_bwd)


def _by_rows(
    add: Callable[[Array, Array, Array, Array], Array],
    total: Array,
    codes: Array,
    absmax: Array,
    item: int,
) -> Array:
    """Folds add(total, codes, absmax, first row) over pieces of a table's rows, of values of
    `item` bytes."""
    n, k = codes.shape
    limit = PIECE_BYTES.get(current_device().platform, PIECE_BYTES["gpu"])
    size = min(n, max(1, limit // max(k * item, 4 * total.shape[0])))

    def piece(start: Array, size: int, total: Array) -> Array:
        rows, largest = (
            lax.dynamic_slice_in_dim(x, start, size, 0) for x in (codes, absmax)
        )
        return add(total, rows, largest, start)

    total = lax.fori_loop(0, n // size, lambda i, y: piece(i * size, size, y), total)
    rest = n % size
    return piece(jnp.int32(n - rest), rest, total) if rest else total
