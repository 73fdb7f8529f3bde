"""One tensor to 4 bits and back, bit-compatible with bitsandbytes (contract C2)."""

import functools

import jax
import jax.core
import jax.numpy as jnp

from pallas_kernels import layout, reference
from pallas_kernels.annotations import Array, Float, Int, UInt8
from pallas_kernels.codebook import ABSMAX_BLOCK_SIZE, dynamic_map
from pallas_kernels.layout import QuantizedTensor
from qlora_jax.errors import ShapeError
from qlora_jax.quant import int8
from qlora_jax.quant.config import QuantConfig
from qlora_jax.quant.int8 import Int8Rows

Quantized = QuantizedTensor | Int8Rows
"""A tensor of either kind."""

_FLOATS = ("bfloat16", "float16", "float32")


def quantize_tensor(
    w: Float[Array, "..."], config: QuantConfig | None = None
) -> QuantizedTensor:
    """Quantizes a tensor to 4 bits, one absmax a block.

    Each block of `config.block_size` consecutive elements (row-major) is divided by its
    largest magnitude and every element takes the nearest codebook value. With
    double_quant the absmax values are in turn quantized, 256 at a time, after their
    mean is taken off. Runs under jit; the arithmetic is float32 whatever w's dtype.

    Args:
      w: Any shape with at least one element, bfloat16, float16 or float32; (out, in)
        for a linear weight. Sizes need not be multiples of a block.
      config: How; the default is NF4, block 64, double quantization.

    Returns:
      The codes and scales; `dequantize` gives back w's shape and dtype.

    Raises:
      ShapeError: w is empty, of another dtype, or (outside jit) has a NaN or Inf.

    Source: QLoRA (arXiv 2305.14314) section 3; bitsandbytes functional.py,
      quantize_4bit.
    """
    config = config or QuantConfig()
    w = jnp.asarray(w)
    if w.dtype.name not in _FLOATS:
        raise ShapeError(
            f"cannot quantize {w.dtype}, expected one of {', '.join(_FLOATS)}"
        )
    if w.size == 0:
        raise ShapeError(f"cannot quantize a tensor of shape {w.shape}: it is empty")
    if isinstance(w, jax.core.Tracer):
        return _quantize(w, config)[0]
    quantized, finite = _quantize_jit(w, config)
    if not finite:
        raise ShapeError(
            f"a weight of shape {w.shape} has NaN or Inf values; NF4 cannot hold them. "
            "The checkpoint is damaged or was saved from a diverged run."
        )
    return quantized


def dequantize(q: Quantized, dtype: jnp.dtype | str | None = None) -> Array:
    """Decodes a tensor: value times scale in float32, rounded once.

    Args:
      q: One tensor, or layers stacked along leading axes of every array.
      dtype: What to return; None for the dtype it was quantized from.

    Returns:
      Array of q.shape, behind the leading axes if there are any.
    """
    name = jnp.dtype(dtype or q.dtype).name
    return int8.decode(q, name) if isinstance(q, Int8Rows) else _dequantize_jit(q, name)


def dequantize_rows(
    q: Quantized, rows: Int[Array, " m"], dtype: str
) -> Float[Array, "m k"]:
    """Decodes some rows of a matrix, as `dequantize(q, dtype)[rows]`."""
    if isinstance(q, Int8Rows):
        return int8.decode_rows(q, rows, dtype)
    return reference.dequantize_rows(q, rows, dtype)


@functools.partial(jax.jit, static_argnums=1)
def _dequantize_jit(q: QuantizedTensor, dtype: str) -> Array:
    decode = functools.partial(reference.dequantize, dtype=dtype)
    for _ in range(q.codes.ndim - (1 if q.layout == "flat" else 2)):
        decode = jax.vmap(decode)
    return decode(q)


def _quantize(w: Array, config: QuantConfig) -> tuple[QuantizedTensor, Array]:
    shape = w.shape or (1,)
    where = layout.choose_layout(shape, config.block_size)
    codes, absmax = reference.encode(w, config.block_size, config.codebook)
    scales = {"absmax": absmax}
    if config.double_quant:
        scales = _quantize_absmax(absmax)
    quantized = QuantizedTensor(
        codes=layout.pack(codes, where, shape),
        **scales,
        shape=w.shape,
        block_size=config.block_size,
        codebook=config.codebook,
        layout=where,
        dtype=w.dtype.name,
    )
    return quantized, jnp.isfinite(w).all()


_quantize_jit = jax.jit(_quantize, static_argnums=1)


def _quantize_absmax(absmax: Float[Array, " blocks"]) -> dict[str, Array]:
    """Double quantization: 8-bit codes, a scale for each 256, the mean as offset.

    Source: QLoRA section 3, Double Quantization; bitsandbytes quantize_blockwise.
    """
    offset = absmax.mean()
    blocks = absmax.shape[0]
    centred = jnp.pad(absmax - offset, (0, -blocks % ABSMAX_BLOCK_SIZE))
    centred = centred.reshape(-1, ABSMAX_BLOCK_SIZE)
    scale = jnp.max(jnp.abs(centred), axis=1)
    scaled = centred / jnp.where(scale == 0, 1.0, scale)[:, None]
    codes = _nearest_in_map(scaled.reshape(-1))[:blocks]
    return {"absmax_codes": codes, "absmax_scale": scale, "absmax_offset": offset}


def _nearest_in_map(x: Float[Array, " blocks"]) -> UInt8[Array, " blocks"]:
    table = dynamic_map()
    midpoints = jnp.asarray((table[1:] + table[:-1]) / 2)
    return jnp.searchsorted(midpoints, x, side="left").astype(jnp.uint8)
