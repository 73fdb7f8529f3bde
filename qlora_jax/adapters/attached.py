"""What adapter a model has: the config that describes it, and the base that it is of."""

import json
from collections import Counter
from typing import Any

from flax import nnx

from qlora_jax.config.lora import LoRAConfig
from qlora_jax.errors import AdapterMismatchError
from qlora_jax.models.vocabulary import was_tied
from qlora_jax.names import (
    EMBEDDING,
    HEAD,
    is_stacked,
    layers_at,
    plain,
)
from qlora_jax.nn import FrozenLinear, LoRA, LoRAEmbedding, TrainedRows, Weighted
from qlora_jax.nn.frozen import modules
from qlora_jax.nn.variables import trains


def lora_config(model: nnx.Module) -> LoRAConfig:
    """Returns the config that describes a model's attached adapter.

    Targets are the paths that have one.
    """
    tables = {plain(path): node for path, node in modules(model, LoRAEmbedding)}
    adapted = {plain(path): node for path, node in modules(model, LoRA)}
    found: dict[str, LoRA | LoRAEmbedding] = {**tables, **adapted}
    rows = {plain(path): node.tokens for path, node in modules(model, TrainedRows)}
    saved, biased = [], set()
    for path, node in modules(model, Weighted):
        if trains(node.variable):
            saved.append(plain(path))
        elif trains(node.bias):
            biased.add(plain(path).removesuffix(".base"))
    if not (found or rows or saved):
        raise AdapterMismatchError("the model has no adapter")
    one = next(iter(adapted.values()), None)
    default = LoRAConfig()
    rank, alpha = (
        Counter(getattr(node, field) for node in found.values()).most_common(1)[0][0]
        if found
        else getattr(default, field)
        for field in ("rank", "alpha")
    )
    stacked = {path: own for path, own in _places(model).items() if own.adapted}
    named = [own.layers for own in stacked.values()]
    # The layers that describe most linears; not every layer may have each.
    said = lambda layers: sum(own.are(layers) for own in stacked.values())  # noqa: E731
    every = tuple(sorted(set().union(*(own.adapted for own in stacked.values()))))
    layers = max([*named, every] if named else [()], key=said)
    # In layers without adapter biases train too, which lora_only would not say.
    beyond = biased - found.keys() or any(named)
    own_head = getattr(model, HEAD, None) is not None
    untied_head = own_head and was_tied(model) and HEAD not in saved
    tokens = rows.get(EMBEDDING, ())
    return LoRAConfig(
        rank=rank,
        alpha=alpha,
        rslora=next(iter(found.values())).rslora if found else False,
        rank_pattern={p: n.rank for p, n in found.items() if n.rank != rank},
        alpha_pattern={p: n.alpha for p, n in found.items() if n.alpha != alpha},
        dropout=one.dropout if one else 0.0,
        init=one.init if one else "zero",
        dora=one is not None and one.magnitude is not None,
        layers=layers,
        layers_pattern={
            path: ",".join(map(str, own.layers)) or "all"
            for path, own in stacked.items()
            if not own.are(layers)
        },
        bias="none" if not biased else "all" if beyond else "lora_only",
        modules_to_save=tuple(sorted({*saved})),
        tied=not untied_head,
        tokens=tokens,
        head_tokens=rows.get(HEAD, ())
        if own_head and rows.get(HEAD) != tokens
        else None,
        targets=tuple(sorted(found)),
    )


def _places(model: nnx.Module) -> dict[str, "_Places"]:
    """Returns where each of the linears in the layers of a model is."""
    places: dict[str, _Places] = {}
    for path, node in modules(model, FrozenLinear):
        if is_stacked(path):
            places.setdefault(plain(path).removesuffix(".base"), _Places()).add(
                path, node
            )
    for path, node in modules(model, LoRA):
        if is_stacked(path):
            places[plain(path)].adapt(path, node)
    return places


class _Places:
    """The layers of a model that have a linear, and those in which it has an adapter."""

    def __init__(self) -> None:
        self.all: set[int] = set()
        self.adapted: set[int] = set()

    def add(self, path: tuple, node: FrozenLinear) -> None:
        """Counts a linear in a stack of layers."""
        self.all |= {*_layers(path, node)}

    def adapt(self, path: tuple, node: LoRA) -> None:
        """Counts the layers of a stack that have an adapter."""
        only = node.lora_a.get_metadata().get("layers") or _layers(path, node.base)
        self.adapted |= {*only}

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have an adapter, () for all that have the linear."""
        return () if self.adapted == self.all else tuple(sorted(self.adapted))

    def are(self, layers: tuple[int, ...]) -> bool:
        """Whether a config with these layers, () for all, says where the adapters are."""
        return self.adapted == (self.all & {*layers} if layers else self.all)


def _layers(path: tuple, node: FrozenLinear) -> range:
    """Returns the layers of the model that a linear's stack holds."""
    return layers_at(path) or range(node.stack[0] if node.stack else 0)


def base_fingerprint(lora: nnx.State) -> dict[str, Any] | None:
    """Returns the fingerprint of the base that an adapter was attached to."""
    for _, variable in nnx.to_flat_state(lora):
        text = variable.get_metadata().get("base")
        if text is not None:
            return json.loads(text)
    return None
