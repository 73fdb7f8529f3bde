"""What the Mosaic GPU kernels share before any of their code is imported.

An older jax has not the dialect that they are written in, and its import takes a second:
kernels are imported when they run.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.annotations import Array
from pallas_kernels.device import Device
from pallas_kernels.formats import QuantizedTensor
from pallas_kernels.packed_matmul.implementation import Addend
from pallas_kernels.tuning import Choice, Problem

MOSAIC_JAX = (0, 11, 2)
"""The first jax whose Mosaic GPU dialect the kernels are written in."""

Decoder = Literal["select", "permute", "table", "table_exact"]
"""Codes become values in one of these ways; registers.py has them."""


def decodes_exactly(decoder: Decoder) -> bool:
    """Whether weights are float32 codebook times float32 scale, rounded once."""
    return decoder in ("select", "table_exact")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """Says how output tiles are cut and walked over, with which the kernels' Configs begin.

    Attributes:
      block_m: Tokens of an output tile, a power of two.
      decoder: The method that turns codes into values; see registers.py.
      minor: Axis that consecutive tiles run along, 'm' or 'n' ('n' is k in backward).
      width: Tiles they run along it before they step along the other.
      split_k: Parts that the contraction is cut in, so that few tiles fill all SMs.
    """

    block_m: int
    decoder: Decoder
    minor: str = "m"
    width: int = 8
    split_k: int = 1

    @property
    def exact(self) -> bool:
        """Whether decoded weights equal bitsandbytes' bit for bit."""
        return decodes_exactly(self.decoder)


def refuses(
    problem: Problem,
    w: QuantizedTensor,
    device: Device,
    capabilities: tuple[tuple[int, int], ...],
    wanted: str,
) -> str | None:
    """Returns what any Mosaic kernel refuses, or None.

    Args:
      problem: The product.
      w: Its weight.
      device: What it is to run on.
      capabilities: The compute capabilities of the GPUs that the kernel is written for,
        such as ((9, 0),).
      wanted: Those GPUs in words, for the reason.
    """
    if jax.__version_info__ < MOSAIC_JAX:
        least = ".".join(map(str, MOSAIC_JAX))
        return f"needs jax >= {least}, this is {jax.__version__}"
    if device.platform != "gpu":
        return f"needs an NVIDIA GPU, this is {device.platform}"
    if problem.dtype == "float32":
        return "multiplies in 16 bits, x is float32"
    if w.plane_width != 64:
        return (
            f"reads the planar256 layout (k a multiple of 256 and of the block size), this "
            f"weight of k={problem.k}, block_size={w.block_size} is {w.layout}"
        )
    if device.capability not in capabilities:
        return f"needs an {wanted}, this is {device}"
    return None


def tiled(
    config_type: Callable[..., Tiling], kernel: Callable[..., Array]
) -> Callable[..., Array]:
    """Makes an implementation's product of a kernel that takes whole tiles.

    Args:
      config_type: Makes the kernel's Config.
      kernel: (x, codes, scales, addend, *, config, codebook, num_sms) -> (m, n), or with
        split_k > 1 parts of the contraction, transposed, in float32.
    """

    def run(x, w, addend: Addend, choice: Choice, device: Device) -> Array:
        config = config_type(**dict(choice.config))

        # A batch of weights goes one by one: a kernel's grid has no axis for it.
        @jax.custom_batching.sequential_vmap
        def product(x, w, addend):
            m = x.shape[0]
            short = -m % config.block_m
            x = jnp.pad(x, ((0, short), (0, 0)))
            if addend is not None:
                u, v = addend
                rank = -u.shape[1] % 64
                addend = (
                    jnp.pad(u, ((0, short), (0, rank))),
                    jnp.pad(v, ((0, 0), (0, rank))),
                )
            y = kernel(
                x,
                w.codes,
                _scales(w, x.dtype if not config.exact else jnp.dtype(jnp.float32)),
                addend,
                config=config,
                codebook=w.codebook,
                num_sms=device.cores,
            )
            if y.ndim == 3:  # parts of the contraction, transposed
                y = y.sum(0).T.astype(x.dtype)
            return y[:m]

        return product(x, w, addend)

    return run


def _scales(w: QuantizedTensor, dtype: jnp.dtype) -> Array:
    """Returns the absmax of every 64 elements, (k/64, n)."""
    absmax = w.decode_absmax()
    if w.block_size > 64:
        absmax = jnp.repeat(absmax, w.block_size // 64, axis=1)
    return absmax.T.astype(dtype)
