"""`nf4_matmul`: the product with a 4-bit weight, differentiable to its input.

The weight is frozen: its residual for backward is the packed codes and scales it came
with (contract C3), and it has no gradient. Implementations register in
`IMPLEMENTATIONS`; callers above choose by name or leave the choice to `choose`.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import reference
from pallas_kernels.annotations import Array, Float
from pallas_kernels.layout import QuantizedTensor

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implementation:
    """A forward and a backward product, and when they can run.

    Attributes:
      forward: (x (m, k), w) -> (m, n) in x's dtype.
      backward: (dy (m, n), w) -> (m, k) in dy's dtype.
      refuses: (m, w, dtype, platform) -> why it cannot run, or None.
    """

    forward: Callable[[Array, QuantizedTensor], Array]
    backward: Callable[[Array, QuantizedTensor], Array]
    refuses: Callable[[int, QuantizedTensor, jnp.dtype, str], str | None]


IMPLEMENTATIONS: dict[str, Implementation] = {
    "xla": Implementation(
        forward=reference.matmul,
        backward=reference.matmul_dx,
        refuses=lambda m, w, dtype, platform: None,
    ),
}
"""By name, best first. 'xla' runs everywhere and stays last."""


def nf4_matmul(
    x: Float[Array, "*batch k"],
    w: QuantizedTensor,
    implementation: str | None = None,
) -> Float[Array, "*batch n"]:
    """Multiplies by a 4-bit weight: x @ w.T.

    Decoded weights are those of `reference.dequantize` in x's dtype; products
    accumulate in float32. Differentiable to x only.

    Args:
      x: (..., k), bfloat16, float16 or float32; its dtype is the compute dtype.
      w: One (n, k) weight in any codebook and layout.
      implementation: A name of `IMPLEMENTATIONS`, or None to choose by device, shape
        and dtype.

    Returns:
      (..., n) in x's dtype.

    Raises:
      ValueError: shapes do not fit, x is no float array, or the named implementation is
        unknown or cannot run here (the message has its reason).
    """
    if len(w.shape) != 2:
        raise ValueError(f"nf4_matmul takes a matrix (n, k), got a weight of {w.shape}")
    n, k = w.shape
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(
            f"x has shape {x.shape}, its last axis must be k={k} of {w.shape}"
        )
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"x is {x.dtype}, expected bfloat16, float16 or float32")
    rows = x.reshape(-1, k)
    name = choose(rows.shape[0], w, x.dtype, jax.default_backend(), implementation)
    y: Array = _matmul(rows, w, name)
    return y.reshape(*x.shape[:-1], n)


def choose(
    m: int, w: QuantizedTensor, dtype: jnp.dtype, platform: str, name: str | None = None
) -> str:
    """Returns the implementation to run, and logs the choice once.

    Raises:
      ValueError: `name` is unknown or cannot run, with the reason (contract C7).
    """
    if name is not None:
        if name not in IMPLEMENTATIONS:
            known = ", ".join(IMPLEMENTATIONS)
            raise ValueError(
                f"implementation {name!r} is not known here; known: {known}"
            )
        if reason := IMPLEMENTATIONS[name].refuses(m, w, dtype, platform):
            raise ValueError(f"implementation {name!r} cannot run: {reason}")
        return name
    refused = {}
    for candidate, one in IMPLEMENTATIONS.items():
        reason = one.refuses(m, w, dtype, platform)
        if reason is None:
            passed_over = "; ".join(f"{k}: {v}" for k, v in refused.items())
            _log_choice(candidate, platform, passed_over)
            return candidate
        refused[candidate] = reason
    raise ValueError(f"no implementation can run this product: {refused}")


@functools.cache
def _log_choice(name: str, platform: str, passed_over: str) -> None:
    why = f"passed over {passed_over}" if passed_over else "the best registered"
    logger.info("nf4_matmul runs %r on %s (%s)", name, platform, why)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: Array, w: QuantizedTensor, name: str) -> Array:
    # Tied to its input, a weight is not decoded before its turn: otherwise a scheduler
    # may decode all of a layer's weights at once.
    x, w = lax.optimization_barrier((x, w))
    return IMPLEMENTATIONS[name].forward(x, w)


def _matmul_fwd(x: Array, w: QuantizedTensor, name: str):
    return _matmul(x, w, name), w


def _matmul_bwd(name: str, w: QuantizedTensor, dy: Array):
    dy, w = lax.optimization_barrier((dy, w))
    return IMPLEMENTATIONS[name].backward(dy, w), None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)
