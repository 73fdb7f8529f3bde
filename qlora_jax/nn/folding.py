"""What a merge makes of one weight, whether a model is in memory or streams by.

Modules ask it: `Weighted.merged` and `Adapted.merged` in frozen.py say which part is theirs.

A linear becomes W + scale * (a @ b).T, computed in float32 and rounded once; with DoRA each
output's row is then scaled to its magnitude. Rows of tokens, and what trained in full, take
the place of the base's.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.formats import PackedWeight
from qlora_jax.config.quant import QuantConfig
from qlora_jax.nn.packing import dequantize, quantize_tensor


class Factors(NamedTuple):
    """What an adapter has of a linear, or of a stack of them; all None without an adapter.

    Attributes:
      a: lora_a, float32 (..., in, rank).
      b: lora_b, float32 (..., rank, out).
      magnitude: float32 (..., out), with DoRA.
      active: float32 (...), 0 in layers of a stack without adapter; None where all have one.
    """

    a: Array | None = None
    b: Array | None = None
    magnitude: Array | None = None
    active: Array | None = None


def fold(
    kernel: Array | PackedWeight, factors: Factors, *, scale: float | Float[Array, ""]
) -> Float[Array, "out in"]:
    """Returns one layer's weight with its adapter, in float32."""
    if isinstance(kernel, PackedWeight):
        kernel = dequantize(kernel, "float32")
    kernel = kernel.astype(jnp.float32)
    a, b, magnitude, active = factors
    if a is None or b is None:
        return kernel
    merged = kernel + scale * jnp.matmul(a, b, precision="highest").T
    if magnitude is not None:
        norms = jnp.linalg.norm(merged, axis=1)
        merged = merged * (magnitude / norms)[:, None]
    return merged if active is None else jnp.where(active > 0, merged, kernel)


class Applied(NamedTuple):
    """A weight as a model applies it: the base's kernel, and an adapter's update of it.

    Attributes:
      kernel: (..., out, in), dense or quantized.
      factors: The adapter's part of it.
      scale: float32 (...), what the update is multiplied by.
    """

    kernel: Any
    factors: Factors = Factors()
    scale: Any = None


@functools.partial(jax.jit, static_argnames=("scale", "stack", "dtype"))
def _folded(
    kernel: Array | PackedWeight,
    factors: Factors,
    scale: float,
    stack: tuple[int, ...],
    dtype: str,
) -> Array:
    """Folds stacked layers, one float32 weight alive at a time."""

    def one(parts: tuple) -> Array:
        return fold(*parts, scale=scale).astype(dtype)

    run: Callable[[tuple], Array] = one
    for _ in stack:
        run = functools.partial(jax.lax.map, run)
    return run((kernel, factors))


@dataclasses.dataclass(frozen=True)
class Folding:
    """The weights that a merge makes.

    Attributes:
      dtype: The dtype of the weights that become dense: 'bfloat16', 'float16' or 'float32'.
      requantize: The settings to quantize merged linears with; None makes all dense.
      stack: The leading axes of the weights that are folded together; () for one weight.
      dense: Whether a weight stays dense whatever `requantize` says, as a dense head does.
    """

    dtype: str
    requantize: QuantConfig | None = None
    stack: tuple[int, ...] = ()
    dense: bool = False

    def linear(
        self,
        kernel: Array | PackedWeight,
        factors: Factors,
        scale: float,
    ) -> Array | PackedWeight:
        """Returns the weight of an adapted linear, or of a stack of them.

        Args:
          kernel: The base's weight, (*stack, out, in).
          factors: The adapter's part of it.
          scale: What the update is multiplied by.
        """
        stack = self.stack
        if self.requantize is None or self.dense:
            return _folded(kernel, factors, scale, stack, self.dtype)
        own = kernel.dtype if isinstance(kernel, PackedWeight) else kernel.dtype.name
        if not stack:
            return self.packed(fold(kernel, factors, scale=scale), own)
        parts = []
        for index in np.ndindex(*stack):
            one = jax.tree.map(lambda leaf, i=index: leaf[i], (kernel, factors))
            parts.append(self.packed(fold(*one, scale=scale), own))
        return jax.tree.map(
            lambda *x: jnp.stack(x).reshape(*stack, *x[0].shape), *parts
        )

    def packed(self, merged: Float[Array, "out in"], dtype: str) -> PackedWeight:
        """Quantizes float32 values, rounded once, that are read in the base's dtype."""
        return dataclasses.replace(
            quantize_tensor(merged, self.requantize), dtype=dtype
        )

    def kept(self, weight: Array | PackedWeight) -> Array | PackedWeight:
        """Returns a weight without an adapter: dense where all becomes dense."""
        if isinstance(weight, PackedWeight) and self.requantize is None:
            return dequantize(weight, self.dtype)
        return weight

    def table(
        self, table: Array | PackedWeight, a: Array, b: Array, scale: float
    ) -> Float[Array, "vocab hidden"]:
        """Returns the weight of an embedding with an adapter."""
        update = jnp.matmul(a, b, precision="highest")
        wide = dense_table(table).astype(jnp.float32) + scale * update
        return wide.astype(self.dtype)

    def trained(self, value: Array) -> Array:
        """Returns what trained in full, float32, as it is kept."""
        return value.astype(self.dtype)


def with_rows(
    table: Array | PackedWeight, rows: Array, tokens: tuple[int, ...]
) -> Float[Array, "vocab hidden"]:
    """Returns a table or head with the rows of some tokens replaced, in its own dtype."""
    whole = dense_table(table)
    return whole.at[jnp.asarray(tokens)].set(rows.astype(whole.dtype))


def dense_table(table: Array | PackedWeight) -> Float[Array, "vocab hidden"]:
    """Returns the rows of an embedding or head, in its own dtype."""
    return dequantize(table) if isinstance(table, PackedWeight) else table
