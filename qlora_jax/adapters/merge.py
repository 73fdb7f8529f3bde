"""Folding adapters into the base: W + scale * (a @ b).T, in float32, rounded once.

With DoRA each output's row is then scaled to its magnitude. Rows of tokens, biases and
modules that trained in full take the place of the base's.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.formats import PackedWeight
from qlora_jax.adapters.algebra import scale
from qlora_jax.adapters.attach import attach_zero
from qlora_jax.adapters.compensate import compensate
from qlora_jax.adapters.value import Adapter
from qlora_jax.config.lora import LoRAConfig
from qlora_jax.config.quant import QuantConfig
from qlora_jax.errors import AdapterMismatchError, ConfigError
from qlora_jax.models import Decoder
from qlora_jax.models.vocabulary import untied
from qlora_jax.names import HEAD, dotted
from qlora_jax.nn import (
    Embedding,
    FrozenParam,
    Linear,
    LoRA,
    LoRAEmbedding,
    QuantizedLinear,
    TrainedRows,
)
from qlora_jax.nn.embedding import QuantizedEmbedding, Table
from qlora_jax.nn.norm import RMSNorm
from qlora_jax.nn.packing import dequantize, quantize_tensor
from qlora_jax.nn.quantizing import adopted
from qlora_jax.nn.variables import trains

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
        more and loses a part of the adapter. A dense head stays dense, as `quantize`
        leaves it.

    Returns:
      A model of the same structure without LoRA modules. What was a flax.nnx.Linear before
      `quantize` is one again, in `dtype`, so that a stranger's module is what it was.

    Raises:
      ConfigError: not exactly one of dtype and requantize is given.
      AdapterMismatchError: the model has no adapter.
    """
    if (dtype is None) == (requantize is None):
        raise ConfigError(
            "merge needs exactly one of dtype= (a dense result) and requantize= (4-bit)"
        )
    adapted = {path for path, node in nnx.iter_graph(model) if isinstance(node, LoRA)}
    if not nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        raise AdapterMismatchError("the model has no adapter to merge")
    if isinstance(model, Decoder) and isinstance(model.embed_tokens, LoRAEmbedding):
        model = cast(M, untied(model))  # the head does not follow
    plain = getattr(model, "dtype", "float32") if dtype is None else dtype

    def replace(path: tuple, node: object) -> object:
        if isinstance(node, LoRA):
            base, bias = node.base, _bias(node.base, plain)
            kernel = base.kernel.get_value()
            folded = functools.partial(fold, scale=node.scale)
            arrays = (kernel, *factors(node))
            dense_head = isinstance(base, Linear) and path[-1:] == (HEAD,)
            if requantize is None or dense_head:
                return _dense(base, _layers(folded, base.stack, plain)(*arrays), bias)
            own = (
                kernel.dtype if isinstance(kernel, PackedWeight) else kernel.dtype.name
            )
            parts = [
                # Of float32 values, rounded once, that are read in the base's dtype.
                dataclasses.replace(
                    quantize_tensor(folded(*_layer(arrays, index)), requantize),
                    dtype=own,
                )
                for index in np.ndindex(*base.stack)
            ]
            kernel = jax.tree.map(
                lambda *x: jnp.stack(x).reshape(*base.stack, *x[0].shape), *parts
            )
            return QuantizedLinear(kernel, bias, origin=base.origin)
        if isinstance(node, LoRAEmbedding):
            table = _table(node.base)
            update = jnp.matmul(node.lora_a[...], node.lora_b[...], precision="highest")
            wide = table.astype(jnp.float32) + node.scale * update
            return Embedding(wide.astype(plain))
        if isinstance(node, TrainedRows):
            return _with_rows(node, plain)
        # Not the base inside a LoRA: its wrapper is about to replace it.
        if isinstance(node, QuantizedLinear) and path[:-1] not in adapted:
            return (
                _dense(node, node.weight(dtype), _bias(node, plain))
                if requantize is None
                else _frozen(node, plain)
            )
        if isinstance(node, QuantizedEmbedding) and requantize is None:
            return Embedding(_table(node).astype(plain))
        if isinstance(node, (Linear, Embedding, RMSNorm)):
            return _frozen(node, plain)
        return node

    merged = nnx.recursive_map(replace, model)
    if isinstance(merged, Decoder) and merged.lm_head is not None:
        merged.config = dataclasses.replace(merged.config, tie_word_embeddings=False)
    return cast(M, merged)


