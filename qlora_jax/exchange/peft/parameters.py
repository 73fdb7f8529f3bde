"""Adapters of whole parameters: PEFT's `target_parameters`, of which experts have one each.

transformers holds a linear of all experts of a layer, or gate and up of all of them, as one
parameter. PEFT puts one pair of factors on it, with an axis of experts inside (0.21.2,
tuners/lora/layer.py, ParamWrapper):

    lora_A.weight (experts * rank, in): the rank of an expert after that of the one before
    lora_B.weight (out, rank * experts): the experts of a rank after those of the one before

Of two parameters of one module the first is inside: its factors are `base_layer.lora_A` and
`base_layer.lora_B`. Here each expert's linear has factors of its own.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from qlora_jax.exchange.peft.settings import matched
from qlora_jax.models.fused import Fused
from qlora_jax.names import template_of

PREFIX = "base_model.model."
_FACTOR = re.compile(
    rf"{re.escape(PREFIX)}(.+?)((?:\.base_layer)*)\.lora_([AB])(?:\.default)?\.weight"
)


class Apart(NamedTuple):
    """A PEFT folder whose adapters of parameters are such of single experts.

    Attributes:
      settings: Its settings, without target_parameters.
      tensors: Its tensors.
      modules: The linears, by Hugging Face's names, that such adapters were on: those of
        experts, and others whose weights are named as parameters.
      problems: Why an adapter of a parameter cannot be read.
    """

    settings: dict[str, Any]
    tensors: dict[str, np.ndarray]
    modules: set[str]
    problems: list[str]


def apart(
    settings: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    fused: Iterable[Fused],
    experts: int,
) -> Apart:
    """Returns a folder with factors for each expert's linear.

    Args:
      settings: The folder's settings.
      tensors: Its tensors.
      fused: The parameters that transformers holds whole in models of the family.
      experts: The number of experts.
    """
    made = Apart(dict(settings), {}, set(), [])
    targets = made.settings.pop("target_parameters", None) or ()
    if not targets:
        return made._replace(tensors=dict(tensors))
    fused, shapes = list(fused), {}
    unread = {*targets}
    for name, array in tensors.items():
        found = _FACTOR.fullmatch(name)
        if found is None:
            made.tensors[name] = array
            continue
        if not (inside := _targeted(found[1], targets, fused)):
            made.tensors[name] = array
            weight = f"{found[1]}.weight"
            if named := {t for t in targets if _names(t, weight)}:
                unread -= named
                made.modules.add(found[1])
                shapes[found[1]] = _shape(settings, weight)
            continue
        depth = found[2].count(".base_layer")
        if depth >= len(inside):
            made.problems.append(f"{name}: target_parameters names no parameter for it")
            continue
        one, whole = inside[-1 - depth]
        unread -= {t for t in unread if _names(t, whole)}
        rank, alpha = _shape(settings, whole)
        axis = 0 if found[3] == "A" else 1
        if array.ndim != 2 or array.shape[axis] != experts * rank:
            made.problems.append(
                f"{name} has shape {array.shape}, expected rank {rank} of each of {experts} "
                f"experts in axis {axis}"
            )
            continue
        layer = re.search(r"\d+", whole)
        assert layer is not None
        for module, part in _parts(one, int(layer[0]), found[3], array, experts):
            made.modules.add(module)
            made.tensors[f"{PREFIX}{module}.lora_{found[3]}.weight"] = part
            shapes[module] = rank, alpha
    made.problems.extend(
        f"target_parameters names {target}, of which there are no factors"
        for target in sorted(unread)
    )
    _add_shapes(made.settings, shapes)
    return made


def _shape(settings: Mapping[str, Any], parameter: str) -> tuple[Any, Any]:
    """Returns the rank and alpha of a parameter."""
    keys = ("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")
    rank, alpha = (matched(settings.get(a), parameter, settings[b]) for a, b in keys)
    return rank, alpha


def _names(target: str, parameter: str) -> bool:
    return parameter == target or parameter.endswith(f".{target}")


def _targeted(
    module: str, targets: Iterable[str], fused: Iterable[Fused]
) -> list[tuple[Fused, str]]:
    """Returns the parameters of a module that have adapters, in their order."""
    whole = [
        (one, f"{module}.{one.name.rpartition('.')[2]}")
        for one in fused
        if template_of(f"{module}.") == f"{one.name.rpartition('.')[0]}."
    ]
    return [(one, name) for one, name in whole if any(_names(t, name) for t in targets)]


def _parts(
    one: Fused, layer: int, factor: str, array: np.ndarray, experts: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields each expert's linears with their part of a factor."""
    for expert in range(experts):
        if factor == "A":
            own = array.reshape(experts, -1, array.shape[1])[expert]
        else:
            own = array.reshape(array.shape[0], -1, experts)[:, :, expert]
        for i, part in enumerate(one.parts):
            module = part.format(layer, expert).removesuffix(".weight")
            yield module, own if factor == "A" else own[one.rows(i, len(own))]


