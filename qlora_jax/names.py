"""Defines what a parameter is called: the one grammar of names (design.md, C9).

A **path** names a parameter of a model in memory, whose layers are stacked, such as
`layers.attn.q_proj.lora_a` and `layers.mlp.experts.up_proj.kernel`. A **numbered name** names
one layer (and expert) of it, as adapters are stored: `layers.3.attn.q_proj.lora_a`,
`layers.3.mlp.experts.7.up_proj.kernel`. Only what lies behind `layers` is stacked, and only
what lies behind `experts` is stacked twice. A **table** maps paths to names that another format
has, with `{}` for the numbers.

Where the layers of a model are of several kinds there is a stack for each, and behind `layers`
a **key** says which layers a stack holds, as a slice does: `layers.5:24:6.attn.q_proj.kernel`
has layers 5, 11, 17 and 23. Without a key a stack holds all of them, from 0 on. Keys exist in
memory alone: no numbered name, table or setting has them (`plain` takes them away).
"""

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

STACK, EXPERTS = "layers", "experts"
EMBEDDING, HEAD = "embed_tokens", "lm_head"
PER_LAYER = "per_layer.embed_tokens_per_layer"
"""The path of the table of per-layer embeddings."""
TABLES = (EMBEDDING, HEAD, PER_LAYER)
"""Modules with a row a token."""

_KEYED = re.compile(rf"{STACK}\.(\d+:\d+(?::\d+)?)(?=\.|$)")

Index = tuple[int, ...]
"""(layer,), (layer, expert), or () of what is not stacked."""


def dotted(path: Sequence[Any]) -> str:
    """Returns a path's keys as one name."""
    return ".".join(map(str, path))


def plain(path: Sequence[Any]) -> str:
    """Returns a path's keys as one name, without the key of a stack."""
    return located(dotted(path))[0]


def is_stacked(path: Sequence[Any]) -> bool:
    """Whether a path, as keys, lies in a stack of layers."""
    return str(path[0]) == STACK


def stack_key(layers: range) -> str:
    """Returns the key of a stack that holds these layers."""
    key = f"{layers.start}:{layers.stop}"
    return key if layers.step == 1 else f"{key}:{layers.step}"


def layers_at(path: Sequence[Any]) -> range | None:
    """Returns the layers that the key in a path, as keys, names; None without one."""
    return located(dotted(path))[1]


def in_words(path: Sequence[Any]) -> str:
    """Returns a path for a message: without the key of a stack, but with its layers."""
    name, layers = located(dotted(path))
    return name if layers is None else f"{name} of layers {stack_key(layers)}"


def located(path: str) -> tuple[str, range | None]:
    """Returns a path without the key of its stack, and the layers that the key names.

    None stands for a path without a key: what is stacked there has all layers.
    """
    found = _KEYED.match(path)
    if found is None:
        return path, None
    layers = range(*map(int, found[1].split(":")))
    return STACK + path[found.end() :], layers


class Numbered(NamedTuple):
    """A path, and which layer and expert of it.

    Attributes:
      path: The path without numbers.
      numbers: () where nothing is numbered.
    """

    path: str
    numbers: Index = ()

    @classmethod
    def parse(cls, name: str) -> "Numbered":
        """Reads a numbered name; numbers stand behind `layers` and `experts` alone."""
        parts, numbers = name.split("."), []
        if parts[0] == STACK:
            for before in (STACK, EXPERTS):
                at = parts.index(before) + 1 if before in parts else len(parts)
                if at == len(parts) or not parts[at].isdigit():
                    break
                numbers.append(int(parts.pop(at)))
        return cls(".".join(parts), tuple(numbers))

    @classmethod
    def at(cls, path: Sequence[Any], index: Index) -> "Numbered":
        """Returns what lies at an index of the stack that a path, as keys, names."""
        name, layers = located(dotted(path))
        if layers is not None and index:
            index = (layers[index[0]], *index[1:])
        return cls(name, index)

    def __str__(self) -> str:
        """Returns the numbered name."""
        parts = self.path.split(".")
        for before, number in zip((STACK, EXPERTS), self.numbers, strict=False):
            parts.insert(parts.index(before) + 1, str(number))
        return ".".join(parts)


def template_of(name: str) -> str:
    """Returns another format's name with `{}` for its numbers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "{}", name)


class Table:
    """What each path is called elsewhere, both ways.

    Wherever a path is taken, one with the key of a stack stands for the layers of that stack.

    Args:
      templates: {path: name}, where `{}` is the layer, and a second one the expert.
      layers: The number of layers of the model.
      experts: The number of experts of a mixture, else 0.
    """

    def __init__(self, templates: Mapping[str, str], layers: int, experts: int = 0):
        self.templates = dict(templates)
        self._sizes = (layers, experts)

    def stack(self, path: str) -> Index:
        """Returns the sizes of a path's stack."""
        name, layers = located(path)
        sizes = self._sizes[: self.templates[name].count("{}")]
        return sizes if layers is None else (len(layers), *sizes[1:])

    def name(self, path: str, index: Index = ()) -> str:
        """Returns what one layer (and expert) of a path is called."""
        place = Numbered.at([path], index)
        return self.templates[place.path].format(*place.numbers)

    def names(self, path: str) -> list[str]:
        """Returns what all of a path is called, in the order of the stack."""
        return [self.name(path, i) for i in self._indices(path)]

    def all(self) -> Iterator[tuple[Numbered, str]]:
        """Yields every parameter and its name."""
        for path in self.templates:
            for index in self._indices(path):
                yield Numbered(path, index), self.name(path, index)

    def _indices(self, path: str) -> Iterator[Index]:
        return itertools.product(*map(range, self.stack(path)))

    def find(self, name: str) -> Numbered | None:
        """Returns the parameter that a name stands for; None if it stands for none here."""
        path = self._paths.get(template_of(name))
        if path is None:
            return None
        index = tuple(int(number) for number in re.findall(r"(?<=\.)\d+(?=\.)", name))
        within = all(i < size for i, size in zip(index, self.stack(path), strict=True))
        return Numbered(path, index) if within else None

    @functools.cached_property
    def _paths(self) -> dict[str, str]:
        return {name: path for path, name in self.templates.items()}
