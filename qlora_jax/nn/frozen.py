"""What modules answer for themselves: which weight they hold, how it is merged, what trains.

`Weighted` holds one frozen weight, dense or packed: a linear, a table of token vectors, a
norm. `Adapted` is one with something beside it that trains. Attaching, merging, loading and
saving go through a model by `modules` and `replaced`, and ask.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar, cast

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.formats import PackedWeight
from qlora_jax.nn.folding import Applied, Folding
from qlora_jax.nn.variables import FrozenParam, trained, trains

K = TypeVar("K", bound=nnx.Module)
M = TypeVar("M", bound=nnx.Module)
Path = tuple[Any, ...]
Parts = Mapping[str, Array]
"""An adapter's arrays of one module by their names, without those that a layer lacks."""


def modules(model: nnx.Module, kind: type[K]) -> Iterator[tuple[Path, K]]:
    """Yields the modules of a kind, with their paths."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, kind):
            yield path, node


def replaced(model: M, kind: type[K], make: Callable[[Path, K], Any]) -> M:
    """Returns a copy of a model, in which `make` says what takes the place of each module
    of a kind; inner modules come before the ones that hold them."""

    def replace(path: Path, node: Any) -> Any:
        return make(path, node) if isinstance(node, kind) else node

    return nnx.recursive_map(replace, model)


class Weighted(nnx.Module):
    """A module with one frozen weight, dense or packed, and in some a bias."""

    WEIGHT: ClassVar[str] = "weight"
    """The attribute that holds it."""

    NDIM: ClassVar[int] = 2
    """The axes of one weight, without those of a stack."""

    PARTS: ClassVar[tuple[str, ...]] = ()
    """The arrays of an adapter beside it."""

    AXES: ClassVar[dict[str, tuple[str, ...]]] = {}
    """What the axes of each variable are called (sharding.py), without those of a stack."""

    bias: Any = None

    @property
    def variable(self) -> nnx.Variable:
        """The variable that holds the weight."""
        return getattr(self, self.WEIGHT)

    @property
    def stored(self) -> Any:
        """The weight as it is held: an array or a PackedWeight."""
        return self.variable.get_value()

    @property
    def packed(self) -> bool:
        """Whether the weight is packed, so that it can neither train nor grow."""
        return isinstance(self.stored, PackedWeight)

    @property
    def can_train(self) -> bool:
        """Whether the weight itself can train, in full."""
        return not self.packed

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes: () for one layer, (layers,) for a stack."""
        held = self.stored
        return held.stack if self.packed else held.shape[: held.ndim - self.NDIM]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one weight, without the axes of a stack."""
        return self.stored.shape[len(self.stored.shape) - self.NDIM :]

    def rows(self, ids: Int[Array, " m"]) -> Float[Array, "m features"]:
        """Returns some rows of one weight, float32."""
        held = self.stored
        rows = held.decode_rows(ids, "float32") if self.packed else held[ids]
        return rows.astype(jnp.float32)

    @abc.abstractmethod
    def holding(self, weight: Any, bias: Any = None) -> nnx.Module:
        """Returns what holds another weight, dense or packed, in this module's place."""

    def decodes_for_products(self, tied: bool) -> bool:
        """Whether products of its packed weight decode it each time.

        Args:
          tied: Whether the model's embedding is its head too.
        """
        return False

    def decoded(self, dtype: str) -> "Weighted":
        """Returns what computes as it does, for inference, with its weight decoded once."""
        return self

    def parameters(self) -> dict[str, nnx.Variable]:
        """Returns its weight and, where it has one, its bias, by their names."""
        own = {self.WEIGHT: self.variable}
        return own if self.bias is None else own | {"bias": self.bias}

    def unfreeze(self, name: str) -> nnx.LoRAParam:
        """Lets a dense parameter train in place of the frozen one; returns what trains."""
        variable = trained(getattr(self, name))
        axes = self.NDIM if name == self.WEIGHT else 1
        variable.set_metadata(stack=variable.get_value().ndim - axes)
        setattr(self, name, nnx.data(variable))
        return variable

    def folded(self, weight: Any, parts: Parts, folding: Folding) -> Any:
        """Returns the merged weight, of one layer or of a stack.

        Args:
          weight: The base's, as it is held.
          parts: The adapter's arrays by their names in PARTS.
          folding: The dtype and the quantization of what a merge makes, and the leading axes
            of weight and parts.
        """
        return folding.kept(weight)

    def applied(self, weight: Any, parts: Parts) -> Applied | None:
        """Returns the weight with its update; None where no update is added to it."""
        return None

    def merged(self, folding: Folding) -> nnx.Module:
        """Returns the module without adapters; it may change itself, being a copy."""
        weight = self.folded(self.stored, {}, folding)
        if self.packed and not isinstance(weight, PackedWeight):
            return self.holding(weight, self.frozen_bias(folding))
        for name, variable in self.parameters().items():
            if trains(variable):
                held = FrozenParam(folding.trained(variable[...]))
                setattr(self, name, nnx.data(held))
        return self

    def frozen_bias(self, folding: Folding) -> Array | None:
        """Returns the bias as a merge keeps it."""
        if self.bias is None:
            return None
        return folding.trained(self.bias[...]) if trains(self.bias) else self.bias[...]


class Adapted(nnx.Module):
    """A frozen module, and beside it what trains.

    Attributes:
      base: The module that it wraps.
    """

    PARTS: ClassVar[tuple[str, ...]] = ()
    """The attributes that hold the adapter's arrays, where they are not None."""

    AXES: ClassVar[dict[str, tuple[str, ...]]] = {}
    """What the axes of each variable are called; see `Weighted`."""

    base: Any

    @property
    def parts(self) -> dict[str, Array]:
        """The adapter's arrays, by the names in PARTS."""
        held = {name: getattr(self, name) for name in self.PARTS}
        return {name: x[...] for name, x in held.items() if x is not None}

    @abc.abstractmethod
    def folded(self, weight: Any, parts: Parts, folding: Folding) -> Any:
        """Returns the merged weight; see `Weighted.folded`."""

    @abc.abstractmethod
    def applied(self, weight: Any, parts: Parts) -> Applied | None:
        """Returns the weight with its update; see `Weighted.applied`."""

    def merged(self, folding: Folding) -> nnx.Module:
        """Returns the base with the adapter folded into its weight."""
        base = cast(Weighted, self.base)
        folding = dataclasses.replace(folding, stack=base.stack)
        weight = self.folded(base.stored, self.parts, folding)
        return base.holding(weight, base.frozen_bias(folding))


def weighted(node: Weighted | Adapted) -> Weighted:
    """Returns the frozen module itself, without an adapter that it may have."""
    return node.base if isinstance(node, Adapted) else node
