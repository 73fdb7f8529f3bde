"""QuantizedTensor: a weight in 4 bits with one absmax a block (nf4, fp4, int4)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from pallas_kernels.annotations import Array, Float, Int, Shaped, UInt8
from pallas_kernels.formats.absmax4 import codebook as cb
from pallas_kernels.formats.absmax4 import decode, encode, layout, storage
from pallas_kernels.formats.base import FormatError, PackedWeight, over_stack

_FLOATS = ("bfloat16", "float16", "float32")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedTensor(PackedWeight):
    """A 4-bit tensor with one absmax a block, itself quantized to 8 bits or kept.

    Invariants, beside those of every PackedWeight:
      element i (row-major) = codebook[code i] * absmax[i // block_size], in float32,
        rounded once to the wanted dtype.
      absmax[b] = dynamic_map[absmax_codes[b]] * absmax_scale[b // 256] + absmax_offset
        when double-quantized; then `absmax` is None. Otherwise the three are None.
      Blocks follow the row-major order and straddle rows in the flat layout only. In the
        others absmax and its codes are (n, k / block_size), so that they are cut with the
        rows; absmax_scale goes by the row-major order of those all the same.

    Attributes:
      codes: Packed codes (see layout.pack).
      absmax: float32 (n, k / block_size), or (blocks,) if flat; or None.
      absmax_codes: uint8 of the same shape, or None.
      absmax_scale: float32 (ceil(blocks/256),) or None.
      absmax_offset: float32 () or None.
      block_size: Elements that share one absmax.
      codebook: 'nf4', 'fp4' or 'int4'.
      layout: 'planar256', 'planar64' or 'flat'.
    """

    codes: Shaped[Array, "..."]
    absmax: Float[Array, "..."] | None = None
    absmax_codes: UInt8[Array, "..."] | None = None
    absmax_scale: Float[Array, "..."] | None = None
    absmax_offset: Float[Array, "..."] | None = None
    block_size: int = 64
    codebook: cb.Codebook = "nf4"
    layout: layout.Layout

    ARRAYS: ClassVar = (
        "codes",
        "absmax",
        "absmax_codes",
        "absmax_scale",
        "absmax_offset",
    )
    CALLED: ClassVar = "4-bit"
    PARTS: ClassVar = storage.PARTS
    MARK: ClassVar = storage.MARK
    KNOWN_AS: ClassVar = "bitsandbytes"

    @property
    def double_quant(self) -> bool:
        """Whether absmax is kept in 8 bits."""
        return self.absmax is None

    @property
    def blocks(self) -> int:
        """Number of blocks of one tensor; the last may be partial."""
        return -(-math.prod(self.shape) // self.block_size)

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes: () for one tensor."""
        return self.codes.shape[: -2 if self.plane_width else -1]

    @property
    def settings(self) -> dict[str, Any]:
        """codebook, block_size and double_quant."""
        return {
            "codebook": self.codebook,
            "block_size": self.block_size,
            "double_quant": self.double_quant,
        }

    def axes(self, rows: str) -> dict[str, tuple[str | None, ...]]:
        """Returns what each array's axes are called; those that go by row are cut with it."""
        found = super().axes(rows)
        by_row = ("codes", "absmax", "absmax_codes") if self.plane_width else ()
        return {
            name: (rows, None) if name in by_row else axes
            for name, axes in found.items()
        }

    # --- Values --------------------------------------------------------------------------

    @property
    def plane_width(self) -> int | None:
        """Elements of a nibble plane, 64 or 16; None where rows are no planes of words.

        With planes the codes are (n, k / 4) words, so that rows can be cut apart, and blocks
        end with them.
        """
        return layout.plane_width(self.layout)

    def decode_absmax(self) -> Float[Array, "*blocks"]:
        """Returns the float32 absmax of one tensor, in the shape that `absmax` has."""
        if self.absmax is not None:
            return self.absmax
        codes = self.absmax_codes
        assert codes is not None and self.absmax_scale is not None
        assert self.absmax_offset is not None
        flat = decode.decode_absmax(
            codes.reshape(-1), self.absmax_scale, self.absmax_offset
        )
        return flat.reshape(codes.shape)

    def decode_planes(
        self,
        words: Shaped[Array, "rows columns"],
        absmax: Float[Array, "rows blocks"],
        dtype: jnp.dtype,
    ) -> list[Float[Array, "rows columns"]]:
        """Decodes whole groups of some rows, whose absmax is known, plane by plane."""
        width = self.plane_width
        assert width is not None
        scales = decode.plane_scales(absmax, self.block_size, width)
        return decode.decode_planes(words, scales, width, self.codebook, dtype)

    def decode_one(self, dtype: jnp.dtype | str) -> Float[Array, "..."]:
        """Decodes one tensor: float32 value times absmax, rounded once."""
        dtype, absmax = jnp.dtype(dtype), self.decode_absmax()
        if width := self.plane_width:
            planes = self.decode_planes(self.codes, absmax, dtype)
            return decode.interleaved(planes, width).reshape(self.shape)
        codes = jnp.stack([self.codes >> 4, self.codes], -1).reshape(-1)
        values = decode.decode_codes(codes, self.codebook)[: math.prod(self.shape)]
        values = jnp.pad(values, (0, -values.size % self.block_size))
        scaled = values.reshape(-1, self.block_size) * absmax[:, None]
        flat = scaled.reshape(-1)[: math.prod(self.shape)].astype(dtype)
        return flat.reshape(self.shape)

    def decode_rows(
        self, rows: Int[Array, " m"], dtype: jnp.dtype | str
    ) -> Float[Array, "m k"]:
        """Decodes some rows of one (n, k) tensor, as `decode(dtype)[rows]`."""
        k = self.shape[1]
        if width := self.plane_width:
            blocks = k // self.block_size
            block = rows[:, None] * blocks + jnp.arange(blocks, dtype=jnp.int32)
            absmax = self._absmax_of(rows, block)
            planes = self.decode_planes(self.codes[rows], absmax, jnp.dtype(dtype))
            return decode.interleaved(planes, width)
        element = rows[:, None] * k + jnp.arange(k, dtype=jnp.int32)
        words = self.codes[element // 2]
        words = jnp.where(element % 2 == 0, words >> 4, words)
        block = element // self.block_size
        absmax = self._absmax_of(block, block)
        return (decode.decode_codes(words, self.codebook) * absmax).astype(dtype)

    def _absmax_of(
        self, index: Int[Array, "..."], block: Int[Array, "m blocks"]
    ) -> Float[Array, "m blocks"]:
        """Decodes the absmax of some blocks, which lie at `index` of the stored ones."""
        if self.absmax is not None:
            return self.absmax[index]
        assert self.absmax_codes is not None and self.absmax_scale is not None
        assert self.absmax_offset is not None
        codes = self.absmax_codes[index].reshape(-1)
        scale = self.absmax_scale[block // cb.ABSMAX_BLOCK_SIZE].reshape(-1)
        absmax = decode.decode_absmax(codes, scale, self.absmax_offset, each=1)
        return absmax.reshape(block.shape)

    def largest(self) -> Float[Array, ""]:
        """Returns the largest absmax."""
        return _largest_absmax(self)

    def mean_scale(self) -> Float[Array, ""]:
        """Returns the mean absmax."""
        return _mean_absmax(self)

    # --- Made and stored -----------------------------------------------------------------

    @classmethod
    def quantize(
        cls,
        w: Float[Array, "..."],
        *,
        codebook: cb.Codebook = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
    ) -> "QuantizedTensor":
        """Quantizes a tensor to 4 bits, one absmax a block.

        Each block of consecutive elements (row-major) is divided by its largest magnitude
        and every element takes the nearest codebook value. With double_quant the absmax
        values are in turn quantized, 256 at a time, after their mean is taken off. Runs
        under jit; the arithmetic is float32 whatever w's dtype.

        Args:
          w: Any shape with at least one element, bfloat16, float16 or float32; (n, k) for
            a linear weight. Sizes need not be multiples of a block.
          codebook: 'nf4', 'fp4' or 'int4'.
          block_size: Elements that share one absmax.
          double_quant: Whether absmax is kept in 8 bits.

        Raises:
          FormatError: w is empty, of another dtype, or (outside jit) has a NaN or Inf.

        Source: QLoRA (arXiv 2305.14314) section 3; bitsandbytes functional.py,
          quantize_4bit.
        """
        w = jnp.asarray(w)
        if w.dtype.name not in _FLOATS:
            raise FormatError(
                f"cannot quantize {w.dtype}, expected one of {', '.join(_FLOATS)}"
            )
        if w.size == 0:
            raise FormatError(
                f"cannot quantize a tensor of shape {w.shape}: it is empty"
            )
        if isinstance(w, jax.core.Tracer):
            return _quantize(w, codebook, block_size, double_quant)[0]
        made, finite = _quantize_jit(w, codebook, block_size, double_quant)
        if not finite:
            raise FormatError(
                f"a weight of shape {w.shape} has NaN or Inf values; NF4 cannot hold "
                "them. The checkpoint is damaged or was saved from a diverged run."
            )
        return made

    @classmethod
    def from_storage(
        cls, tensors: Mapping[str, np.ndarray], name: str, dtype: str = "float32"
    ) -> "QuantizedTensor":
        """Reads bitsandbytes' entries; decoding gives its float32 values exactly.

        Args:
          tensors: A state dict with bitsandbytes' keys.
          name: The weight's key, such as 'model.layers.0.self_attn.q_proj.weight'.
          dtype: Unused: bitsandbytes' entries say it.

        Returns:
          The tensor, in the layout its shape wants.

        Raises:
          FormatError: a key is missing, or the state is not one we know.
        """
        stored = storage.read(tensors, name)
        where = layout.choose_layout(stored.shape, stored.block_size)
        codes = layout.from_bitsandbytes(stored.packed, where, stored.shape)
        arrays = _by_rows({"codes": codes, **stored.scales}, where)
        return cls(
            **{name: jnp.asarray(array) for name, array in arrays.items()},
            shape=stored.shape,
            block_size=stored.block_size,
            codebook=stored.codebook,
            layout=where,
            dtype=stored.dtype,
        )

    def storage(self, name: str) -> dict[str, np.ndarray]:
        """Returns what bitsandbytes would save one tensor as; packed uint8 (bytes, 1)."""
        arrays = {key: getattr(self, key) for key in self.ARRAYS}
        arrays = {k: np.asarray(v) for k, v in arrays.items() if v is not None}
        packed = layout.to_bitsandbytes(arrays.pop("codes"), self.layout, self.shape)
        stored = storage.Stored(
            packed, arrays, self.shape, self.block_size, self.codebook, self.dtype
        )
        return storage.write(stored, name)

    def describe(self) -> dict[str, Any]:
        """Returns what transformers writes of such weights into config.json."""
        return {
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": self.codebook,
            "bnb_4bit_use_double_quant": self.double_quant,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "quant_method": "bitsandbytes",
        }


def _by_rows(arrays: dict[str, Any], where: layout.Layout) -> dict[str, Any]:
    """Gives the scales of blocks the rows of the codes, where these have rows."""
    if layout.plane_width(where):
        rows = arrays["codes"].shape[0]
        for name in arrays.keys() & {"absmax", "absmax_codes"}:
            arrays[name] = arrays[name].reshape(rows, -1)
    return arrays


@jax.jit
def _largest_absmax(w: QuantizedTensor) -> Array:
    return jnp.max(over_stack(QuantizedTensor.decode_absmax, w))


@jax.jit
def _mean_absmax(w: QuantizedTensor) -> Array:
    return jnp.mean(over_stack(QuantizedTensor.decode_absmax, w))


def _quantize(
    w: Array, codebook: cb.Codebook, block_size: int, double_quant: bool
) -> tuple[QuantizedTensor, Array]:
    shape = w.shape or (1,)
    where = layout.choose_layout(shape, block_size)
    codes, absmax = encode.encode(w, block_size, codebook)
    scales = encode.encode_absmax(absmax) if double_quant else {"absmax": absmax}
    made = QuantizedTensor(
        **_by_rows({"codes": layout.pack(codes, where, shape), **scales}, where),
        shape=w.shape,
        block_size=block_size,
        codebook=codebook,
        layout=where,
        dtype=w.dtype.name,
    )
    return made, jnp.isfinite(w).all()


_quantize_jit = jax.jit(_quantize, static_argnums=(1, 2, 3))
