"""What an adapter is to algebra: one low-rank update a linear, scale * lora_a @ lora_b.

`read` takes adapters apart and refuses what is no such update; `assemble` makes an
adapter of factors that hold their scale, so that alpha equals rank. What combine.py and
algebra.py compute lies between the two.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from qlora_jax.adapters.attached import base_fingerprint
from qlora_jax.adapters.fingerprint import difference
from qlora_jax.adapters.names import WRAPPED_BIAS, stacked_names, uneven, whole
from qlora_jax.adapters.value import Adapter
from qlora_jax.config.lora import LoRAConfig
from qlora_jax.errors import AdapterMismatchError, ConfigError, gathered
from qlora_jax.names import dotted, in_words, is_stacked, layers_at, plain
from qlora_jax.nn.lora import adapter_scale

FACTORS = ("lora_a", "lora_b")
Path = tuple[Any, ...]
Weight = float | Float[Array, ""]
"""A number, or a traced scalar: what is computed is differentiable in it."""


@dataclasses.dataclass(frozen=True)
class Update:
    """The update of one linear, or of a stack of them: scale * lora_a @ lora_b.

    Attributes:
      lora_a: float32 (..., in, rank), zero in layers without adapter.
      lora_b: float32 (..., rank, out), likewise.
      scale: What the product is multiplied by.
      layers: The layers of the stack that have an adapter, () for all.
    """

    lora_a: Float[Array, "*stack in rank"]
    lora_b: Float[Array, "*stack rank out"]
    scale: float
    layers: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        """Columns of lora_a."""
        return self.lora_a.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the update, (..., in, out)."""
        return (*self.lora_a.shape[:-1], self.lora_b.shape[-1])

    @property
    def limit(self) -> int:
        """The rank that no update of this shape can exceed."""
        return min(self.shape[-2:])


Updates = dict[Path, Update]
"""The path of each adapted linear, without numbers of layers -> its update."""


def read(adapters: Sequence[Adapter], *, same_base: bool = True) -> list[Updates]:
    """Takes adapters apart into their updates.

    Args:
      adapters: Adapters of one base.
      same_base: Whether to compare the marks of their bases.

    Returns:
      The updates of each. Stacks that end early, because no layer behind their last one
      has an adapter, are as long as the longest.

    Raises:
      AdapterMismatchError: an adapter trains something besides factors, has NaN or Inf
        values or another rank than its config; bases or shapes differ. Each is named.
    """
    flats = _flats(adapters)
    count = max([1, *map(_layers, flats)])
    parts, problems = [], []
    for number, (adapter, flat) in enumerate(zip(adapters, flats, strict=True)):
        updates, own = _updates(flat, adapter.config, count)
        parts.append(updates)
        problems += [
            f"adapter {number}: {text}" if len(adapters) > 1 else text for text in own
        ]
    if same_base:
        problems += _other_bases(adapters)
    problems += _other_shapes(parts)
    if problems:
        what = (
            "these adapters cannot be"
            if len(adapters) > 1
            else "this adapter cannot be"
        )
        raise AdapterMismatchError(gathered(f"{what} computed with", problems))
    return parts


def assemble(
    factors: Mapping[Path, tuple[Array, Array]],
    adapters: Sequence[Adapter],
    *,
    init: str | None = None,
) -> Adapter:
    """Makes an adapter of factors whose product is the update.

    Args:
      factors: The path of each linear -> lora_a and lora_b.
      adapters: What the factors were made of. The first gives the base's mark and what
        the config says besides shape and place; together they give the layers.
      init: The init in the result's config; None takes the first adapter's.

    Returns:
      An adapter with alpha equal to rank in every linear, so that its scale is 1.
    """
    flats = _flats(adapters)
    templates = {path: v for flat in reversed(flats) for path, v in flat.items()}
    places = {path: _places(path, adapters, flats) for path in factors}
    factors = _of_one_rank(factors)
    marks = filter(None, (base_fingerprint(adapter.lora) for adapter in adapters))
    if init == "zero":  # which fits its base however that is held
        marks = ({k: v for k, v in x.items() if k != "scales"} for x in marks)
    base = next(map(json.dumps, marks), None)
    entries = []
    for path, pair in factors.items():
        for name, array in zip(FACTORS, pair, strict=True):
            variable = templates[*path, name].replace(array)
            variable.set_metadata(base=base)
            if "layers" in variable.get_metadata():
                stacked = _stacked(path, array)
                variable.set_metadata(layers=places[path].have if stacked else ())
            entries.append(((*path, name), variable))
    ranks = {plain(path): a.shape[-1] for path, (a, _) in factors.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: r for name, r in sorted(ranks.items()) if r != rank}
    asked: dict[str, tuple[int, ...]] = {}
    for (
        path,
        place,
    ) in places.items():  # each layer has a path where they differ in shape
        before = asked.get(plain(path), place.asked)
        if place.stacked:
            both = before and place.asked
            asked[plain(path)] = tuple(sorted({*before, *place.asked})) if both else ()
    layers = Counter(asked.values()).most_common(1)[0][0] if asked else ()
    first = adapters[0].config
    config = dataclasses.replace(
        first,
        rank=rank,
        alpha=float(rank),
        rslora=False,
        rank_pattern=others,
        alpha_pattern={name: float(r) for name, r in others.items()},
        targets=tuple(sorted(ranks)),
        layers=layers,
        layers_pattern={
            name: ",".join(map(str, own)) or "all"
            for name, own in sorted(asked.items())
            if own != layers
        },
        dora=False,
        bias="none",
        modules_to_save=(),
        tied=all(adapter.config.tied for adapter in adapters),
        init=first.init if init is None else init,
    )
    return Adapter(nnx.from_flat_state(entries), config)


