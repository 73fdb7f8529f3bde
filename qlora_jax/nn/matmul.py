"""Matrix products whose backward keeps what it needs and no more.

All accumulate in float32. Written out because autodiff of a float32-accumulating
product of bf16 operands multiplies in float32 on the way back.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


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
