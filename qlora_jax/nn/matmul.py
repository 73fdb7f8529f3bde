"""Matrix products whose backward keeps what it needs and no more.

All accumulate in float32. Written out because autodiff of a float32-accumulating
product of bf16 operands multiplies in float32 on the way back.
"""

import jax
from jaxtyping import Array, Float

from pallas_kernels.products import dot


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
