"""How a parameter is called: the one grammar of names (design.md, C9).

A **path** names a parameter of a model in memory, whose layers are stacked, such as
`layers.attn.q_proj.lora_a` and `layers.mlp.experts.up_proj.kernel`. A **numbered name** names
one layer (and expert) of it, as adapters are stored: `layers.3.attn.q_proj.lora_a`,
`layers.3.mlp.experts.7.up_proj.kernel`. Only what lies behind `layers` is stacked, and only
what lies behind `experts` is stacked twice. A **table** maps paths to names that another format
has, with `{}` for the numbers.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

STACK, EXPERTS = "layers", "experts"
EMBEDDING, HEAD = "embed_tokens", "lm_head"

Index = tuple[int, ...]
"""(layer,), (layer, expert), or () of what is not stacked."""


def dotted(path: Sequence[Any]) -> str:
    """Returns a path's keys as one name."""
    return ".".join(map(str, path))


def is_stacked(path: Sequence[Any]) -> bool:
    """Whether a path, as keys, lies in the stack of layers."""
    return str(path[0]) == STACK


class Numbered(NamedTuple):
    """A path, and which layer and expert of it.

    Attributes:
      path: Without numbers.
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
    def first(cls, path: str) -> "Numbered":
        """Returns the first layer (and expert) of a path, numbered where it is stacked."""
        parts = path.split(".")
        if parts[0] != STACK:
            return cls(path)
        return cls(path, (0, 0) if EXPERTS in parts else (0,))

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

    Args:
      templates: {path: name}, where `{}` is the layer, and a second one the expert.
      layers: Of the model.
      experts: Of a mixture, else 0.
    """

    def __init__(self, templates: Mapping[str, str], layers: int, experts: int = 0):
        self.templates = dict(templates)
        self._sizes = (layers, experts)

    def stack(self, path: str) -> Index:
        """Returns the sizes of a path's stack."""
        return self._sizes[: self.templates[path].count("{}")]

    def name(self, path: str, index: Index = ()) -> str:
        """Returns what one layer (and expert) of a path is called."""
        return self.templates[path].format(*index)

    def names(self, path: str) -> list[str]:
        """Returns what all of a path is called, in the order of the stack."""
        template, stack = self.templates[path], self.stack(path)
        return [template.format(*i) for i in itertools.product(*map(range, stack))]

    def all(self) -> Iterator[tuple[Numbered, str]]:
        """Yields every parameter and its name."""
        for path in self.templates:
            for index in itertools.product(*map(range, self.stack(path))):
                yield Numbered(path, index), self.name(path, index)

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

    def modules(self) -> "Table":
        """Returns the table of the modules that have the parameters."""
        pairs = self.templates.items()
        return Table(
            {path.rpartition(".")[0]: name.rpartition(".")[0] for path, name in pairs},
            *self._sizes,
        )
