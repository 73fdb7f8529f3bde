"""Mxfp4: 4-bit floats (E2M1), of which each 32 of a row share a power of two; 4.25 bits.

Source: OCP Microscaling Formats (MX) Specification 1.0. On disk a weight M.weight has the
entries `M.weight_blocks`, uint8 (n, k / 32, 16), two codes a byte and the first in its low
half, and `M.weight_scales`, uint8 (n, k / 32), exponents with a bias of 127: what gpt-oss has
of each expert (transformers, integrations/mxfp4.py).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from pallas_kernels.annotations import Array, Float, Int, UInt8
from pallas_kernels.formats.base import FormatError, PackedWeight

BLOCK = 32
"""Elements that share a scale."""

LARGEST = 6.0
"""The largest magnitude of E2M1."""

_BIAS, _NAN = 127, 255
_DOUBLES = (0, 1, 2, 3, 4, 6, 8, 12)
"""Twice the magnitudes of E2M1, by the lower three bits of a code."""


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mxfp4(PackedWeight):
    """A matrix of 4-bit floats with a power of two for each 32 elements of a row.

    Invariants, beside those of every PackedWeight:
      element [n, k] = E2M1 of its code * 2**(scales[n, k // 32] - 127), which float32 and
        bfloat16 hold exactly unless it is below their smallest normal number.

    Attributes:
      codes: uint8 (n, k / 2): element 2j in the low four bits of byte j, 2j + 1 in the others.
      scales: uint8 (n, k / 32): exponents with a bias of 127; 255, NaN, is refused.
    """

    codes: UInt8[Array, "... n bytes"]
    scales: UInt8[Array, "... n blocks"]

    ARRAYS: ClassVar = ("codes", "scales")
    CALLED: ClassVar = "MXFP4"
    PARTS: ClassVar = r"(?<=\.weight)_(?:blocks|scales)"
    MARK: ClassVar = "_blocks"
    KNOWN_AS: ClassVar = "mxfp4"

    def axes(self, rows: str) -> dict[str, tuple[str | None, ...]]:
        """Returns what each array's axes are called: both are cut with the rows."""
        return {"codes": (rows, None), "scales": (rows, None)}

    def decode_one(self, dtype: jnp.dtype | str) -> Float[Array, "n k"]:
        """Decodes one matrix."""
        return _decoded(self.codes, self.scales).astype(dtype)

    def decode_rows(
        self, rows: Int[Array, " m"], dtype: jnp.dtype | str
    ) -> Float[Array, "m k"]:
        """Decodes some rows of one matrix, as `decode(dtype)[rows]`."""
        return _decoded(self.codes[rows], self.scales[rows]).astype(dtype)

    def largest(self) -> Float[Array, ""]:
        """Returns the largest magnitude that the largest scale allows."""
        return LARGEST * _power(jnp.max(self.scales).astype(jnp.int32) - _BIAS)

    def describe(self) -> dict[str, Any]:
        """Returns what config.json says of a folder whose experts are stored so."""
        return {"quant_method": "mxfp4"}

    @classmethod
    def quantize(cls, w: Float[Array, "n k"]) -> "Mxfp4":
        """Quantizes each 32 elements of a row, to the nearest code, of two the even one.

        The scale is the least power of two that keeps the largest of them within 6, so that
        none is clipped, as the programs that made gpt-oss's weights choose it
        (triton_kernels, numerics_details/mxfp.py).

        Args:
          w: (n, k), any float dtype, k a multiple of 32. The arithmetic is float32.

        Raises:
          FormatError: another shape, or NaN or Inf (not under jit).
        """
        if w.ndim != 2 or w.shape[1] % BLOCK:
            raise FormatError(
                f"a weight of shape {w.shape} cannot be MXFP4, expected rows of a multiple "
                f"of {BLOCK} elements"
            )
        made, finite = _quantize(w)
        if not isinstance(finite, jax.core.Tracer) and not finite:
            raise FormatError(f"a weight of shape {w.shape} has NaN or Inf values")
        return made

    @classmethod
    def from_storage(
        cls, tensors: Mapping[str, np.ndarray], name: str, dtype: str = "float32"
    ) -> "Mxfp4":
        """Reads a matrix, which stands for one in `dtype`.

        Raises:
          FormatError: an entry is missing, blocks and scales do not belong together, or a
            scale is NaN.
        """
        keys = [name + end for end in ("_blocks", "_scales")]
        for key in keys:
            if key not in tensors:
                raise FormatError(f"{key} is missing")
        blocks, scales = (np.asarray(tensors[key]) for key in keys)
        if blocks.dtype != np.uint8 or scales.dtype != np.uint8:
            raise FormatError(
                f"{keys[0]} is {blocks.dtype} and {keys[1]} {scales.dtype}, expected uint8"
            )
        if scales.ndim != 2 or blocks.shape != (*scales.shape, BLOCK // 2):
            raise FormatError(
                f"{keys[0]} has shape {blocks.shape} and {keys[1]} {scales.shape}, expected "
                f"(n, k / {BLOCK}, {BLOCK // 2}) and (n, k / {BLOCK})"
            )
        if scales.size and scales.max() == _NAN:
            raise FormatError(f"{keys[1]} has a scale of 255, which is NaN")
        rows, count = scales.shape
        arrays = {
            "codes": jnp.asarray(blocks.reshape(rows, -1)),
            "scales": jnp.asarray(scales),
        }
        return cls(**arrays, shape=(rows, count * BLOCK), dtype=dtype)

    def storage(self, name: str) -> dict[str, np.ndarray]:
        """Returns the blocks and scales of one weight."""
        rows, count = self.scales.shape
        blocks = np.asarray(self.codes).reshape(rows, count, BLOCK // 2)
        return {f"{name}_blocks": blocks, f"{name}_scales": np.asarray(self.scales)}


def _power(exponent: Int[Array, "..."]) -> Float[Array, "..."]:
    """Returns 2**exponent, float32, for -149 to 127."""
    # Two factors, of which each is a normal number: its bits are its exponent's.
    half = exponent // 2
    halves = [(part + _BIAS) << 23 for part in (half, exponent - half)]
    first, second = (jax.lax.bitcast_convert_type(x, jnp.float32) for x in halves)
    return first * second


def _decoded(codes: Array, scales: Array) -> Float[Array, "n k"]:
    both = jnp.stack([codes & 15, codes >> 4], axis=-1).astype(jnp.int32)
    each = both.reshape(*scales.shape, BLOCK)
    kind, last = (each >> 1) & 3, each & 1
    doubled = jnp.where(kind == 0, last, (2 + last) << jnp.maximum(kind - 1, 0))
    value = jnp.where(each >= 8, -doubled, doubled).astype(jnp.float32)
    power = _power(scales.astype(jnp.int32)[..., None] - _BIAS - 1)
    return (value * power).reshape(codes.shape[0], -1)


@jax.jit
def _quantize(w: Array) -> tuple[Mxfp4, Array]:
    rows, k = w.shape
    blocks = w.astype(jnp.float32).reshape(rows, -1, BLOCK)
    most = jnp.max(jnp.abs(blocks), axis=-1)
    # most / 6 = fraction * 2**exponent with a fraction from 0.5 on.
    fraction, exponent = jnp.frexp(most / LARGEST)
    exponent = jnp.where(fraction == 0.5, exponent - 1, exponent)
    exponent = jnp.clip(jnp.where(most == 0, 0, exponent), -_BIAS, _BIAS)
    unit = blocks / _power(exponent)[..., None]
    table = jnp.asarray(_DOUBLES, jnp.float32) / 2
    # A tie goes to the code whose last bit is 0, as in IEEE 754.
    middles = (table[1:] + table[:-1]) / 2
    size = jnp.abs(unit)[..., None]
    above = jnp.where(jnp.arange(7) % 2 == 0, size > middles, size >= middles)
    code = jnp.sum(above, axis=-1).astype(jnp.uint8)
    code = jnp.where(jnp.signbit(unit) & (code > 0), code + 8, code)
    code = code.reshape(rows, k // 2, 2)
    made = Mxfp4(
        codes=(code[..., 0] | (code[..., 1] << 4)).astype(jnp.uint8),
        scales=(exponent + _BIAS).astype(jnp.uint8),
        shape=w.shape,
        dtype=w.dtype.name,
    )
    return made, jnp.isfinite(most).all()
