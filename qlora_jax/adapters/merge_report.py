"""What a merge lost: each merged weight against base + adapter in float32."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from qlora_jax.errors import AdapterMismatchError
from qlora_jax.names import Numbered, dotted, in_words, is_stacked
from qlora_jax.nn import Adapted, FrozenLinear, Weighted
from qlora_jax.nn.folding import Applied, Factors, fold
from qlora_jax.nn.frozen import modules, weighted
from qlora_jax.nn.quantizing import adopted


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """Relative errors of a merge, in Frobenius norm.

    Attributes:
      relative: {dotted name with the layer's number: ||got - exact|| / ||exact||}.
      of_update: {dotted name: ||got - exact|| over the norm of the adapter's update}, the
        part of what was learned that is lost (1 and more: nothing of it is left).
      total: (relative, of_update) of all weights together.
    """

    relative: dict[str, float]
    of_update: dict[str, float]
    total: tuple[float, float]

    @classmethod
    def of(cls, squares: Mapping[str, np.ndarray]) -> "MergeReport":
        """Makes one of what `squares_apart` gives of each weight, in float64."""
        return cls(
            {name: _root(lost, whole) for name, (lost, whole, _) in squares.items()},
            {name: _root(lost, update) for name, (lost, _, update) in squares.items()},
            _totals(sum(squares.values(), np.zeros(3))),
        )

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
      model: The model with the adapter attached.
      merged: What `merge` made of it, dense or 4-bit; or that with an adapter of its own,
        such as one that makes up for what quantizing again lost.

    Returns:
      An error of each linear, and of an embedding, with an adapter; what replaces the
      base's (biases, rows of tokens, modules that trained in full) has none.

    Raises:
      AdapterMismatchError: a module with an adapter has none of its shape in the other.
    """
    nodes = dict(nnx.iter_graph(adopted(merged)))
    squares: dict[str, np.ndarray] = {}
    for path, node in modules(model, Adapted):
        base, other = weighted(node), nodes.get(path)
        if (exact := _applied(node)) is None:
            continue
        if not isinstance(other, (Weighted, Adapted)) or _kind(other) != _kind(node):
            name = in_words(path)
            what = "linear" if isinstance(base, FrozenLinear) else "embedding"
            raise AdapterMismatchError(f"{name}: the merged model has no such {what}")
        pair = exact, _applied(other) or Applied(weighted(other).stored)
        for index in np.ndindex(*base.stack):
            one = jax.tree.map(lambda leaf, i=index: leaf[i], pair) if index else pair
            squares[_name(path, index)] = squares_apart(*one)
    return MergeReport.of(squares)


def _totals(sums: Any) -> tuple[float, float]:
    lost, whole, update = sums
    return _root(lost, whole), _root(lost, update)


def _root(square: float, of: float) -> float:
    return math.sqrt(square / of) if of else 0.0 if not square else math.inf


def _kind(node: Weighted | Adapted) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Returns what two modules have in common that hold the same weights."""
    held = weighted(node)
    return held.WEIGHT, held.stack, held.shape


def squares_apart(exact: Applied, got: Applied) -> np.ndarray:
    """Returns squared norms of what a merge lost, of the exact weight and of its update.

    Args:
      exact: What was to be merged, of one layer.
      got: What came out.

    Returns:
      float64 (3,), summed in float32.
    """
    return np.asarray(_apart(exact, got)).astype(np.float64)


def _applied(node: Weighted | Adapted) -> Applied | None:
    """Returns the weights of a module with its update, or None where there is none."""
    base = weighted(node)
    found = node.applied(base.stored, node.parts) if isinstance(node, Adapted) else None
    if found is None or not base.stack:
        return found
    return found._replace(scale=jnp.full(base.stack, found.scale))


@jax.jit
def _apart(exact: Applied, got: Applied) -> Float[Array, "3"]:
    (wanted, base), (made, _) = _weights(exact), _weights(got)
    return jnp.stack([jnp.sum(x**2) for x in (made - wanted, wanted, wanted - base)])


def _weights(applied: Applied) -> tuple[Array, Array]:
    """Returns the float32 weight that a linear applies, and that of its base."""
    kernel, factors, scale = applied
    base = fold(kernel, Factors(), scale=1.0)
    if factors.a is None:
        return base, base
    return fold(base, factors, scale=scale), base


def _name(path: tuple[Any, ...], index: tuple[int, ...]) -> str:
    if index and not is_stacked(path):  # a stack of a stranger's module
        return f"{dotted(path)}[{', '.join(map(str, index))}]"
    return str(Numbered.at(path, index))
