"""`nf4_matmul`: the product with a 4-bit weight, differentiable to its input.

The weight is frozen: its residual for backward is the packed codes and scales it came
with (contract C3), and it has no gradient. `nf4_lora_matmul` is the same with a LoRA
adapter, which kernels that can add in the same pass.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.annotations import Array, Float
from pallas_kernels.formats import QuantizedTensor
from pallas_kernels.packed_matmul.choice import choose, run
from pallas_kernels.products import dot


def nf4_matmul(
    x: Float[Array, "*batch k"],
    w: QuantizedTensor,
    implementation: str | None = None,
    *,
    exact: bool = False,
) -> Float[Array, "*batch n"]:
    """Multiplies by a 4-bit weight: x @ w.T.

    Decoded weights are those of `w.decode` in x's dtype; the fused kernels,
    unless `exact`, round codebook and absmax to that dtype before they multiply them (three
    roundings: a relative error of less than 3 * 2^-8 a weight in bfloat16). Products
    accumulate in float32. Differentiable to x only.

    Args:
      x: (..., k), bfloat16, float16 or float32; its dtype is the compute dtype.
      w: One (n, k) weight in any codebook and layout.
      implementation: A name of `choice.IMPLEMENTATIONS`, or None to choose by device, shape
        and dtype. The named one also runs backward where it has one.
      exact: Whether decoded weights must equal bitsandbytes' bit for bit.

    Returns:
      (..., n) in x's dtype.

    Raises:
      ValueError: shapes do not fit, x is no float array, or the named implementation is
        unknown or cannot run here (the message has its reason).
    """
    rows = _check(x, w)
    name = _check_name(rows, w, implementation, exact)
    y: Array = _matmul(rows, w, name, exact)
    return y.reshape(*x.shape[:-1], w.shape[0])


def nf4_lora_matmul(
    x: Float[Array, "*batch k"],
    w: QuantizedTensor,
    lora_a: Float[Array, "k rank"],
    lora_b: Float[Array, "rank n"],
    scale: float,
    implementation: str | None = None,
    *,
    exact: bool = False,
) -> Float[Array, "*batch n"]:
    """Multiplies by a 4-bit weight with its adapter: x @ w.T + scale * (x @ a) @ b.

    The fused kernels add the adapter's product into their accumulators, and in backward
    its part of dx, so that neither y nor dx takes another trip through memory.
    Differentiable to x and both factors, whose gradients accumulate in float32 and keep
    the factors' dtype.

    Args:
      x, w, implementation, exact: See `nf4_matmul`.
      lora_a: (k, rank), any float dtype; multiplied in x's.
      lora_b: (rank, n).
      scale: alpha / rank.

    Returns:
      (..., n) in x's dtype.

    Raises:
      ValueError: as in `nf4_matmul`, or the factors' shapes do not fit.
    """
    rows = _check(x, w)
    n, k = w.shape
    if lora_a.shape != (k, lora_b.shape[0]) or lora_b.shape[1] != n:
        raise ValueError(
            f"lora_a is {lora_a.shape} and lora_b {lora_b.shape}; a weight of {w.shape} "
            f"takes ({k}, rank) and (rank, {n})"
        )
    name = _check_name(rows, w, implementation, exact)
    y: Array = _lora_matmul(rows, w, lora_a, lora_b, scale, name, exact)
    return y.reshape(*x.shape[:-1], n)


def _check(x: Array, w: QuantizedTensor) -> Array:
    if len(w.shape) != 2:
        raise ValueError(f"nf4_matmul takes a matrix (n, k), got a weight of {w.shape}")
    if x.ndim == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(
            f"x has shape {x.shape}, its last axis must be k={w.shape[1]} of {w.shape}"
        )
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"x is {x.dtype}, expected bfloat16, float16 or float32")
    return x.reshape(-1, w.shape[1])


def _check_name(
    x: Array, w: QuantizedTensor, name: str | None, exact: bool
) -> str | None:
    """Returns the name, having raised where it cannot run."""
    if name is not None:
        choose("forward", x.shape[0], w, x.dtype, name=name, exact=exact)
    return name


# --- Differentiation ----------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x: Array, w: QuantizedTensor, name: str | None, exact: bool) -> Array:
    # Tied to its input, a weight is not decoded before its turn: otherwise a scheduler
    # may decode all of a layer's weights at once.
    x, w = lax.optimization_barrier((x, w))
    return run("forward", x, w, None, name, exact)


def _matmul_fwd(x, w, name, exact):
    return _matmul(x, w, name, exact), w


def _matmul_bwd(name, exact, w, dy):
    dy, w = lax.optimization_barrier((dy, w))
    return run("backward", dy, w, None, name, exact), None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _lora_matmul(x, w, a, b, scale, name, exact) -> Array:
    return _lora_fwd(x, w, a, b, scale, name, exact)[0]


def _lora_fwd(x, w, a, b, scale, name, exact):
    x, w = lax.optimization_barrier((x, w))
    hidden = _scaled(dot(x, a.astype(x.dtype), 1, 0), scale, x.dtype)
    hidden = checkpoint_name(hidden, "lora_hidden")
    v = b.astype(x.dtype).T
    y = run("forward", x, w, (hidden, v), name, exact)
    return y, (x, w, a, b, hidden)


def _lora_bwd(scale, name, exact, residuals, dy):
    x, w, a, b, hidden = residuals
    dy, w = lax.optimization_barrier((dy, w))
    d_hidden = _scaled(dot(dy, b.astype(dy.dtype), 1, 1), scale, dy.dtype)
    dx = run("backward", dy, w, (d_hidden, a.astype(dy.dtype)), name, exact)
    da = dot(x, d_hidden, 0, 0).astype(a.dtype)
    db = dot(hidden, dy, 0, 0).astype(b.dtype)
    return dx, None, da, db


_lora_matmul.defvjp(_lora_fwd, _lora_bwd)


def _scaled(product: Array, scale: float, dtype: jnp.dtype) -> Array:
    return (product * jnp.float32(scale)).astype(dtype)