def union(parts: Sequence[Updates]) -> list[Path]:
    """Returns the paths of the linears that any of some adapters has, in order."""
    return sorted({path for part in parts for path in part}, key=dotted)


def having(
    path: Path, parts: Sequence[Updates], weights: Sequence[Weight]
) -> list[tuple[Update, Weight]]:
    """Returns the updates that adapters have at a path, and these adapters' weights."""
    pairs = zip(parts, weights, strict=True)
    return [(part[path], weight) for part, weight in pairs if path in part]


def layer_names(path: Path, update: Update) -> dict[str, Path]:
    """Returns {dotted name of a linear: index in the stack}, layers numbered.

    Layers without adapter are left out.
    """
    layers = update.layers
    stack = len(update.shape) - 2
    variable = nnx.LoRAParam(update.lora_a, stack=stack, layers=layers if stack else ())
    names = stacked_names((*path, FACTORS[0]), variable)
    return {name.removesuffix(f".{FACTORS[0]}"): i for name, i in names.items()}


def concrete(values: Any) -> bool:
    """Whether values can be looked at: none is a tracer or a shape alone."""
    hidden = (jax.core.Tracer, jax.ShapeDtypeStruct)
    return not any(isinstance(leaf, hidden) for leaf in jax.tree.leaves(values))


def check_init(adapters: Sequence[Adapter], weights: Sequence[Any]) -> None:
    """Checks that a weighted sum keeps what adapters hold of their base.

    An adapter with another init than zero holds the part of the weights that
    quantization lost. A sum holds it once only if the weights sum to 1.

    Raises:
      ConfigError: it would hold it another number of times, or parts of different kinds.
    """
    inits = [adapter.config.init for adapter in adapters]
    if set(inits) == {"zero"}:
        return
    why = "holds the part of the base that quantization lost"
    held = next(init for init in inits if init != "zero")
    if len(set(inits)) > 1:
        raise ConfigError(
            f"the adapters began differently (init {', '.join(inits)}), and one with init "
            f"{held} {why}: a sum would hold a fraction of it. Combine adapters of one init"
        )
    if not concrete(list(weights)):
        raise ConfigError(
            f"an adapter with init {held} {why}, so weights must sum to 1, which cannot "
            "be seen while jax traces them; give numbers"
        )
    total = math.fsum(map(float, weights))
    if abs(total - 1) > 1e-6:
        raise ConfigError(
            f"the weights sum to {total:g}, and an adapter with init {held} {why}: the "
            f"result would hold it {total:g} times. Give weights that sum to 1"
        )


_Flat = dict[Path, nnx.Variable]


def _flats(adapters: Sequence[Adapter]) -> list[_Flat]:
    """Returns the parameters of adapters, their layers grouped alike."""
    apart = uneven(adapter.lora for adapter in adapters)
    return [dict(nnx.to_flat_state(whole(a.lora, apart))) for a in adapters]


def _of_one_rank(
    factors: Mapping[Path, tuple[Array, Array]],
) -> dict[Path, tuple[Array, Array]]:
    """Pads what stacks of one linear have less rank with zeros, which add nothing."""
    ranks: dict[str, int] = {}
    for path, (a, _) in factors.items():
        ranks[plain(path)] = max(a.shape[-1], ranks.get(plain(path), 0))

    def padded(path: Path, a: Array, b: Array) -> tuple[Array, Array]:
        if not (more := ranks[plain(path)] - a.shape[-1]):
            return a, b
        stack = [(0, 0)] * (a.ndim - 2)
        return (
            jnp.pad(a, [*stack, (0, 0), (0, more)]),
            jnp.pad(b, [*stack, (0, more), (0, 0)]),
        )

    return {path: padded(path, *pair) for path, pair in factors.items()}


