"""`quantize`: a model's linears, ours or a stranger's, become 4-bit ones."""

import logging
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from pallas_kernels.formats import PackedWeight
from qlora_jax.config.quant import QuantConfig
from qlora_jax.errors import ConfigError, ShapeError
from qlora_jax.names import HEAD
from qlora_jax.nn.linear import Linear, QuantizedLinear
from qlora_jax.nn.origin import Origin, is_plain
from qlora_jax.nn.packing import quantize_tensor

M = TypeVar("M", bound=nnx.Module)

logger = logging.getLogger(__name__)

_TO_NNX = (
    "write its Dense layers as flax.nnx.Linear, whose kernel has the same shape, and copy the "
    "parameters over"
)


def quantize(model: M, config: QuantConfig | None = None, *, head: bool = False) -> M:
    """Replaces every linear of a model by a 4-bit one.

    Linears are `qlora_jax.nn.Linear` and `flax.nnx.Linear`, alone or as a stack that
    nnx.vmap made, whose layers are on the first axis. An attribute named lm_head stays
    dense, as bitsandbytes leaves it, and so does everything that is no linear. One warning
    names the matrices that stay dense besides head and embeddings: those of subclasses,
    nnx.LinearGeneral, nnx.Einsum, nnx.MultiHeadAttention, convolutions and the like.

    Args:
      model: Any nnx.Module. It is left as it was.
      config: The settings to quantize with; the default is NF4, block 64, double
        quantization.
      head: Whether lm_head becomes 4-bit too.

    Returns:
      A model of the same structure with QuantizedLinear in place of linears. One that was a
      flax.nnx.Linear computes in the dtype that it did, and `merge` makes it one again.

    Raises:
      ConfigError: the model is no nnx.Module, or has no linear.
      ShapeError: a weight has NaN or Inf values, with its path.
    """
    check_module(model)
    config = config or QuantConfig()

    def replace(path, node):
        if path and path[-1] == HEAD and not head:
            return node
        node = adopted_linear(node)
        if isinstance(node, Linear):
            bias = None if node.bias is None else node.bias[...]
            packed = _quantize(path, node.kernel[...], config)
            return node.holding(packed, bias)
        return node

    made = nnx.recursive_map(replace, model)
    _name_what_is_dense(made, head)
    return made


def check_module(model: Any) -> None:
    """Refuses what is no nnx.Module.

    Raises:
      ConfigError: with the way out.
    """
    if isinstance(model, nnx.Module):
        return
    kind = type(model).__name__
    if any(base.__module__.startswith("flax.linen") for base in type(model).__mro__):
        raise ConfigError(
            f"{kind} is a flax.linen module, which holds no weights; {_TO_NNX}"
        )
    raise ConfigError(f"{kind} is no flax.nnx.Module")


def adopted(model: M) -> M:
    """Returns a model whose flax.nnx.Linear are linears of ours, dense and frozen."""
    return nnx.recursive_map(lambda _, node: adopted_linear(node), model)


def adopted_linear(node: Any) -> Any:
    """Returns one of our linears for a flax.nnx.Linear; anything else as it is."""
    if not is_plain(node):
        return node
    kernel = jnp.swapaxes(node.kernel[...], -1, -2)
    bias = None if node.bias is None else node.bias[...]
    return Linear(kernel, bias, origin=Origin.of(node))


def _name_what_is_dense(model: nnx.Module, head: bool) -> None:
    """Says in one warning which matrices `quantize` has left; refuses if it left all."""
    modules, left, packed = {}, {}, False
    for path, node in nnx.iter_graph(model):
        packed |= isinstance(node, QuantizedLinear)
        if isinstance(node, nnx.Module):
            modules[path] = node
        elif isinstance(node, nnx.Param) and not isinstance(node, nnx.LoRAParam):
            if getattr(node.get_value(), "ndim", 0) > 1:
                left[path] = node
    owners = {}
    for path in left:
        parts = [path[:i] for i in range(len(path)) if path[:i] in modules]
        bridges = [p for p in parts if isinstance(modules[p], nnx.bridge.ToNNX)]
        owner = (bridges or parts[-1:])[0] if parts else ()
        if isinstance(modules[owner], nnx.Embed) or (HEAD in owner[-1:] and not head):
            continue
        name = ".".join(map(str, owner)) or "the model itself"
        owners[name] = type(modules[owner]).__name__
    said = ", ".join(f"{name} ({kind})" for name, kind in sorted(owners.items()))
    bridge = f" Of ToNNX: {_TO_NNX}." if "ToNNX" in owners.values() else ""
    if not packed:
        raise ConfigError(
            f"{type(model).__name__} has no flax.nnx.Linear or linear of qlora_jax to "
            f"quantize; it has {said or 'no matrices'}.{bridge}"
        )
    if owners:
        logger.warning(
            "quantize leaves these dense, as they are no plain flax.nnx.Linear with layers "
            "on the first axis: %s.%s",
            said,
            bridge,
        )


def _quantize(path: tuple, w: Array, config: QuantConfig) -> PackedWeight:
    if w.ndim > 2:
        parts = [_quantize((*path, i), part, config) for i, part in enumerate(w)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    try:
        return quantize_tensor(w, config)
    except ShapeError as error:
        raise ShapeError(f"{'.'.join(map(str, path))}: {error}") from None