def merge_corrected(
    model: M, requantize: QuantConfig, *, rank: int, iterations: int = 1
) -> M:
    """Folds every adapter into a 4-bit linear, beside an adapter for what that loses.

    One weight at a time is dense.

    Args:
      model: With adapters attached. It is left as it was.
      requantize: How to quantize the merged weights.
      rank: Of the new adapter.
      iterations: Rounds of LoftQ's alternation; with more than one the 4-bit weights suit
        the new adapter, and are worse without it (`compensate`).

    Returns:
      A 4-bit model with the new adapter: `detach` gives the one, `Adapter.of` the other.

    Raises:
      AdapterMismatchError: the model has no adapter, or none on a linear that becomes
        4-bit.
      ConfigError: rank or iterations is less than 1.
    """
    adapted = {
        dotted(path): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, LoRA)
    }
    merged = merge(model, requantize=requantize)
    packed = [
        dotted(path)
        for path, node in nnx.iter_graph(merged)
        if isinstance(node, QuantizedLinear) and dotted(path) in adapted
    ]
    if not packed:
        raise AdapterMismatchError(
            "no linear with an adapter became 4-bit, so there is nothing to correct"
        )

    def exact(path: str, index: tuple[int, ...]) -> Array:
        node = adapted[path]
        arrays = (node.base.kernel.get_value(), *factors(node))
        return fold(*_layer(arrays, index), scale=node.scale)

    config = LoRAConfig(
        rank=rank, alpha=float(rank), targets=",".join(packed), init="loftq"
    )
    key = jax.random.key(0)
    fresh = attach_zero(merged, config, key=key)
    return compensate(fresh, exact, key=key, iterations=iterations)[0]


def unmerge(model: M, adapter: Adapter, *, dtype: str | None = None) -> M:
    """Takes an adapter out of a dense model that it was merged into.

    Args:
      model: What `merge` made. It is left as it was.
      adapter: What was merged.
      dtype: Of the result; None for the model's own.

    Returns:
      The base, but for two roundings: of a weight merged in bfloat16 at most 2**-8 of it
      (2**-11 in float16, 2**-24 in float32) is lost, which is more of the base's weight
      where the update is larger. `merge_report` of the base with the adapter and the
      model says how far apart they were.

    Raises:
      AdapterMismatchError: something of the adapter is no low-rank update (DoRA, biases,
        modules that trained in full), which nothing can take out again.
    """
    minus = scale(adapter, -1.0).on(adopted(model))
    return merge(minus, dtype=dtype or str(getattr(model, "dtype", "float32")))


def factors(node: LoRA) -> tuple[Array, Array, Array | None, Array | None]:
    """Returns lora_a, lora_b, magnitude and, of each layer, whether it is adapted."""
    a, b = node.lora_a[...], node.lora_b[...]
    magnitude = None if node.magnitude is None else node.magnitude[...]
    active = None if node.active is None else node.active[...][..., 0, 0]
    return a, b, magnitude, active


def _dense(
    base: Linear | QuantizedLinear, kernel: Array, bias: Array | None
) -> Linear | nnx.Linear:
    """Returns the dense linear that takes the place of one: a stranger's is its own again."""
    if base.origin is None:
        return Linear(kernel, bias)
    return base.origin.linear(kernel, bias)


def _with_rows(node: TrainedRows, dtype: str) -> Any:
    base = node.base
    table = _table(base)
    rows = node.rows[...].astype(table.dtype)
    table = table.at[jnp.asarray(node.tokens)].set(rows)
    if isinstance(base, Table):
        return Embedding(table)
    return Linear(table, _bias(base, dtype))


def _table(module: Any) -> Array:
    """Returns the dense rows of an embedding or head."""
    own = module.weight if isinstance(module, Table) else module.kernel
    value = own.get_value()
    return dequantize(value) if isinstance(value, PackedWeight) else value


def _frozen(node: Any, dtype: str) -> Any:
    """Freezes what trained in a module, which is a copy already."""
    for name in ("kernel", "weight", "bias"):
        variable = getattr(node, name, None)
        if isinstance(variable, nnx.LoRAParam):
            setattr(node, name, nnx.data(FrozenParam(variable[...].astype(dtype))))
    return node


def _bias(linear: Linear | QuantizedLinear, dtype: str) -> Array | None:
    if linear.bias is None:
        return None
    bias = linear.bias[...]
    return bias.astype(dtype) if trains(linear.bias) else bias


def fold(
    kernel: Array | PackedWeight,
    a: Float[Array, "in rank"],
    b: Float[Array, "rank out"],
    magnitude: Float[Array, " out"] | None,
    active: Float[Array, ""] | None,
    *,
    scale: float | Float[Array, ""],
) -> Float[Array, "out in"]:
    """Returns one layer's weight with its adapter, in float32; of what `factors` gives."""
    if isinstance(kernel, PackedWeight):
        kernel = dequantize(kernel, "float32")
    kernel = kernel.astype(jnp.float32)
    merged = kernel + scale * jnp.matmul(a, b, precision="highest").T
    if magnitude is not None:
        norms = jnp.linalg.norm(merged, axis=1)
        merged = merged * (magnitude / norms)[:, None]
    return merged if active is None else jnp.where(active > 0, merged, kernel)


def _layer(arrays: tuple, index: tuple[int, ...]) -> tuple:
    return jax.tree.map(lambda leaf: leaf[index], arrays)


def _layers(folded, stack: tuple[int, ...], dtype: str | None):
    """Maps `folded` over stacked layers, one float32 weight alive at a time."""

    run: Callable[[tuple], Array] = lambda arrays: folded(*arrays).astype(dtype)  # noqa: E731
    for _ in stack:
        run = functools.partial(jax.lax.map, run)
    return jax.jit(lambda *arrays: run(arrays))
