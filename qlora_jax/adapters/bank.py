"""AdapterBank: several adapters on one base at once, and which row of a batch takes which.

    bank = AdapterBank.of(model, {"a": a, "b": b}, slots=8)
    new = generate(bank.route(["a", None, "b"]), prompts)    # None: the base alone
    bank = bank.put("c", c)                                  # compiles nothing new

What is compiled depends on how many slots there are, their rank and the linears that have
them, not on which adapters are in them or which rows take them.
"""

import dataclasses
import difflib
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from qlora_jax.adapters.value import Adapter
from qlora_jax.errors import AdapterMismatchError, ConfigError, gathered
from qlora_jax.names import EXPERTS, in_words, plain
from qlora_jax.nn import FrozenLinear, LoRA
from qlora_jax.nn.dora import row_norms
from qlora_jax.nn.frozen import modules, replaced
from qlora_jax.nn.multi_lora import MultiLoRA, Slots
from qlora_jax.nn.variables import trains

BASE = "base"
"""What rows call the base alone, and so the name of no adapter."""


class _Part(NamedTuple):
    """What an adapter has for one linear, with the leading axes of a stack."""

    a: Array | None
    b: Array | None
    scale: float
    gain: Array | None
    bias: Array | None

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[-1]


_Parts = dict[tuple, _Part]


