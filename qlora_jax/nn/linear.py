"""Frozen linears, dense and quantized.

Kernels are in Hugging Face orientation, (out, in). A linear that stands for a stack of
layers has them on a leading axis; the model slices before it calls.
"""

import abc
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels.formats import PackedWeight
from pallas_kernels.matmul import product_of
from qlora_jax.nn.frozen import Weighted
from qlora_jax.nn.matmul import factor_matmul, frozen_matmul
from qlora_jax.nn.origin import Origin
from qlora_jax.nn.variables import FrozenParam, trains


class FrozenLinear(Weighted):
    """What a dense linear and a quantized one share: y = x @ kernel.T + bias.

    Attributes:
      kernel: FrozenParam, (..., out, in), dense or packed.
      bias: FrozenParam, (..., out), or None.
      origin: What it was in a stranger's module, which says what it computes in; else None.
    """

    WEIGHT = "kernel"
    AXES: ClassVar = {"kernel": ("out", "in"), "bias": ("out",)}
    kernel: nnx.Variable
    origin: Origin | None

    @property
    def in_features(self) -> int:
        """Size of the last axis of an input."""
        return self.shape[1]

    @property
    def out_features(self) -> int:
        """Size of the last axis of an output."""
        return self.shape[0]

    def incoming(self, x: Array) -> Array:
        """Returns an input in the dtype to compute in: its own, but for a stranger's."""
        origin = self.origin
        return x if origin is None else origin.incoming(x, self.stored.dtype)

    def weight(self, dtype: str | None = None) -> Float[Array, "*stack out in"]:
        """Returns the dense kernel, in its own dtype unless one is given."""
        held = self.stored
        if self.packed:
            return held.decode(dtype)
        return held if dtype is None else held.astype(dtype)

    @abc.abstractmethod
    def product(
        self,
        x: Float[Array, "*batch in"],
        adapter: tuple[Array, Array, float] | None = None,
    ) -> Float[Array, "*batch out"]:
        """Computes x @ kernel.T in x's dtype, and adds an adapter's (lora_a, lora_b, scale)
        part, in the same pass where a kernel can."""

    def holding(self, weight: Any, bias: Any = None) -> nnx.Module:
        """Returns the linear of another kernel in its place: a QuantizedLinear of a packed
        one; of a dense one a Linear, or the flax.nnx.Linear that this was before."""
        if isinstance(weight, PackedWeight):
            return QuantizedLinear(weight, bias, origin=self.origin)
        if self.origin is None:
            return Linear(weight, bias)
        return self.origin.linear(weight, bias)

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Applies the layer in the dtype of `incoming`."""
        return add_bias(self.product(self.incoming(x)), self.bias)


class Linear(FrozenLinear):
    """A frozen dense linear: y = x @ kernel.T + bias.

    Attributes:
      kernel: FrozenParam, (..., out, in).
      bias: FrozenParam, (..., out), or None.
      origin: What it was in a stranger's module, which says what it computes in; else None.
    """

    def __init__(
        self,
        kernel: Array,
        bias: Array | None = None,
        origin: Origin | None = None,
    ):
        self.kernel: nnx.Variable = FrozenParam(kernel)
        self.bias = nnx.data(None if bias is None else FrozenParam(bias))
        self.origin = origin

    def product(
        self,
        x: Float[Array, "*batch in"],
        adapter: tuple[Array, Array, float] | None = None,
    ) -> Float[Array, "*batch out"]:
        """Computes x @ kernel.T in x's dtype, and adds an adapter's part."""
        flat, kernel = x.reshape(-1, x.shape[-1]), self.kernel[...]
        if trains(self.kernel):
            y = factor_matmul(flat, kernel.T)
        else:
            y = frozen_matmul(flat, kernel)
        if adapter is not None:
            y = y + low_rank(flat, *adapter)
        return y.reshape(*x.shape[:-1], -1)


class QuantizedLinear(FrozenLinear):
    """A frozen quantized linear: y = x @ dequantize(kernel).T + bias.

    Nothing dense is kept for backward (contract C3).

    Attributes:
      kernel: FrozenParam holding a PackedWeight of shape (out, in), or a stack of them.
      bias: FrozenParam, (..., out), or None.
      implementation: The implementation of nf4_matmul for a 4-bit kernel, such as 'xla' or
        'hopper'; None chooses by device and shape.
      origin: What it was in a stranger's module, which says what it computes in; else None.
    """

    def __init__(
        self,
        kernel: PackedWeight,
        bias: Array | jax.ShapeDtypeStruct | None = None,  # a shape, in a plan
        implementation: str | None = None,
        origin: Origin | None = None,
    ):
        self.kernel = FrozenParam(kernel)
        self.bias = nnx.data(None if bias is None else FrozenParam(bias))
        self.implementation = implementation
        self.origin = origin

    @property
    def quantized(self) -> PackedWeight:
        """The kernel."""
        return self.kernel.get_value()

    def decodes_for_products(self, tied: bool) -> bool:
        """Whether its products decode the kernel; a named implementation is kept."""
        return self.implementation is None

    def decoded(self, dtype: str) -> "DecodedLinear":
        """Returns the linear with its kernel decoded once."""
        return DecodedLinear.of(self, dtype)

    def product(
        self,
        x: Float[Array, "*batch in"],
        adapter: tuple[Array, Array, float] | None = None,
    ) -> Float[Array, "*batch out"]:
        """Computes x @ dequantize(kernel).T in x's dtype, with an adapter (lora_a,
        lora_b, scale) in the same pass where a kernel can."""
        w, name = self.quantized, self.implementation
        product = product_of(w)
        if adapter is None:
            return product.plain(x, w, name)
        if product.with_adapter is not None:
            return product.with_adapter(x, w, *adapter, name)
        rows = x.reshape(-1, x.shape[-1])
        y = product.plain(rows, w, name) + low_rank(rows, *adapter)
        return y.reshape(*x.shape[:-1], -1)


class DecodedLinear(Linear):
    """A 4-bit linear decoded once, for inference on what has no fused kernel.

    Its products round where QuantizedLinear's do: they are equal bit for bit where that
    decodes a weight whole, and differ by the order of a float32 sum where it goes tile by
    tile (pallas_kernels/packed_matmul/xla.py).

    Attributes:
      kernel: FrozenParam, (..., out, in), in the compute dtype.
      bias: FrozenParam, (..., out), or None.
    """

    def product(
        self,
        x: Float[Array, "*batch in"],
        adapter: tuple[Array, Array, float] | None = None,
    ) -> Float[Array, "*batch out"]:
        """Computes x @ kernel.T in x's dtype, with an adapter as QuantizedLinear has it."""
        # As in nf4_matmul, nothing before is merged into the product: it would round anew.
        x = lax.optimization_barrier(x)
        y = super().product(x)
        if adapter is None:
            return y
        a, b, scale = adapter
        dot = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
        # As nf4_lora_matmul rounds: the hidden values are scaled in float32 before.
        hidden = dot(x, a.astype(x.dtype)) * jnp.float32(scale)
        return y + dot(hidden.astype(x.dtype), b.astype(x.dtype)).astype(y.dtype)

    @classmethod
    def of(cls, linear: QuantizedLinear, dtype: str) -> "DecodedLinear":
        """Decodes a linear, or a stack of them; its bias stays the same variable."""
        made = cls(linear.weight(dtype), origin=linear.origin)
        made.bias = linear.bias
        return made


def low_rank(x: Float[Array, "m in"], a: Array, b: Array, scale: float) -> Array:
    """Computes an adapter's part, scale * (x @ a) @ b, in x's dtype."""
    hidden = checkpoint_name(factor_matmul(x, a), "lora_hidden")
    return factor_matmul(hidden, b) * jnp.asarray(scale, x.dtype)


def add_bias(y: Array, bias: nnx.Variable | None) -> Array:
    """Returns y + bias in y's dtype; the gradient of a bias that trains is float32."""
    if bias is None:
        return y
    if trains(bias):
        return (y.astype(jnp.float32) + bias[...]).astype(y.dtype)
    return y + bias[...].astype(y.dtype)
