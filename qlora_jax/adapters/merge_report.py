"""What a merge lost: each merged weight against base + adapter in float32."""

import dataclasses
import functools
import math
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.formats import PackedWeight
from qlora_jax.adapters.merge import factors, fold
from qlora_jax.errors import AdapterMismatchError
from qlora_jax.names import Numbered, dotted, is_stacked
from qlora_jax.nn import Linear, LoRA, LoRAEmbedding, QuantizedLinear
from qlora_jax.nn.embedding import Table
from qlora_jax.nn.packing import dequantize
from qlora_jax.nn.quantizing import adopted

LINEARS = (Linear, QuantizedLinear, LoRA)
TABLES = (*get_args(Table), LoRAEmbedding)


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """Relative errors of a merge, in Frobenius norm.

    Attributes:
      relative: {dotted name with the layer's number: ||got - exact|| / ||exact||}.
      of_update: The same error over the norm of the adapter's update: the part of what
        was learned that is lost (1 and more: nothing of it is left).
      total: (relative, of_update) of all weights together.
    """

    relative: dict[str, float]
    of_update: dict[str, float]
    total: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON has it."""
        return {
            "relative_error": self.total[0],
            "error_of_update": self.total[1],
            "linears": {
                name: {"relative_error": x, "error_of_update": self.of_update[name]}
                for name, x in self.relative.items()
            },
        }


def merge_report(model: nnx.Module, merged: nnx.Module) -> MergeReport:
    """Compares a merged model with what it was merged from.

    Exact is what the adapter says, base + scale * (a @ b).T in float32 (with DoRA each
    row at its magnitude), the base as the model holds it. One layer's weights are decoded
    at a time.

    Args:
      model: With the adapter attached.
      merged: What `merge` made of it, dense or 4-bit; or that with an adapter of its own,
        such as one that makes up for what quantizing again lost.

    Returns:
      An error of each linear, and of an embedding, with an adapter; what replaces the
      base's (biases, rows of tokens, modules that trained in full) has none.

    Raises:
      AdapterMismatchError: a module with an adapter has none of its shape in the other.
    """
    nodes = {path: node for path, node in nnx.iter_graph(adopted(merged))}
    squares: dict[str, np.ndarray] = {}
    for path, node in nnx.iter_graph(model):
        if not isinstance(node, (LoRA, LoRAEmbedding)):
            continue
        other = nodes.get(path)
        kinds = LINEARS if isinstance(node, LoRA) else TABLES
        if not isinstance(other, kinds) or _shape(node) != _shape(other):
            name = ".".join(map(str, path))
            what = "linear" if isinstance(node, LoRA) else "embedding"
            raise AdapterMismatchError(f"{name}: the merged model has no such {what}")
        stack = _shape(node)[:-2]
        figures = np.asarray(_apart(stack)(_parts(node), _parts(other)))
        for index in np.ndindex(*stack):
            squares[_name(path, index)] = figures[index].astype(np.float64)
    return MergeReport(
        {name: _root(lost, whole) for name, (lost, whole, _) in squares.items()},
        {name: _root(lost, update) for name, (lost, _, update) in squares.items()},
        _totals(sum(squares.values(), np.zeros(3))),
    )


def _totals(sums: Any) -> tuple[float, float]:
    lost, whole, update = sums
    return _root(lost, whole), _root(lost, update)


def _root(square: float, of: float) -> float:
    return math.sqrt(square / of) if of else 0.0 if not square else math.inf


def _weight(node: Any) -> Any:
    base = node.base if isinstance(node, (LoRA, LoRAEmbedding)) else node
    return (base.weight if isinstance(base, Table) else base.kernel).get_value()


def _shape(node: Any) -> tuple[int, ...]:
    if isinstance(node, TABLES):
        return _weight(node).shape
    base = node.base if isinstance(node, LoRA) else node
    return (*base.stack, base.out_features, base.in_features)


def _parts(node: Any) -> tuple[Any, ...]:
    """Returns kernel, factors or Nones, and the scale, with the leading axes of a stack."""
    if isinstance(node, LoRAEmbedding):
        # The rows of a table are the outputs of a linear.
        a, b = node.lora_b[...].T, node.lora_a[...].T
        return (_weight(node), a, b, None, None, jnp.float32(node.scale))
    if not isinstance(node, LoRA):
        return (_weight(node), None, None, None, None, None)
    scale = jnp.full(node.base.stack, node.scale, jnp.float32)
    return (_weight(node), *factors(node), scale)


@functools.cache
def _apart(stack: tuple[int, ...]) -> Any:
    def one(pair: tuple) -> Float[Array, "3"]:
        (exact, base), (got, _) = map(_weights, pair)
        return jnp.stack([jnp.sum(x**2) for x in (got - exact, exact, exact - base)])

    run = one
    for _ in stack:
        run = functools.partial(jax.lax.map, run)
    return jax.jit(lambda a, b: run((a, b)))


def _weights(parts: tuple[Any, ...]) -> tuple[Array, Array]:
    """Returns the float32 weight that a linear applies, and that of its base."""
    kernel, a, b, magnitude, active, scale = parts
    if isinstance(kernel, PackedWeight):
        kernel = dequantize(kernel, "float32")
    kernel = kernel.astype(jnp.float32)
    if a is None:
        return kernel, kernel
    return fold(kernel, a, b, magnitude, active, scale=scale), kernel


def _name(path: tuple[Any, ...], index: tuple[int, ...]) -> str:
    if index and not is_stacked(path):  # a stack of a stranger's module
        return f"{dotted(path)}[{', '.join(map(str, index))}]"
    return str(Numbered(dotted(path), index))
