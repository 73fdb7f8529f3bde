"""Plain numpy forms of what is under test: slow, obvious, and none of our code in them
beyond the layout and the codebooks, which have tests of their own."""

import math

import jax.numpy as jnp
import numpy as np

from pallas_kernels import codebook as cb
from pallas_kernels import layout
from pallas_kernels.layout import QuantizedTensor


def quantized(
    shape: tuple[int, ...],
    *,
    block_size: int = 64,
    codebook: cb.Codebook = "nf4",
    double_quant: bool = True,
    seed: int = 0,
) -> QuantizedTensor:
    """Makes a tensor of random codes and scales, in the layout its shape wants."""
    rng = np.random.default_rng(seed)
    where = layout.choose_layout(shape, block_size)
    entries = layout.array_shapes(shape, block_size, where, double_quant)
    arrays = {}
    for name, (size, dtype) in entries.items():
        if dtype == "float32":
            arrays[name] = jnp.asarray(rng.uniform(0.01, 0.02, size), dtype)
        else:
            arrays[name] = jnp.asarray(
                rng.integers(0, np.iinfo(dtype).max, size), dtype
            )
    return QuantizedTensor(
        **arrays, shape=shape, block_size=block_size, codebook=codebook, layout=where
    )


def decoded(q: QuantizedTensor) -> np.ndarray:
    """Decodes a tensor to float32 by its invariants, element by element."""
    codes = layout.unpack(np.asarray(q.codes), q.layout, q.shape)
    absmax = q.absmax
    if q.double_quant:
        spread = np.repeat(np.asarray(q.absmax_scale), 256)[: q.blocks]
        product = cb.dynamic_map()[np.asarray(q.absmax_codes)] * spread
        absmax = product + np.asarray(q.absmax_offset)
    block = np.arange(math.prod(q.shape)) // q.block_size
    values = cb.values(q.codebook)[codes] * np.asarray(absmax)[block]
    return values.reshape(q.shape)
