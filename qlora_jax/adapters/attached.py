"""What adapter a model has: the config that describes it, and the base that it is of."""

import json
from collections import Counter
from typing import Any

from flax import nnx

from qlora_jax.config.lora import LoRAConfig
from qlora_jax.errors import AdapterMismatchError
from qlora_jax.models import Decoder
from qlora_jax.names import (
    EMBEDDING,
    HEAD,
    is_stacked,
    layers_at,
    plain,
)
from qlora_jax.nn import (
    Embedding,
    Linear,
    LoRA,
    LoRAEmbedding,
    QuantizedLinear,
    TrainedRows,
)
from qlora_jax.nn.norm import RMSNorm
from qlora_jax.nn.variables import trains

OWN = {Linear: "kernel", Embedding: "weight", RMSNorm: "weight"}
"""Modules that can train in full, and the parameter that does."""


def lora_config(model: nnx.Module) -> LoRAConfig:
    """Returns the config that describes a model's attached adapter.

    Targets are the paths that have one.
    """
    found: dict[str, LoRA | LoRAEmbedding] = {}
    rows: dict[str, tuple[int, ...]] = {}
    saved, biased = [], set()
    places: dict[str, _Places] = {}
    for path, node in nnx.iter_graph(model):
        name = plain(path)
        if isinstance(node, (LoRA, LoRAEmbedding)):
            found[name] = node
        if isinstance(node, (Linear, QuantizedLinear, LoRA)) and is_stacked(path):
            places.setdefault(name, _Places()).add(path, node)
        if isinstance(node, TrainedRows):
            rows[name] = node.tokens
        if type(node) in OWN and trains(getattr(node, OWN[type(node)])):
            saved.append(name)
        elif isinstance(node, (Linear, QuantizedLinear)) and trains(node.bias):
            biased.add(name.removesuffix(".base"))
    if not (found or rows or saved):
        raise AdapterMismatchError("the model has no adapter")
    linears = [node for node in found.values() if isinstance(node, LoRA)]
    one = linears[0] if linears else None
    default = LoRAConfig()
    rank, alpha = (
        Counter(getattr(node, field) for node in found.values()).most_common(1)[0][0]
        if found
        else getattr(default, field)
        for field in ("rank", "alpha")
    )
    stacked = {path: own for path, own in places.items() if own.adapted}
    named = [own.layers for own in stacked.values()]
    # The layers that describe most linears; not every layer may have each.
    said = lambda layers: sum(own.are(layers) for own in stacked.values())  # noqa: E731
    every = tuple(sorted(set().union(*(own.adapted for own in stacked.values()))))
    layers = max([*named, every] if named else [()], key=said)
    # In layers without adapter biases train too, which lora_only would not say.
    beyond = biased - found.keys() or any(named)
    own_head = getattr(model, HEAD, None) is not None
    untied_head = isinstance(model, Decoder) and (
        model.config.tie_word_embeddings and own_head and HEAD not in saved
    )
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


class _Places:
    """The layers of a model that have a linear, and those in which it has an adapter."""

    def __init__(self) -> None:
        self.all: set[int] = set()
        self.adapted: set[int] = set()

    def add(self, path: tuple, node: Linear | QuantizedLinear | LoRA) -> None:
        """Counts a linear in a stack of layers."""
        stack = (node.base if isinstance(node, LoRA) else node).stack
        layers = layers_at(path) or range(stack[0] if stack else 0)
        self.all |= {*layers}
        if isinstance(node, LoRA):
            only = node.lora_a.get_metadata().get("layers") or layers
            self.adapted |= {*only}

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have an adapter, () for all that have the linear."""
        return () if self.adapted == self.all else tuple(sorted(self.adapted))

    def are(self, layers: tuple[int, ...]) -> bool:
        """Whether a config with these layers, () for all, says where the adapters are."""
        return self.adapted == (self.all & {*layers} if layers else self.all)


def base_fingerprint(lora: nnx.State) -> dict[str, Any] | None:
    """Returns the fingerprint of the base that an adapter was attached to."""
    for _, variable in nnx.to_flat_state(lora):
        text = variable.get_metadata().get("base")
        if text is not None:
            return json.loads(text)
    return None
