"""What a stored weight answers for itself, in whichever format it is stored."""

import abc
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.annotations import Array, Float, Int

W = TypeVar("W", bound="PackedWeight")


class FormatError(ValueError):
    """A weight does not fit a format, or the entries of a file are no weight of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedWeight(abc.ABC):
    """A frozen weight, or a stack of them, as one format stores it.

    A format is a subclass: a frozen dataclass, and a pytree of the arrays that ARRAYS names.
    Nothing above this package asks which one a weight has; it asks the weight.

    Invariants (tests/pallas_kernels/formats holds every format to them):
      `shape` is that of one weight. All arrays of a stack have its axes in front.
      `decode` computes in float32 and rounds once to the wanted dtype.
      `decode_rows(rows)` equals `decode()[rows]`, bit for bit.
      `from_storage` of what `storage` returns is the same weight, bit for bit.

    Attributes:
      shape: Shape of one weight; (n, k), out and in, for a linear.
      dtype: Name of the dtype it was quantized from; what `decode` gives by default.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"

    ARRAYS: ClassVar[tuple[str, ...]]
    """Names of the arrays, which are the leaves of the pytree; other fields are static."""

    CALLED: ClassVar[str]
    """What tables and messages call the format, as in '4-bit'."""

    PARTS: ClassVar[str]
    """A regular expression of what a file's keys for a weight's other entries end in."""

    MARK: ClassVar[str]
    """The end of the key that every weight of this format has, and of no other."""

    STEM: ClassVar[str] = ""
    """What a weight's own key loses before such an end is put on."""

    LISTED_AS: ClassVar[str | None] = None
    """A key of config.json's quantization_config that lists the modules stored so, in our
    own folders. None for a format that transformers knows (see `describe`): it looks for
    that in linears alone, so an embedding or a head goes into a folder dense."""

    KNOWN_AS: ClassVar[str | None] = None
    """The quant_method of a folder whose linears are stored so, where transformers knows the
    format; None for one of our own."""

    # --- A weight ------------------------------------------------------------------------

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes: () for one weight, (layers,) for a stack of them."""
        # Where the first array has an axis for each of `shape`; other formats say.
        return getattr(self, self.ARRAYS[0]).shape[: -len(self.shape)]

    @property
    def settings(self) -> dict[str, Any]:
        """The keywords of `quantize` that make a weight of this kind."""
        return {}

    def axes(self, rows: str) -> dict[str, tuple[str | None, ...]]:
        """Returns what each array's axes are called, without those of a stack.

        Args:
          rows: The name of the weight's first axis. An array that is cut where the weight's
            rows are cut has it first; None names what stays whole. Formats whose arrays can
            be cut override this.
        """
        depth = len(self.stack)
        held = {name: getattr(self, name) for name in self.ARRAYS}
        return {
            name: (None,) * (x.ndim - depth)
            for name, x in held.items()
            if x is not None
        }

    @abc.abstractmethod
    def decode_one(self, dtype: jnp.dtype | str) -> Float[Array, "..."]:
        """Decodes one weight as a part of the program that is being traced."""

    @abc.abstractmethod
    def decode_rows(
        self, rows: Int[Array, " m"], dtype: jnp.dtype | str
    ) -> Float[Array, "m k"]:
        """Decodes some rows of one matrix, as `decode(dtype)[rows]`."""

    @abc.abstractmethod
    def largest(self) -> Float[Array, ""]:
        """Returns a bound on the magnitude of its values, float32."""

    @abc.abstractmethod
    def storage(self, name: str) -> dict[str, np.ndarray]:
        """Returns the entries of a safetensors file that one weight is written as.

        Args:
          name: The weight's own key, such as 'model.layers.0.mlp.up_proj.weight'.
        """

    def describe(self) -> dict[str, Any]:
        """Returns what config.json's quantization_config says of weights stored so."""
        return {}

    def mean_scale(self) -> Float[Array, ""] | None:
        """Returns a number by which two quantizations of one weight differ.

        None for a format so exact that no adapter depends on which of them it has.
        """
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, the whole stack."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def bits(self) -> float:
        """Bits that a weight takes on average, scales included."""
        return 8 * self.nbytes / math.prod((*self.stack, *self.shape))

    def decode(self, dtype: jnp.dtype | str | None = None) -> Float[Array, "..."]:
        """Decodes a weight or a stack: (*stack, *shape), rounded once.

        Args:
          dtype: What to return; None for the dtype it was quantized from.
        """
        return _decode(self, jnp.dtype(dtype or self.dtype).name)

    def requantize(self: W, w: Float[Array, "..."]) -> W:
        """Returns other values in this weight's format and settings, standing for its dtype.

        Raises:
          FormatError: as `quantize`.
        """
        made = type(self).quantize(w, **self.settings)
        return dataclasses.replace(made, dtype=self.dtype)

    def __getitem__(self: W, index: Any) -> W:
        """Returns one weight of a stack, or a part of the stack."""
        each = index if isinstance(index, tuple) else (index,)
        if len(each) > len(self.stack):
            raise IndexError(f"index {index} into a stack of {self.stack}")
        for i, size in zip(each, self.stack, strict=False):
            if isinstance(i, int) and not -size <= i < size:
                raise IndexError(f"index {index} into a stack of {self.stack}")
        return jax.tree.map(lambda leaf: leaf[index], self)

    # --- A format ------------------------------------------------------------------------

    @classmethod
    @abc.abstractmethod
    def quantize(cls: type[W], w: Float[Array, "..."], *_: Any, **settings: Any) -> W:
        """Quantizes one weight; each format has its own keywords, and takes no others.

        Raises:
          FormatError: a shape, dtype or value that the format cannot hold. Under jit values
            are not looked at.
        """

    @classmethod
    def abstract(
        cls: type[W],
        shape: tuple[int, ...],
        stack: tuple[int, ...] = (),
        *,
        dtype: str = "float32",
        **settings: Any,
    ) -> W:
        """Returns a weight or a stack whose arrays are jax.ShapeDtypeStruct.

        Args:
          shape: Shape of one weight.
          stack: Leading axes.
          dtype: Name of the dtype it would be quantized from.
          settings: Keyword arguments of the format's `quantize`, such as block_size.
        """
        one = _shapes(cls, shape, dtype, tuple(settings.items()))
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*stack, *x.shape), x.dtype), one
        )

    @classmethod
    @abc.abstractmethod
    def from_storage(
        cls: type[W], tensors: Mapping[str, np.ndarray], name: str, dtype: str
    ) -> W:
        """Reads one weight from the entries of a file.

        Args:
          tensors: Entries by key.
          name: The weight's own key.
          dtype: What it stands for, where the entries do not say.

        Raises:
          FormatError: an entry is missing, or they do not belong together.
        """

    @classmethod
    def is_stored(cls, keys: Collection[str], name: str) -> bool:
        """Whether a file with these keys holds a weight in this format."""
        return cls.part(name, cls.MARK) in keys

    @classmethod
    def part(cls, name: str, end: str) -> str:
        """Returns the key of a weight's entry that ends so."""
        return name.removesuffix(cls.STEM) + end

    @classmethod
    def parsed(cls, key: str) -> tuple[str, str] | None:
        """Splits a key into the weight's own and the end of this entry; None for others."""
        found = re.fullmatch(f"(.*?)({cls.PARTS})", key, re.DOTALL)
        return (found[1] + cls.STEM, found[2]) if found else None

    # --- A pytree ------------------------------------------------------------------------

    def tree_flatten_with_keys(self):
        """Returns the arrays with their names, and the static fields."""
        key = jax.tree_util.GetAttrKey
        arrays = [(key(name), getattr(self, name)) for name in self.ARRAYS]
        return arrays, tuple(getattr(self, name) for name in _static(type(self)))

    @classmethod
    def tree_unflatten(cls, static, arrays):
        """Inverts tree_flatten_with_keys."""
        # Past __init__: transformations put bools, shapes and None in place of arrays.
        self = object.__new__(cls)
        names = (*cls.ARRAYS, *_static(cls))
        for name, value in zip(names, (*arrays, *static), strict=True):
            object.__setattr__(self, name, value)
        return self


@functools.cache
def _static(cls: type[PackedWeight]) -> tuple[str, ...]:
    names = (field.name for field in dataclasses.fields(cls))
    return tuple(name for name in names if name not in cls.ARRAYS)


@functools.cache
def _shapes(
    cls: type[W], shape: tuple[int, ...], dtype: str, settings: tuple[tuple, ...]
) -> W:
    dense = jax.ShapeDtypeStruct(shape, dtype)
    return jax.eval_shape(lambda w: cls.quantize(w, **dict(settings)), dense)


def over_stack(one: Callable[[Any], Any], w: PackedWeight) -> Any:
    """Applies a function of one weight to each of a stack; its results are stacked."""
    for _ in w.stack:
        one = jax.vmap(one)
    return one(w)


@functools.partial(jax.jit, static_argnums=1)
def _decode(w: PackedWeight, dtype: str) -> Array:
    return over_stack(lambda one: one.decode_one(dtype), w)
