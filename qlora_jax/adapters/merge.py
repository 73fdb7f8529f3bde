"""Folding adapters into the base of a model in memory (nn/folding.py has the arithmetic)."""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

import jax
from flax import nnx
from jaxtyping import Array

from qlora_jax.adapters.algebra import scale
from qlora_jax.adapters.attach import attach_zero
from qlora_jax.adapters.compensate import compensate
from qlora_jax.adapters.names import at_place
from qlora_jax.adapters.value import Adapter
from qlora_jax.config.lora import LoRAConfig
from qlora_jax.config.quant import QuantConfig
from qlora_jax.errors import AdapterMismatchError, ConfigError
from qlora_jax.models.vocabulary import own_head, untied
from qlora_jax.names import EMBEDDING, HEAD, layers_at, plain
from qlora_jax.nn import Adapted, FrozenLinear, LoRA, LoRAEmbedding, Weighted
from qlora_jax.nn.folding import Folding, fold
from qlora_jax.nn.frozen import modules, replaced, weighted
from qlora_jax.nn.quantizing import adopted

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
    adapted = {path for path, _ in modules(model, Adapted)}
    if not nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        raise AdapterMismatchError("the model has no adapter to merge")
    if any(path == (EMBEDDING,) for path, _ in modules(model, LoRAEmbedding)):
        model = untied(model)  # the head does not follow
    plain = getattr(model, "dtype", "float32") if dtype is None else dtype
    folding = Folding(plain, requantize)

    def frozen(path: tuple, node: Weighted) -> nnx.Module:
        # The base inside of what is adapted waits for its wrapper.
        return node if path[:-1] in adapted else node.merged(folding)

    def merged(path: tuple, node: Adapted) -> nnx.Module:
        dense = stays_dense(path, node)
        return node.merged(dataclasses.replace(folding, dense=dense))

    return own_head(replaced(replaced(model, Weighted, frozen), Adapted, merged))


def stays_dense(path: tuple, node: Weighted | Adapted) -> bool:
    """Whether an adapted module stays dense when others become 4-bit: a head that is so."""
    return path[-1:] == (HEAD,) and not weighted(node).packed


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
    adapted = dict(modules(model, LoRA))
    merged = merge(model, requantize=requantize)
    linears = modules(merged, FrozenLinear)
    packed = [path for path, node in linears if node.packed and path in adapted]

    find = at_place(adapted)

    def exact(path: str, index: tuple[int, ...]) -> Array:
        node, index = find(path, index)
        parts = (node.base.stored, node.factors)
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