def _updates(flat: _Flat, config: LoRAConfig, count: int) -> tuple[Updates, list[str]]:
    problems = [
        f"{_plain(path)} is no low-rank update ({_kind(path)}); merge it, or train without"
        for path in flat
        if path[-1] not in FACTORS
    ]
    updates: Updates = {}
    for path in dict.fromkeys(path[:-1] for path in flat if path[-1] in FACTORS):
        name = plain(path)
        pair = [flat[*path, x] for x in FACTORS if (*path, x) in flat]
        if len(pair) < len(FACTORS):
            problems.append(f"{name} has not both of {' and '.join(FACTORS)}")
            continue
        rank, alpha = config.shape_of(name)
        layers = _own_layers(pair[0]) or config.layers_of(name)
        if layers_at(path) is not None:  # one layer by itself
            layers = ()
        a, b = (_whole(path, v.get_value(), layers, count) for v in pair)
        if not a.shape[-1] == b.shape[-2] == rank:
            problems.append(
                f"{name}: the factors have ranks {a.shape[-1]} and {b.shape[-2]}, the "
                f"config says {rank}"
            )
        problems += [
            f"{name}.{factor} has NaN or Inf values"
            for factor, x in zip(FACTORS, (a, b), strict=True)
            if concrete(x) and not np.isfinite(np.asarray(x)).all()
        ]
        scale = adapter_scale(rank, alpha, config.rslora)
        updates[path] = Update(a, b, scale, layers)
    if not updates and not problems:
        problems.append("it has no factors of linears")
    return updates, problems


def _whole(path: Path, x: Array, layers: tuple[int, ...], count: int) -> Array:
    """Returns a factor in float32, zero in layers without adapter, up to the last layer."""
    x = jnp.asarray(x, jnp.float32)
    if not layers or not _stacked(path, x):
        return x
    keep = jnp.asarray([i in layers for i in range(len(x))])
    x = jnp.where(keep.reshape(-1, *[1] * (x.ndim - 1)), x, 0)
    return jnp.pad(x, [(0, count - len(x)), *[(0, 0)] * (x.ndim - 1)])


def _stacked(path: Path, factor: Any) -> bool:
    """Whether a factor is of all layers, one after the other."""
    stacked = is_stacked(path) and len(factor.shape) > 2
    return stacked and layers_at(path) is None


def _layers(flat: _Flat) -> int:
    """Returns the length of an adapter's longest stack."""
    lengths = (
        variable.get_value().shape[0]
        for path, variable in flat.items()
        if path[-1] in FACTORS and _stacked(path, variable.get_value())
    )
    return max(lengths, default=0)


class _Places(NamedTuple):
    """The layers that a linear of a result is in.

    Attributes:
      have: The layers that have a part, () for all of a stack.
      asked: What the config says of them: () for all layers that have the linear at all.
      stacked: Whether the linear is in layers.
    """

    have: tuple[int, ...]
    asked: tuple[int, ...]
    stacked: bool


def _places(path: Path, adapters: Sequence[Adapter], flats: Sequence[_Flat]) -> _Places:
    """Returns the layers that any of some adapters has a linear's part in."""
    have: set[int] = set()
    for adapter, flat in zip(adapters, flats, strict=True):
        variable = flat.get((*path, FACTORS[0]))
        if variable is None:
            continue
        if not is_stacked(path) or variable.get_value().ndim < 3:
            return _Places((), (), False)
        own = _own_layers(variable)
        if not adapter.config.layers_of(plain(path)):
            return _Places(own, (), True)
        have |= {*(own or layers_at(path) or adapter.config.layers_of(plain(path)))}
    layers = tuple(sorted(have))
    return _Places(layers, layers, True)


def _own_layers(variable: nnx.Variable) -> tuple[int, ...]:
    """Returns the layers that a parameter is of, () for all of its stack's."""
    return tuple(variable.get_metadata().get("layers") or ())


def _other_bases(adapters: Sequence[Adapter]) -> list[str]:
    marks = [(i, base_fingerprint(adapter.lora)) for i, adapter in enumerate(adapters)]
    known = [(i, mark) for i, mark in marks if mark is not None]
    problems = []
    for i, mark in known[1:]:
        if text := difference(known[0][1], mark):
            problems.append(f"adapter {i} against adapter {known[0][0]}: {text}")
    return problems


def _other_shapes(parts: Sequence[Updates]) -> list[str]:
    problems = []
    for path in union(parts):
        shapes = {i: part[path].shape for i, part in enumerate(parts) if path in part}
        if len(set(shapes.values())) > 1:
            said = ", ".join(f"{shape} in adapter {i}" for i, shape in shapes.items())
            problems.append(f"{in_words(path)}: updates of other shapes, {said}")
    return problems


def _kind(path: Path) -> str:
    if path[-1] == "magnitude":
        return "DoRA's magnitudes"
    if path[-1] == "rows":
        return "rows of tokens"
    return "a bias that trained" if path[-1] == "bias" else "a module that trained"


def _plain(path: Path) -> str:
    wrapped = path[-2:] == WRAPPED_BIAS
    return dotted((*path[:-2], path[-1]) if wrapped else path)