@dataclasses.dataclass(frozen=True)
class AdapterBank:
    """A base with slots for adapters. Values: `put`, `remove` and `route` make new ones.

    Attributes:
      base: The model without adapters.
      model: The base with MultiLoRA in place of adapted linears; it shares the base's
        arrays.
      names: What is in each slot; None where nothing is.
    """

    base: Any
    model: Any
    names: tuple[str | None, ...]

    @classmethod
    def of(
        cls,
        base: Any,
        adapters: Mapping[str, Adapter],
        *,
        slots: int | None = None,
        rank: int | None = None,
    ) -> "AdapterBank":
        """Puts adapters into the slots of a new bank.

        Linears get slots where any of the adapters has a part. Ranks, targets, alphas,
        DoRA and trained biases may differ between adapters.

        Args:
          base: A model without adapters; it is left as it was.
          adapters: The adapters, by the names that rows choose them by.
          slots: The number of adapters that there is room for; None makes room for those
            given. Give more to `put` others in later without compiling again.
          rank: The highest rank that fits; None for the highest of the adapters, which each
            linear has for itself.

        Raises:
          ConfigError: no adapters, too few slots, or a name that is not free.
          AdapterMismatchError: an adapter is of another base, has NaN or Inf values, a
            higher rank, or parts that rows cannot choose (embeddings, experts, token
            rows, modules that trained in full); all are named.
        """
        slots = len(adapters) if slots is None else slots
        if not adapters:
            raise ConfigError("a bank needs at least one adapter to know its linears")
        if slots < len(adapters):
            raise ConfigError(f"{len(adapters)} adapters do not fit into {slots} slots")
        _check_names(adapters)
        parts, problems = {}, []
        for name, adapter in adapters.items():
            try:
                parts[name] = _parts(base, adapter)
            except (AdapterMismatchError, ConfigError) as error:
                problems.append(f"{name}: {error}")
        if problems:
            raise AdapterMismatchError(
                gathered("the adapters cannot share this base", problems)
            )
        dtype = str(getattr(base, "dtype", "float32"))

        def replace(path: tuple, node: FrozenLinear) -> nnx.Module:
            found = [own[path] for own in parts.values() if path in own]
            if not found:
                return node
            return MultiLoRA(
                node,
                slots=slots,
                rank=max(part.rank for part in found) if rank is None else rank,
                gain=any(part.gain is not None for part in found),
                bias=any(part.bias is not None for part in found),
                dtype=dtype,
            )

        bank = cls(base, replaced(base, FrozenLinear, replace), (None,) * slots)
        for name, own in parts.items():
            bank = bank._with(name, own)
        return bank

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names that rows may choose."""
        return tuple(name for name in self.names if name is not None)

    def put(self, name: str, adapter: Adapter) -> "AdapterBank":
        """Puts an adapter into a free slot, or in place of the one of its name.

        Raises:
          ConfigError: no slot is free, or the name is not.
          AdapterMismatchError: as `of`; or its rank, or a linear of it, has no room here.
        """
        _check_names([name])
        if name not in self.names and None not in self.names:
            raise ConfigError(
                f"all {len(self.names)} slots are taken, by {', '.join(self.adapters)}; "
                "remove one, or make a bank with more slots"
            )
        return self._with(name, _parts(self.base, adapter))

    def remove(self, name: str) -> "AdapterBank":
        """Frees an adapter's slot.

        Raises:
          ConfigError: there is none of this name.
        """
        slot = self._slot(name)
        names = (*self.names[:slot], None, *self.names[slot + 1 :])
        return dataclasses.replace(self, names=names)

    def route(self, rows: str | None | Sequence[str | None]) -> Any:
        """Returns the model for a batch whose rows take these adapters.

        Args:
          rows: A name for each row of the batch, None or 'base' for the base alone; or
            one for all rows of batches of any size.

        Raises:
          ConfigError: there is no adapter of a name; all are named.
        """
        rows = [rows] if rows is None or isinstance(rows, str) else list(rows)
        slot_of = {name: i for i, name in enumerate(self.names) if name is not None}
        slot_of |= {BASE: len(self.names)}
        named = [BASE if row is None else row for row in rows]
        if unknown := [name for name in dict.fromkeys(named) if name not in slot_of]:
            raise ConfigError("; ".join(map(self._no_adapter, unknown)))
        slots = [slot_of[name] for name in named]
        chosen = jnp.asarray(slots, jnp.int32)
        graphdef, old, rest = nnx.split(self.model, Slots, ...)
        new = [
            (
                path,
                v.replace(jnp.broadcast_to(chosen, (*v[...].shape[:-1], len(slots)))),
            )
            for path, v in nnx.to_flat_state(old)
        ]
        return nnx.merge(graphdef, nnx.from_flat_state(new), rest)

    def _slot(self, name: str) -> int:
        if name not in self.names:
            raise ConfigError(self._no_adapter(name))
        return self.names.index(name)

    def _no_adapter(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.adapters, n=1)
        hint = f"did you mean {near[0]}?" if near else ", ".join((BASE, *self.adapters))
        return f"no adapter {name!r}; " + (hint if near else f"there are {hint}")

    def _with(self, name: str, parts: _Parts) -> "AdapterBank":
        """Fills the adapter's slot; linears that it has no part of get zeros."""
        slot = self.names.index(name if name in self.names else None)
        nodes = dict(modules(self.model, MultiLoRA))
        problems = [
            f"{in_words(path)}: {problem}"
            for path, part in parts.items()
            if (problem := _no_room(nodes.get(path), part))
        ]
        if problems:
            raise AdapterMismatchError(
                gathered(f"{name} does not fit into this bank", problems)
            )
        graphdef, state = nnx.split(self.model)
        flat = dict(nnx.to_flat_state(state))
        new: dict[tuple, Any] = {}
        for path, node in nodes.items():
            part = parts.get(path, _Part(None, None, 0.0, None, None))
            new |= {(*path, key): x for key, x in _values(node, part).items()}
        old = {path: flat[path].get_value() for path in new}
        depths = tuple(len(nodes[path[:-1]].base.stack) for path in new)
        values = _put(list(old.values()), list(new.values()), slot, depths)
        for path, value in zip(new, values, strict=True):
            flat[path] = flat[path].replace(value)
        names = (*self.names[:slot], name, *self.names[slot + 1 :])
        model = nnx.merge(graphdef, nnx.from_flat_state(list(flat.items())))
        return dataclasses.replace(self, model=model, names=names)


def _check_names(names: Any) -> None:
    if wrong := [name for name in names if name in (BASE, "")]:
        raise ConfigError(
            f"{wrong[0]!r} is no name for an adapter: it means the base alone"
        )


