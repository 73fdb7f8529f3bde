"""Rows in int8: one absmax a row, 8 bits and 32/k a weight, for embedding and head."""

import dataclasses
import functools

import jax
import jax.core
import jax.numpy as jnp

from pallas_kernels.annotations import Array, Float, Int
from qlora_jax.errors import ShapeError

LEVELS = 127
"""Codes go from -127 to 127; what bitsandbytes divides its row scales (SCB) by."""


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8Rows:
    """A matrix whose rows are int8, each with its own scale.

    Invariants:
      element [n, k] = codes[n, k] * (absmax[n] / 127), in float32, rounded once to the
        wanted dtype.
      A code is exact in bfloat16, float16 and float32.

    Attributes:
      codes: int8 (n, k), -127 to 127.
      absmax: float32 (n,), the largest magnitude of each row.
      dtype: Name of the dtype it was quantized from; what dequantize gives by default.
    """

    codes: Int[Array, "n k"]
    absmax: Float[Array, " n"]
    dtype: str = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix: (n, k)."""
        return self.codes.shape

    def tree_flatten_with_keys(self):
        """Arrays with their names, and the dtype."""
        key = jax.tree_util.GetAttrKey
        return [(key(k), getattr(self, k)) for k in ("codes", "absmax")], self.dtype

    @classmethod
    def tree_unflatten(cls, dtype, arrays):
        """Inverts tree_flatten_with_keys."""
        # Past __init__: transformations put bools, shapes and None in place of arrays.
        self = object.__new__(cls)
        for name, value in zip(("codes", "absmax"), arrays, strict=True):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "dtype", dtype)
        return self


def quantize_rows(w: Float[Array, "n k"]) -> Int8Rows:
    """Quantizes a matrix to int8: each row by its largest magnitude, to the nearest code.

    Args:
      w: (n, k), any float dtype. The arithmetic is float32.

    Raises:
      ShapeError: w has a NaN or Inf (not under jit).
    """
    q, finite = _quantize_rows(w)
    if not isinstance(finite, jax.core.Tracer) and not finite:
        raise ShapeError(f"a table of shape {w.shape} has NaN or Inf values")
    return q


@jax.jit
def _quantize_rows(w: Array) -> tuple[Int8Rows, Array]:
    wide = w.astype(jnp.float32)
    absmax = jnp.max(jnp.abs(wide), axis=1)
    # A row of zeros has codes of zero whatever it is divided by.
    unit = wide / jnp.where(absmax == 0, 1.0, absmax)[:, None]
    codes = jnp.round(unit * LEVELS).astype(jnp.int8)
    q = Int8Rows(codes=codes, absmax=absmax, dtype=w.dtype.name)
    return q, jnp.isfinite(absmax).all()


def scales(absmax: Float[Array, " n"]) -> Float[Array, "n 1"]:
    """Returns what the codes of each row are multiplied by."""
    return (absmax / LEVELS)[:, None]


@functools.partial(jax.jit, static_argnums=1)
def decode(q: Int8Rows, dtype: str) -> Float[Array, "n k"]:
    """Decodes all rows."""
    return (q.codes.astype(jnp.float32) * scales(q.absmax)).astype(dtype)


def decode_rows(q: Int8Rows, rows: Int[Array, " m"], dtype: str) -> Float[Array, "m k"]:
    """Decodes some rows, as `decode(q, dtype)[rows]`."""
    part = dataclasses.replace(q, codes=q.codes[rows], absmax=q.absmax[rows])
    return decode(part, dtype)
