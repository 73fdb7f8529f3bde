"""Folding adapters into the base of a model in memory (folding.py has the arithmetic)."""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar, cast

import jax
from flax import nnx
from jaxtyping import Array

from pallas_kernels.formats import PackedWeight
from qlora_jax.adapters.algebra import scale
from qlora_jax.adapters.attach import attach_zero
from qlora_jax.adapters.compensate import compensate
from qlora_jax.adapters.folding import Factors, Folding, fold, with_rows
from qlora_jax.adapters.names import at_place
from qlora_jax.adapters.value import Adapter
from qlora_jax.config.lora import LoRAConfig
from qlora_jax.config.quant import QuantConfig
from qlora_jax.errors import AdapterMismatchError, ConfigError
from qlora_jax.models import Decoder
from qlora_jax.models.vocabulary import untied
from qlora_jax.names import HEAD, layers_at, plain
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
      model: A model with adapters attached. It is left as it was.
      dtype: The dtype of the merged dense weights: 'bfloat16', 'float16' or 'float32'.
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

    folding = Folding(plain, requantize)

    def replace(path: tuple, node: object) -> object:
        if isinstance(node, LoRA):
            base, bias = node.base, _bias(node.base, folding)
            kernel = folding.linear(
                base.kernel.get_value(),
                factors(node),
                node.scale,
                stack=base.stack,
                dense=isinstance(base, Linear) and path[-1:] == (HEAD,),
            )
            return _linear(base, kernel, bias)
        if isinstance(node, LoRAEmbedding):
            a, b = node.lora_a[...], node.lora_b[...]
            table = node.base.weight.get_value()
            return Embedding(folding.table(table, a, b, node.scale))
        if isinstance(node, TrainedRows):
            return _with_rows(node, folding)
        # Not the base inside a LoRA: its wrapper is about to replace it.
        if isinstance(node, QuantizedLinear) and path[:-1] not in adapted:
            if requantize is not None:
                return _frozen(node, folding)
            kernel = folding.kept_linear(node.quantized)
            return _linear(node, kernel, _bias(node, folding))
        if isinstance(node, QuantizedEmbedding):
            table = folding.kept_table(node.weight.get_value())
            return node if isinstance(table, PackedWeight) else Embedding(table)
        if isinstance(node, (Linear, Embedding, RMSNorm)):
            return _frozen(node, folding)
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
      model: A model with adapters attached. It is left as it was.
      requantize: The settings to quantize the merged weights with.
      rank: The rank of the new adapter; a higher one makes up for more of what is lost.
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
        path: node for path, node in nnx.iter_graph(model) if isinstance(node, LoRA)
    }
    merged = merge(model, requantize=requantize)
    packed = [
        path
        for path, node in nnx.iter_graph(merged)
        if isinstance(node, QuantizedLinear) and path in adapted
    ]

    find = at_place(adapted)

    def exact(path: str, index: tuple[int, ...]) -> Array:
        node, index = find(path, index)
        parts = (node.base.kernel.get_value(), factors(node))
        return fold(*jax.tree.map(lambda leaf: leaf[index], parts), scale=node.scale)

    key = correction_key()
    fresh = attach_zero(merged, correction_config(packed, rank), key=key)
    return compensate(fresh, exact, key=key, iterations=iterations)[0]


def correction_config(packed: Iterable[tuple[Any, ...]], rank: int) -> LoRAConfig:
    """Returns the config of the adapter for what merging into 4 bits loses.

    Args:
      packed: Paths, as keys, of the linears that have an adapter and become 4-bit.
      rank: The rank of the new adapter; its scale is 1.

    Raises:
      AdapterMismatchError: there are none.
    """
    layers: dict[str, set[int]] = {}
    for path in packed:
        layers.setdefault(plain(path), set()).update(layers_at(path) or ())
    if not layers:
        raise AdapterMismatchError(
            "no linear with an adapter became 4-bit, so there is nothing to correct"
        )
    return LoRAConfig(
        rank=rank,
        alpha=float(rank),
        targets=tuple(layers),
        # Of a linear in several stacks not all may have an adapter.
        layers_pattern={
            name: ",".join(map(str, sorted(own))) for name, own in layers.items() if own
        },
        init="loftq",
    )


def correction_key() -> Array:
    """Returns the key of that adapter's subspace iterations: the same in every merge."""
    return jax.random.key(0)


def unmerge(model: M, adapter: Adapter, *, dtype: str | None = None) -> M:
    """Takes an adapter out of a dense model that it was merged into.

    Args:
      model: The model that `merge` made. It is left as it was.
      adapter: The adapter that was merged.
      dtype: The dtype of the result; None keeps the model's own.

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


def factors(node: LoRA) -> Factors:
    """Returns what an adapter has of a linear."""
    magnitude = None if node.magnitude is None else node.magnitude[...]
    active = None if node.active is None else node.active[...][..., 0, 0]
    return Factors(node.lora_a[...], node.lora_b[...], magnitude, active)


def _linear(
    base: Linear | QuantizedLinear, kernel: Array | PackedWeight, bias: Array | None
) -> Linear | QuantizedLinear | nnx.Linear:
    """Returns the linear that takes the place of one: a stranger's dense one is its own."""
    if isinstance(kernel, PackedWeight):
        return QuantizedLinear(kernel, bias, origin=base.origin)
    if base.origin is None:
        return Linear(kernel, bias)
    return base.origin.linear(kernel, bias)


def _with_rows(node: TrainedRows, folding: Folding) -> Embedding | Linear:
    base, rows = node.base, node.rows[...]
    if isinstance(base, Table):
        return Embedding(with_rows(base.weight.get_value(), rows, node.tokens))
    table = with_rows(base.kernel.get_value(), rows, node.tokens)
    return Linear(table, _bias(base, folding))


def _frozen(node: Any, folding: Folding) -> Any:
    """Freezes what trained in a module, which is a copy already."""
    for name in ("kernel", "weight", "bias"):
        variable = getattr(node, name, None)
        if isinstance(variable, nnx.LoRAParam):
            setattr(node, name, nnx.data(FrozenParam(folding.trained(variable[...]))))
    return node


def _bias(linear: Linear | QuantizedLinear, folding: Folding) -> Array | None:
    if linear.bias is None:
        return None
    bias = linear.bias[...]
    return folding.trained(bias) if trains(linear.bias) else bias