def _parts(base: Any, adapter: Adapter) -> _Parts:
    """Returns what an adapter has for each linear of a base."""
    if nnx.to_flat_state(nnx.state(base, nnx.LoRAParam)):
        raise AdapterMismatchError(
            "the model has an adapter of its own; give the base without it"
        )
    wrong = [
        plain(path)
        for path, variable in nnx.to_flat_state(adapter.lora)
        if not np.isfinite(np.asarray(variable[...])).all()
    ]
    if wrong:
        raise AdapterMismatchError(f"{', '.join(wrong)}: NaN or Inf values")
    model = adapter.on(base)
    parts: _Parts = {}
    covered: set[tuple] = set()
    for path, node in modules(model, LoRA):
        if EXPERTS not in path:
            parts[path] = _part(node)
            covered |= {(*path, name) for name in node.PARTS}
            covered.add((*path, "base", "bias"))
    for path, node in modules(model, FrozenLinear):
        alone = path[:-1] not in parts and EXPERTS not in path
        if alone and trains(node.bias):
            parts[path] = _Part(None, None, 0.0, None, node.bias[...])
            covered.add((*path, "bias"))
    left = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
    problems = sorted({plain(path[:-1]) for path, _ in left if path not in covered})
    if problems:
        raise AdapterMismatchError(
            f"rows of a batch cannot choose {', '.join(problems)}: only adapters and biases "
            "of linears can differ by row; merge this adapter, or use it alone"
        )
    return parts


def _part(node: LoRA) -> _Part:
    """Returns what an adapter has for one linear."""
    a, b, magnitude, active = node.factors
    assert a is not None and b is not None
    if active is not None:
        b = b * active[..., None, None]
    gain = None
    if magnitude is not None:
        gain = magnitude / row_norms(node.base, a, b, node.scale)
        if active is not None:
            gain = jnp.where(active[..., None] > 0, gain, 1.0)
    bias = node.base.bias[...] if trains(node.base.bias) else None
    return _Part(a, b, node.scale, gain, bias)


def _no_room(node: MultiLoRA | None, part: _Part) -> str | None:
    """Says why a part does not fit into a linear's slots."""
    if node is None:
        return "no adapter of the bank had one here"
    if part.rank > node.rank:
        return f"rank {part.rank}, there is room for {node.rank}"
    if part.gain is not None and node.gain is None:
        return "DoRA, and no adapter of the bank had it"
    if part.bias is not None and node.bias is None:
        return "a trained bias, and no adapter of the bank had one"
    return None


def _values(node: MultiLoRA, part: _Part) -> dict[str, Any]:
    """Returns what goes into one slot of each array of a linear; numbers are for all of it."""
    values = {
        "lora_a": 0.0 if part.a is None else part.a,
        "lora_b": 0.0 if part.b is None else part.b,
        "scale": part.scale,
    }
    if node.gain is not None:
        values["gain"] = 1.0 if part.gain is None else part.gain
    if node.bias is not None:
        own = 0.0 if node.base.bias is None else node.base.bias[...]
        values["bias"] = own if part.bias is None else part.bias
    return values


@functools.partial(jax.jit, static_argnums=3)
def _put(
    banks: list[Array], values: list[Any], slot: Array, depths: tuple[int, ...]
) -> list[Array]:
    """Replaces one slot of each (*stack, slots, ...); lower ranks are filled with zeros."""

    def one(bank: Array, value: Any, depth: int) -> Array:
        shape = (*bank.shape[:depth], *bank.shape[depth + 1 :])
        value = jnp.asarray(value, bank.dtype)
        if value.ndim:
            short = [(0, n - m) for n, m in zip(shape, value.shape, strict=True)]
            value = jnp.pad(value, short)
        value = jnp.broadcast_to(value, shape)
        return jax.lax.dynamic_update_index_in_dim(bank, value, slot, depth)

    return [one(*each) for each in zip(banks, values, depths, strict=True)]
