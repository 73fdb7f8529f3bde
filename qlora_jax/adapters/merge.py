"""Folding adapters into the base: W + scale * (a @ b).T, in float32, rounded once."""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels import reference
from pallas_kernels.layout import QuantizedTensor
from qlora_jax.errors import AdapterMismatchError, ConfigError
from qlora_jax.nn import Linear, LoRA, QuantizedLinear
from qlora_jax.quant import QuantConfig, quantize_tensor

M = TypeVar("M", bound=nnx.Module)


def merge(
    model: M, *, dtype: str | None = None, requantize: QuantConfig | None = None
) -> M:
    """Folds every adapter into its linear.

    The base is what the model has: original weights where it is dense, dequantized ones
    where it is 4-bit. A 4-bit linear without an adapter is dequantized too (or kept,
    with `requantize`), so that the result is of one kind.

    Args:
      model: With adapters attached. It is left as it was.
      dtype: Of the merged dense weights: 'bfloat16', 'float16' or 'float32'.
      requantize: Quantize the merged weights instead. This rounds them to 4 bits once
        more and loses a part of the adapter.

    Returns:
      A model of the same structure without LoRA modules.

    Raises:
      ConfigError: not exactly one of dtype and requantize is given.
      AdapterMismatchError: the model has no adapter.
    """
    if (dtype is None) == (requantize is None):
        raise ConfigError(
            "merge needs exactly one of dtype= (a dense result) and requantize= (4-bit)"
        )
    adapted = {path for path, node in nnx.iter_graph(model) if isinstance(node, LoRA)}
    if not adapted:
        raise AdapterMismatchError("the model has no adapter to merge")

    def replace(path: tuple, node: object) -> object:
        if isinstance(node, LoRA):
            base, bias = node.base, _bias(node.base)
            kernel = base.kernel.get_value()
            arrays = (kernel, node.lora_a[...], node.lora_b[...])
            fold = functools.partial(_fold, scale=node.scale)
            if requantize is None:
                return Linear(_layers(fold, base.stack, dtype)(*arrays), bias)
            parts = [
                quantize_tensor(fold(*_layer(arrays, index)), requantize)
                for index in np.ndindex(*base.stack)
            ]
            kernel = jax.tree.map(
                lambda *x: jnp.stack(x).reshape(*base.stack, *x[0].shape), *parts
            )
            return QuantizedLinear(kernel, bias)
        # Not the base inside a LoRA: its wrapper is about to replace it.
        if isinstance(node, QuantizedLinear) and path[:-1] not in adapted:
            return (
                Linear(node.weight(dtype), _bias(node)) if requantize is None else node
            )
        return node

    return nnx.recursive_map(replace, model)


def _bias(linear: Linear | QuantizedLinear) -> Array | None:
    return None if linear.bias is None else linear.bias[...]


def _fold(
    kernel: Array | QuantizedTensor,
    a: Float[Array, "in rank"],
    b: Float[Array, "rank out"],
    *,
    scale: float,
) -> Float[Array, "out in"]:
    if isinstance(kernel, QuantizedTensor):
        kernel = reference.dequantize(kernel, "float32")
    update = jnp.matmul(a, b, precision="highest").T
    return kernel.astype(jnp.float32) + scale * update


def _layer(arrays: tuple, index: tuple[int, ...]) -> tuple:
    return jax.tree.map(lambda leaf: leaf[index], arrays)


def _layers(fold, stack: tuple[int, ...], dtype: str | None):
    """Maps `fold` over stacked layers, one float32 weight alive at a time."""

    run: Callable[[tuple], Array] = lambda arrays: fold(*arrays).astype(dtype)  # noqa: E731
    for _ in stack:
        run = functools.partial(jax.lax.map, run)
    return jax.jit(lambda *arrays: run(arrays))
