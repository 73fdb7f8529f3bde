"""One weight packed as the settings say, and back.

The formats themselves are pallas_kernels.formats; here their errors become qlora_jax's.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.formats import (
    FormatError,
    Int8Rows,
    PackedWeight,
    QuantizedTensor,
)
from qlora_jax.config.quant import QuantConfig
from qlora_jax.errors import ShapeError

W = TypeVar("W", bound=PackedWeight)


@contextlib.contextmanager
def _shape_errors() -> Iterator[None]:
    try:
        yield
    except FormatError as error:
        raise ShapeError(str(error)) from None


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
      config: The 16 values, the block size, and whether absmax is kept in 8 bits; the
        default is NF4, block 64, double quantization.

    Returns:
      The codes and scales; `dequantize` gives back w's shape and dtype.

    Raises:
      ShapeError: w is empty, of another dtype, or (outside jit) has a NaN or Inf.

    Source: QLoRA (arXiv 2305.14314) section 3; bitsandbytes functional.py,
      quantize_4bit.
    """
    with _shape_errors():
        return QuantizedTensor.quantize(
            w, **dataclasses.asdict(config or QuantConfig())
        )


def quantize_rows(w: Float[Array, "n k"]) -> Int8Rows:
    """Quantizes an embedding or a head to int8, one scale a row.

    Raises:
      ShapeError: w has a NaN or Inf (not under jit).
    """
    with _shape_errors():
        return Int8Rows.quantize(w)


def requantize(like: W, w: Float[Array, "..."]) -> W:
    """Quantizes other values as `like` is, standing for a weight of its dtype.

    Raises:
      ShapeError: the format cannot hold w.
    """
    with _shape_errors():
        return like.requantize(w)


def dequantize(q: PackedWeight, dtype: jnp.dtype | str | None = None) -> Array:
    """Decodes a packed weight: value times scale in float32, rounded once.

    Args:
      q: One tensor, or layers stacked along leading axes of every array.
      dtype: What to return; None for the dtype it was quantized from.

    Returns:
      Array of q.shape, behind the leading axes if there are any.
    """
    return q.decode(dtype)