def _add_shapes(
    settings: dict[str, Any], shapes: Mapping[str, tuple[Any, Any]]
) -> None:
    """Says the rank and alpha of experts' linears, by patterns where layers are alike."""
    kinds: dict[str, set[tuple[Any, Any]]] = {}
    for module, shape in shapes.items():
        kinds.setdefault(template_of(module), set()).add(shape)
    for at, key in enumerate(("rank_pattern", "alpha_pattern")):
        said = {
            re.sub(r"\\\{\\\}", r"\\d+", re.escape(kind)): next(iter(found))[at]
            for kind, found in kinds.items()
            if len(found) == 1
        }
        said |= {
            module: shape[at]
            for module, shape in shapes.items()
            if len(kinds[template_of(module)]) > 1
        }
        settings[key] = said | (settings.get(key) or {})


class Whole(NamedTuple):
    """Adapters of experts as such of whole parameters.

    Attributes:
      tensors: The factors by PEFT's names.
      parameters: The parameters, by their whole names.
      parts: For each kind of parameter the linears in it that have an adapter; its rank and
        alpha are so many times an expert's.
    """

    tensors: dict[str, np.ndarray]
    parameters: list[str]
    parts: dict[str, int]


def whole(
    factors: Mapping[str, tuple[np.ndarray, np.ndarray]],
    fused: Iterable[Fused],
    experts: int,
) -> Whole:
    """Returns adapters of all experts of a layer together.

    Args:
      factors: lora_a (in, rank) and lora_b (rank, out) of each expert's linear, by Hugging
        Face's name; ranks are alike.
      fused: The parameters that transformers holds whole in models of the family.
      experts: The number of experts.
    """
    made = Whole({}, [], {})
    pairs: dict[str, list[tuple[Fused, np.ndarray, np.ndarray]]] = {}
    for one in fused:
        have = {i for i, part in enumerate(one.parts) if _has(factors, part)}
        if not have:
            continue
        made.parts[one.name] = len(have)
        layers = {
            int(number[0])
            for name in factors
            if template_of(f"{name}.weight") in one.parts
            and (number := re.search(r"\d+", name))
        }
        for layer in sorted(layers):
            a, b = _joined(factors, one, have, layer, experts)
            parameter = one.name.format(layer)
            made.parameters.append(parameter)
            pairs.setdefault(parameter.rpartition(".")[0], []).append((one, a, b))
    for module, found in pairs.items():
        for depth, (_, a, b) in enumerate(reversed(found)):
            place = f"{PREFIX}{module}{'.base_layer' * depth}"
            made.tensors[f"{place}.lora_A.weight"] = a
            made.tensors[f"{place}.lora_B.weight"] = b
    return made


def _has(factors: Mapping[str, Any], part: str) -> bool:
    return any(template_of(f"{name}.weight") == part for name in factors)


def _joined(
    factors: Mapping[str, tuple[np.ndarray, np.ndarray]],
    one: Fused,
    have: set[int],
    layer: int,
    experts: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns PEFT's pair of a parameter: each part has a share of the rank to itself."""
    lefts, rights = [], []
    for expert in range(experts):
        names = [one.parts[i].format(layer, expert) for i in sorted(have)]
        own = [factors[name.removesuffix(".weight")] for name in names]
        rank, out = own[0][1].shape
        b = np.zeros((out * len(one.parts), rank * len(own)), np.float32)
        for at, (i, (_, right)) in enumerate(zip(sorted(have), own, strict=True)):
            b[one.rows(i, len(b)), at * rank : (at + 1) * rank] = right.T
        lefts.append(np.concatenate([left.T for left, _ in own]))
        rights.append(b)
    stacked = np.stack(rights, axis=-1)
    return np.concatenate(lefts), stacked.reshape(stacked.shape[0], -1)
