"""The honest rival of the fused kernels: dequantize whole, then the library's product.

One fusion writes the dense weight in x's dtype, once, and cuBLAS (or whatever XLA calls)
multiplies. Costs 2 bytes a weight of memory while it runs and the time to write and read
them, which many tokens hide; runs for any layout and on any device.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import codebook as cb
from pallas_kernels import reference
from pallas_kernels.annotations import Array, Float
from pallas_kernels.layout import QuantizedTensor, plane_width


def dequantize(w: QuantizedTensor, dtype: jnp.dtype) -> Float[Array, "n k"]:
    """Decodes a planar weight as `reference.dequantize` does, in one GPU fusion.

    A table gather stays in a GPU's first-level cache and takes fewer instructions than a
    tree of selects; words are broadcast over their four planes, so that nothing is
    interleaved after. (On a CPU both would be slow.)
    """
    if w.layout == "flat":
        return reference.dequantize(w, dtype)
    n, k = w.shape
    width = plane_width(w.layout)
    words = w.codes.reshape(n, -1, 1, width)
    shifts = np.arange(0, 16, 4, dtype=np.uint16).reshape(1, 1, 4, 1)
    codes = (words >> shifts) & np.uint16(15)
    table = jnp.asarray(cb.values(w.codebook), jnp.float32)
    values = table.at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")
    absmax = reference.decode_absmax(w).reshape(n, -1)
    scales = jnp.repeat(absmax, w.block_size // 64, axis=1)
    groups = k // (4 * width)
    planes = 4 if width == 64 else 1  # blocks of 64 in a group
    scales = scales.reshape(n, groups, planes, 1)
    return (values * scales).astype(dtype).reshape(n, k)


def matmul(x: Float[Array, "m k"], w: QuantizedTensor) -> Float[Array, "m n"]:
    """Computes x @ w.T; products accumulate in float32."""
    return _dot(x, dequantize(w, x.dtype), 1)


def matmul_dx(dy: Float[Array, "m n"], w: QuantizedTensor) -> Float[Array, "m k"]:
    """Computes dy @ w."""
    return _dot(dy, dequantize(w, dy.dtype), 0)


def _dot(x: Array, dense: Array, contract: int) -> Array:
    # Behind the barrier, so that decoding is not fused into the product's operand.
    dense = lax.optimization_barrier(dense)
    dims = (((1,), (contract,)), ((), ()))
    y = lax.dot_general(x, dense, dims, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)
