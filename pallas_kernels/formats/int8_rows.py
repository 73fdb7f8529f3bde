"""Int8Rows: one absmax a row, 8 bits and 32/k a weight, for embedding and head.

On disk a weight M.weight has the keys of bitsandbytes' Linear8bitLt: `M.weight`, int8 codes,
and `M.SCB`, the float32 absmax of each row.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from pallas_kernels.annotations import Array, Float, Int
from pallas_kernels.formats.base import FormatError, PackedWeight

LEVELS = 127
"""Codes go from -127 to 127; what bitsandbytes divides its row scales (SCB) by."""


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8Rows(PackedWeight):
    """A matrix whose rows are int8, each with its own scale.

    Invariants, beside those of every PackedWeight:
      element [n, k] = codes[n, k] * (absmax[n] / 127), in float32, rounded once to the
        wanted dtype.
      A code is exact in bfloat16, float16 and float32.

    Attributes:
      codes: int8 (n, k), -127 to 127.
      absmax: float32 (n,), the largest magnitude of each row.
    """

    codes: Int[Array, "... n k"]
    absmax: Float[Array, "... n"]

    ARRAYS: ClassVar = ("codes", "absmax")
    CALLED: ClassVar = "int8 rows"
    PARTS: ClassVar = r"\.SCB"
    MARK: ClassVar = ".SCB"
    STEM: ClassVar = ".weight"
    LISTED_AS: ClassVar = "int8_tables"

    def axes(self, rows: str) -> dict[str, tuple[str | None, ...]]:
        """Returns what each array's axes are called: both are cut with the rows."""
        return {"codes": (rows, None), "absmax": (rows,)}

    def decode_one(self, dtype: jnp.dtype | str) -> Float[Array, "n k"]:
        """Decodes one matrix."""
        return (self.codes.astype(jnp.float32) * scales(self.absmax)).astype(dtype)

    def decode_rows(
        self, rows: Int[Array, " m"], dtype: jnp.dtype | str
    ) -> Float[Array, "m k"]:
        """Decodes some rows of one matrix, as `decode(dtype)[rows]`."""
        codes, absmax = self.codes[rows], self.absmax[rows]
        part = Int8Rows(codes=codes, absmax=absmax, shape=codes.shape, dtype=self.dtype)
        return part.decode(dtype)

    def largest(self) -> Float[Array, ""]:
        """Returns the largest absmax."""
        return jnp.max(self.absmax)

    @classmethod
    def quantize(cls, w: Float[Array, "n k"]) -> "Int8Rows":
        """Quantizes each row by its largest magnitude, to the nearest code.

        Args:
          w: (n, k), any float dtype. The arithmetic is float32.

        Raises:
          FormatError: w has a NaN or Inf (not under jit).
        """
        made, finite = _quantize(w)
        if not isinstance(finite, jax.core.Tracer) and not finite:
            raise FormatError(f"a table of shape {w.shape} has NaN or Inf values")
        return made

    @classmethod
    def from_storage(
        cls, tensors: Mapping[str, np.ndarray], name: str, dtype: str = "float32"
    ) -> "Int8Rows":
        """Reads a matrix, which stands for one in `dtype`.

        Raises:
          FormatError: codes and scales do not belong together.
        """
        scales_name = cls.part(name, cls.MARK)
        for key in (name, scales_name):
            if key not in tensors:
                raise FormatError(f"{key} is missing")
        codes, absmax = np.asarray(tensors[name]), np.asarray(tensors[scales_name])
        if codes.dtype != np.int8 or absmax.dtype != np.float32:
            raise FormatError(
                f"{name} is {codes.dtype} and {scales_name} {absmax.dtype}, expected "
                "int8 and float32"
            )
        if absmax.shape != codes.shape[:1]:
            raise FormatError(
                f"{scales_name} has shape {absmax.shape}, expected one a row of "
                f"{codes.shape}"
            )
        if not (np.isfinite(absmax).all() and codes.min() >= -LEVELS):
            raise FormatError(f"{name} has a code of -128, or NaN or Inf in its scales")
        arrays = {"codes": jnp.asarray(codes), "absmax": jnp.asarray(absmax)}
        return cls(**arrays, shape=codes.shape, dtype=dtype)

    def storage(self, name: str) -> dict[str, np.ndarray]:
        """Returns the codes and, beside them, the absmax of each row."""
        scales_name = self.part(name, self.MARK)
        return {name: np.asarray(self.codes), scales_name: np.asarray(self.absmax)}


def scales(absmax: Float[Array, "... n"]) -> Float[Array, "... n 1"]:
    """Returns what the codes of each row are multiplied by."""
    return (absmax / LEVELS)[..., None]


@jax.jit
def _quantize(w: Array) -> tuple[Int8Rows, Array]:
    wide = w.astype(jnp.float32)
    absmax = jnp.max(jnp.abs(wide), axis=1)
    # A row of zeros has codes of zero whatever it is divided by.
    unit = wide / jnp.where(absmax == 0, 1.0, absmax)[:, None]
    codes = jnp.round(unit * LEVELS).astype(jnp.int8)
    made = Int8Rows(codes=codes, absmax=absmax, shape=w.shape, dtype=w.dtype.name)
    return made, jnp.isfinite(absmax).all()
