"""DoRA: a trained magnitude for each output of an adapted linear.

    y = magnitude / |W + scale * (a @ b).T| * (W x + scale * (a @ b).T x)

|.| is the norm of each output's row, over inputs, and a constant to the gradient. The
sum W + ... is never formed: with n the rows' squared norms of W, which a run computes
once,

    |W + s (ab).T|^2 = n + 2 s sum_r b * (W a).T + s^2 sum_r b * (a.T a b)

where W a is one product of the packed weight with `rank` rows.

Source: DoRA, arXiv 2402.09353, sections 4.1 and 4.3; peft 0.21.2 tuners/lora/dora.py, from
which the output differs under dropout only: there the linear's own part is dropped too.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.formats import PackedWeight
from qlora_jax.nn.linear import FrozenLinear
from qlora_jax.nn.variables import arrive


def row_norms(
    base: FrozenLinear,
    a: Float[Array, "*stack in rank"] | None = None,
    b: Float[Array, "*stack rank out"] | None = None,
    scale: float = 1.0,
) -> Float[Array, "*stack out"]:
    """Returns the norm of each output's row, of W or of W + scale * (a @ b).T.

    For the start of a run: one dense matrix is made at a time.
    """

    def of_one(arrays: tuple) -> Array:
        kernel, a, b = arrive(arrays)
        if isinstance(kernel, PackedWeight):
            kernel = kernel.decode("float32")
        kernel = kernel.astype(jnp.float32)
        if a is not None:
            kernel = kernel + scale * jnp.matmul(a, b, precision="highest").T
        return jnp.linalg.norm(kernel, axis=-1)

    run = of_one
    for _ in base.stack:
        run = functools.partial(lax.map, run)
    return jax.jit(run)((base.stored, a, b))


def adapted_norms(
    base: FrozenLinear,
    squared: Float[Array, " out"],
    a: Float[Array, "in rank"],
    b: Float[Array, "rank out"],
    scale: float,
    dtype: jnp.dtype,
) -> Float[Array, " out"]:
    """Returns |W + scale * (a @ b).T| of each output, float32, a constant to gradients.

    Args:
      base: One linear, not a stack.
      squared: Squares of the norms of its rows.
      a: lora_a.
      b: lora_b.
      scale: The factor of the update.
      dtype: The dtype that W a is computed in; its part is small.
    """
    a, b = lax.stop_gradient((a, b))
    cross = base.product(a.T.astype(dtype)).astype(jnp.float32)
    dot = functools.partial(jnp.matmul, precision="highest")
    total = squared + jnp.sum(
        b * (2 * scale * cross + scale**2 * dot(dot(a.T, a), b)), 0
    )
    return jnp.sqrt(jnp.maximum(total, 0))
