"""The formats that one suite holds to their promises (tests/pallas_kernels/formats).

A case is a format, a shape and its settings, with an independent decoder in numpy. FLOAT8 is
a format of these tests alone: what one has to write to add one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import oracle

from pallas_kernels.formats import FORMATS, FormatError, PackedWeight


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, kw_only=True)
class Float8Rows(PackedWeight):
    """A matrix in float8 (e4m3), each row with a float32 scale."""

    codes: Any
    scale: Any

    ARRAYS: ClassVar = ("codes", "scale")
    CALLED: ClassVar = "float8 rows"
    PARTS: ClassVar = r"\.row_scale"
    MARK: ClassVar = ".row_scale"
    LISTED_AS: ClassVar = "float8_tables"

    @classmethod
    def quantize(cls, w):
        wide = w.astype(jnp.float32)
        scale = jnp.max(jnp.abs(wide), axis=1) / 448
        codes = (wide / jnp.where(scale == 0, 1, scale)[:, None]).astype(
            jnp.float8_e4m3fn
        )
        if not isinstance(w, jax.core.Tracer) and not jnp.isfinite(scale).all():
            raise FormatError(f"a table of shape {w.shape} has NaN or Inf values")
        return cls(codes=codes, scale=scale, shape=w.shape, dtype=w.dtype.name)

    def decode_one(self, dtype):
        return (self.codes.astype(jnp.float32) * self.scale[:, None]).astype(dtype)

    def decode_rows(self, rows, dtype):
        part = {"codes": self.codes[rows], "scale": self.scale[rows]}
        return dataclasses.replace(self, **part).decode_one(dtype)

    def largest(self):
        return jnp.max(self.scale) * 448

    def storage(self, name):
        part = self.part(name, self.MARK)
        return {name: np.asarray(self.codes), part: np.asarray(self.scale)}

    @classmethod
    def from_storage(cls, tensors, name, dtype):
        codes, scale = tensors[name], tensors[cls.part(name, cls.MARK)]
        arrays = {"codes": jnp.asarray(codes), "scale": jnp.asarray(scale)}
        return cls(**arrays, shape=codes.shape, dtype=dtype)


FLOAT8 = {"float8_rows": Float8Rows}
E2M1 = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = np.concatenate([E2M1, -E2M1])


def _int8(q: Any) -> np.ndarray:
    scale = np.asarray(q.absmax, np.float64) / 127
    return np.asarray(q.codes, np.float64) * scale[:, None]


def _mxfp4(q: Any) -> np.ndarray:
    codes = np.asarray(q.codes)
    both = np.stack([codes & 15, codes >> 4], -1).reshape(*q.scales.shape, 32)
    power = 2.0 ** (np.asarray(q.scales, np.float64) - 127)
    return (E2M1[both] * power[..., None]).reshape(q.shape)


def _float8(q: Any) -> np.ndarray:
    scale = np.asarray(q.scale, np.float64)
    return np.asarray(q.codes).astype(np.float64) * scale[:, None]


@dataclasses.dataclass(frozen=True)
class Case:
    """A weight of a format.

    Attributes:
      form: Name of the format.
      shape: Of the weight, (n, k).
      error: What quantizing a normal weight may lose of it, by Frobenius norm.
      decoded: Decodes in numpy, to float64, or to float32 bit for bit.
      settings: Keywords of quantize.
    """

    form: str
    shape: tuple[int, int]
    error: float
    decoded: Callable[[Any], np.ndarray]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def type(self) -> type[PackedWeight]:
        return (FORMATS | FLOAT8)[self.form]

    def dense(self, seed: int = 0, dtype: str = "float32") -> jax.Array:
        w = np.random.default_rng(seed).normal(0, 0.05, self.shape)
        return jnp.asarray(w, dtype)

    def packed(self, seed: int = 0, dtype: str = "float32") -> PackedWeight:
        return self.type.quantize(self.dense(seed, dtype), **self.settings)


def _absmax4(shape: tuple[int, int], codebook: str, block_size: int, double: bool):
    settings = {"codebook": codebook, "block_size": block_size, "double_quant": double}
    return Case("absmax4", shape, 0.16, oracle.decoded, settings)


CASES = {
    "nf4": _absmax4((5, 512), "nf4", 64, True),
    "nf4, two scales": _absmax4((300, 64), "nf4", 64, True),
    "int4, long blocks": _absmax4((3, 512), "int4", 256, False),
    "fp4, planes of 16": _absmax4((3, 192), "fp4", 64, False),
    "nf4, blocks of 128": _absmax4((2, 384), "nf4", 128, True),
    "fp4, flat": _absmax4((7, 33), "fp4", 64, True),
    "int4, flat": _absmax4((5, 96), "int4", 32, False),
    "mxfp4": Case("mxfp4", (5, 96), 0.16, _mxfp4),
    "int8 rows": Case("int8_rows", (40, 24), 0.01, _int8),
    "float8 rows": Case("float8_rows", (6, 24), 0.04, _float8),
}
"""Cases by name; every format has at least one."""
