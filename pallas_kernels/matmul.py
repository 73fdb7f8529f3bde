"""The product with a packed weight, by its format: which function computes it.

A format that has no kernel of its own is multiplied by `reference_matmul`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.annotations import Array, Float
from pallas_kernels.formats import Int8Rows, PackedWeight, QuantizedTensor
from pallas_kernels.int8_matmul import int8_matmul
from pallas_kernels.packed_matmul import nf4_lora_matmul, nf4_matmul
from pallas_kernels.products import dot


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """Says how weights of one format are multiplied. Both functions accumulate in float32.

    Attributes:
      plain: (x (*batch, k), w, implementation) -> x @ w.T, (*batch, n) in x's dtype.
        Differentiable to x only; backward keeps the packed weight.
      with_adapter: (x, w, lora_a, lora_b, scale, implementation) -> the same with a LoRA
        adapter, where a kernel adds it in the same pass; else None.
      decodes: Whether a CPU decodes the weight for every product, so that decoding it once
        pays where it is used often.
    """

    plain: Callable[..., Array]
    with_adapter: Callable[..., Array] | None = None
    decodes: bool = True


@jax.custom_vjp
def reference_matmul(x: Float[Array, "m k"], w: PackedWeight) -> Float[Array, "m n"]:
    """Computes x @ w.T in x's dtype, with the weight decoded whole."""
    return dot(x, w.decode_one(x.dtype), 1, 1).astype(x.dtype)


def _reference_fwd(x, w):
    return reference_matmul(x, w), w


def _reference_bwd(w, dy):
    return dot(dy, w.decode_one(dy.dtype), 1, 0).astype(dy.dtype), None


reference_matmul.defvjp(_reference_fwd, _reference_bwd)


def _over_rows(matmul: Callable[[Array, Any], Array]) -> Callable[..., Array]:
    """Makes a format's product of one that takes (m, k) and has one implementation."""

    def plain(x: Array, w: Any, implementation: str | None) -> Array:
        y = matmul(x.reshape(-1, x.shape[-1]), w)
        return y.reshape(*x.shape[:-1], -1)

    return plain


REFERENCE = Product(plain=_over_rows(reference_matmul))
"""What a format has that has no product of its own."""

PRODUCTS: dict[type[PackedWeight], Product] = {
    QuantizedTensor: Product(plain=nf4_matmul, with_adapter=nf4_lora_matmul),
    Int8Rows: Product(
        plain=_over_rows(lambda x, w: int8_matmul(x, w.codes, w.absmax)),
        decodes=False,
    ),
}
"""The formats with a product of their own."""


def product_of(w: PackedWeight) -> Product:
    """Returns how a weight is multiplied."""
    return PRODUCTS.get(type(w), REFERENCE)
