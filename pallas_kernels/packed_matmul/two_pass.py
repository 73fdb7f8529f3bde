"""The honest rival of the fused kernels: dequantize, then the library's product.

One fusion writes the dense weight in x's dtype, once, and cuBLAS (or whatever XLA calls)
multiplies. Costs 2 bytes a weight of memory while it runs and the time to write and read
them, which many tokens hide; runs for any layout and on any device. A weight that would be
large (a head, the feed-forward of a 70B model) goes through in pieces of its rows, so that
the buffer is bounded.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.annotations import Array, Float
from pallas_kernels.device import TWO_PASS_PIECE_BYTES, TWO_PASS_WHOLE_BYTES, limit
from pallas_kernels.formats import QuantizedTensor
from pallas_kernels.formats.absmax4 import codebook as cb
from pallas_kernels.packed_matmul.implementation import Implementation, plain
from pallas_kernels.products import dot, fold_rows


def dequantize(w: QuantizedTensor, dtype: jnp.dtype) -> Float[Array, "n k"]:
    """Decodes a weight to the values of `decode_one`, one of planes in one GPU fusion.

    A table gather stays in a GPU's first-level cache and takes fewer instructions than a
    tree of selects; words are broadcast over their four planes, so that nothing is
    interleaved after. (On a CPU both would be slow.)
    """
    if w.plane_width is None:
        return w.decode_one(dtype)
    absmax = w.decode_absmax()
    return _decode(w, w.codes, absmax, dtype)


def _decode(
    w: QuantizedTensor, codes: Array, absmax: Array, dtype: jnp.dtype
) -> Float[Array, "rows k"]:
    """Decodes some of a weight's rows: their codes and absmax."""
    rows, k, width = codes.shape[0], w.shape[1], w.plane_width
    assert width is not None
    words = codes.reshape(rows, -1, 1, width)
    shifts = np.arange(0, 16, 4, dtype=np.uint16).reshape(1, 1, 4, 1)
    table = jnp.asarray(cb.values(w.codebook), jnp.float32)
    index = ((words >> shifts) & np.uint16(15)).astype(jnp.int32)
    values = table.at[index].get(mode="promise_in_bounds")
    scales = jnp.repeat(absmax, w.block_size // 64, axis=1)
    planes = 4 if width == 64 else 1  # blocks of 64 in a group
    scales = scales.reshape(rows, k // (4 * width), planes, 1)
    return (values * scales).astype(dtype).reshape(rows, k)


def matmul(x: Float[Array, "m k"], w: QuantizedTensor) -> Float[Array, "m n"]:
    """Computes x @ w.T; products accumulate in float32."""
    if _fits(w, x.dtype):
        return _dot(x, dequantize(w, x.dtype), 1).astype(x.dtype)

    def add(y: Array, rows: Array, start: Array) -> Array:
        part = _dot(x, rows, 1).astype(x.dtype)
        return lax.dynamic_update_slice_in_dim(y, part, start, 1)

    return _fold(add, jnp.zeros((x.shape[0], w.shape[0]), x.dtype), w, x.dtype)


def matmul_dx(dy: Float[Array, "m n"], w: QuantizedTensor) -> Float[Array, "m k"]:
    """Computes dy @ w; products accumulate in float32."""
    if _fits(w, dy.dtype):
        return _dot(dy, dequantize(w, dy.dtype), 0).astype(dy.dtype)

    def add(dx: Array, rows: Array, start: Array) -> Array:
        part = lax.dynamic_slice_in_dim(dy, start, rows.shape[0], 1)
        return dx + _dot(part, rows, 0)

    dx = jnp.zeros((dy.shape[0], w.shape[1]), jnp.float32)
    return _fold(add, dx, w, dy.dtype).astype(dy.dtype)


def _fits(w: QuantizedTensor, dtype: jnp.dtype) -> bool:
    n, k = w.shape
    size = n * k * jnp.dtype(dtype).itemsize
    return w.plane_width is None or size <= limit(TWO_PASS_WHOLE_BYTES)


def _fold(
    add: Callable[[Array, Array, Array], Array],
    total: Array,
    w: QuantizedTensor,
    dtype: jnp.dtype,
) -> Array:
    """Folds add(total, decoded rows, first of them) over all of a weight's rows."""
    n, k = w.shape
    pieces = -(-n * k * jnp.dtype(dtype).itemsize // limit(TWO_PASS_PIECE_BYTES))
    absmax = w.decode_absmax()

    def decoded(total: Array, codes: Array, absmax: Array, start: Array) -> Array:
        return add(total, _decode(w, codes, absmax, dtype), start)

    return fold_rows(decoded, total, (w.codes, absmax), -(-n // pieces))


def _dot(x: Array, dense: Array, contract: int) -> Float[Array, "m out"]:
    # Behind the barrier, so that decoding is not fused into the product's operand.
    return dot(x, lax.optimization_barrier(dense), 1, contract)


IMPLEMENTATION = Implementation(
    forward=plain(matmul),
    backward=plain(matmul_dx),
    refuses=lambda problem, w, device, exact: None,
    suits=lambda problem, device: device.platform == "gpu",
    candidates=lambda problem, device: [{}],
)
