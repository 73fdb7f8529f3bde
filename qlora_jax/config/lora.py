"""LoRAConfig: an adapter's shape, and where it goes."""

import dataclasses
import json
import math
import re
from typing import Any, Literal, get_args

from qlora_jax import matching
from qlora_jax.errors import ConfigError
from qlora_jax.names import EMBEDDING, TABLES
from qlora_jax.schema import pattern_problem
from qlora_jax.toml import from_dict

ALL_LINEAR = "all-linear"
_EXPRESSION = re.compile(r"[\\^$*+?{}()|\[\]]|^\.|\.\.|\.$")
"""What a regular expression has and names of modules do not."""

Names = str | tuple[str, ...]
"""Names of modules, the ends of their paths: a tuple, or a text where commas join them."""

Init = Literal["zero", "loftq", "qera-diagonal", "qera", "pissa"]
"""The ways that an adapter can start: changing nothing, making up for what quantization
lost, or as the principal part of the weights (adapters/compensate.py)."""

Bias = Literal["none", "all", "lora_only"]
"""Which biases train: none, all, or those of adapted linears."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """The adapter's shape and where it goes."""

    rank: int = 16
    """Columns of lora_a; r in the paper."""

    alpha: float = 32.0
    """The update is scaled by alpha / rank."""

    dropout: float = 0.0
    """Probability that an input feature of the adapter is dropped while training."""

    targets: Names = ALL_LINEAR
    """These linears get adapters: all-linear (all but the head), names (q_proj,v_proj: ends
    of paths; embed_tokens is the embedding), or one regular expression for the whole path
    (layers\\.attn\\..*). No name at all leaves it to tokens and modules_to_save. Names are
    kept as a tuple, also where a text joins them by commas; every other text is an
    expression."""

    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, so that high ranks learn as fast."""

    dora: bool = False
    """Train each output's magnitude beside the update's direction (DoRA)."""

    layers: tuple[int, ...] = ()
    """Numbers of the layers that get adapters; none named for all."""

    bias: Bias = "none"
    """Which biases train: none, all, or lora_only for those of adapted linears."""

    modules_to_save: Names = ()
    """Names of dense modules that train in full and are saved with the adapter
    (embed_tokens,lm_head,norm), kept as a tuple. A tied head follows the embedding, see
    tied."""

    tied: bool = True
    """Whether a tied head follows an embedding that trains; false gives it its own copy,
    which may have an adapter."""

    tokens: tuple[int, ...] = ()
    """Ids of tokens whose rows of the embedding train."""

    head_tokens: tuple[int, ...] | None = None
    """Ids of tokens whose rows of an untied head train; None for those in `tokens`."""

    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    """Other ranks: the end of a linear's path -> its rank."""

    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    """Other alphas: the end of a linear's path -> its alpha."""

    layers_pattern: dict[str, str] = dataclasses.field(default_factory=dict)
    """Other layers than those of layers: the end of a linear's path -> their numbers,
    joined by commas (0,1,5), or all."""

    init: Init = "zero"
    """This is how the adapter starts: zero changes nothing; loftq is the best low-rank copy
    of what quantization lost of the weights, qera of what it lost of the outputs, given the
    second moments of the inputs (qera-diagonal: their diagonal, for less memory); pissa is the
    principal part of the weights, and the base becomes what that leaves, in 4 bits: a base
    of its own, which the run saves. All but zero need the original weights, and the adapter
    then belongs to the 4-bit base alone."""

    def __post_init__(self):
        object.__setattr__(self, "targets", read_targets(self.targets))
        object.__setattr__(self, "modules_to_save", read_names(self.modules_to_save))
        problems = []
        if self.rank < 1:
            problems.append(f"--lora.rank is {self.rank}, expected at least 1")
        if not 0 < self.alpha < math.inf:
            problems.append(f"--lora.alpha is {self.alpha}, expected more than 0")
        if not 0 <= self.dropout < 1:
            problems.append(f"--lora.dropout is {self.dropout}, expected 0 <= p < 1")
        for key, rank in self.rank_pattern.items():
            if rank < 1:
                problems.append(
                    f"--lora.rank-pattern {key} is {rank}, expected 1 or more"
                )
        for key, alpha in self.alpha_pattern.items():
            if not 0 < alpha < math.inf:
                problems.append(
                    f"--lora.alpha-pattern {key} is {alpha}, expected above 0"
                )
        for key, numbers in self.layers_pattern.items():
            if _numbers(numbers) is None:
                problems.append(
                    f"--lora.layers-pattern {key} is {numbers!r}, expected different "
                    "numbers from 0, joined by commas, or all"
                )
        for name in ("layers", "tokens", "head_tokens"):
            if (numbers := getattr(self, name)) is None:
                continue
            if min(numbers, default=0) < 0 or len(set(numbers)) < len(numbers):
                flag = name.replace("_", "-")
                problems.append(
                    f"--lora.{flag} is {list(numbers)}, expected different numbers from 0"
                )
        if self.bias not in get_args(Bias):
            problems.append(
                f"--lora.bias is {self.bias!r}, expected {', '.join(get_args(Bias))}"
            )
        if (self.layers or self.layers_pattern) and self.bias == "lora_only":
            problems.append(
                "--lora.bias lora_only does not go with --lora.layers or "
                "--lora.layers-pattern"
            )
        if EMBEDDING in self.modules_to_save and self.tokens:
            problems.append(
                f"--lora.tokens trains rows of what --lora.modules-to-save {EMBEDDING} "
                "trains whole; give one of them"
            )
        if self.init not in get_args(Init):
            problems.append(
                f"--lora.init is {self.init!r}, expected {', '.join(get_args(Init))}"
            )
        if isinstance(self.targets, str):
            if problem := pattern_problem(self.targets):
                problems.append(
                    f"--lora.targets {self.targets!r:.80} is no pattern: {problem}"
                )
        if problems:
            raise ConfigError("; ".join(problems))

    def __hash__(self) -> int:
        # Of dicts the generated one could not be made; jit hashes static values. Equal
        # configs have equal hashes: 32 and 32.0, and whatever order a dict is in.
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return hash(
            tuple(frozenset(v.items()) if isinstance(v, dict) else v for v in values)
        )

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "LoRAConfig":
        """Makes one of what JSON or TOML gives of `dataclasses.asdict`.

        Folders of older versions open too: they have names as one text, joined by commas,
        and not every setting.

        Raises:
          ConfigError: unknown settings, or values of a wrong kind; all are named.
        """
        return from_dict(cls, values, "the adapter's settings")

    def as_json(self) -> dict[str, Any]:
        """Returns the settings as JSON gives them back, with lists for tuples."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def shape_of(self, path: str) -> tuple[int, float]:
        """Returns the rank and alpha of a linear of this dotted path."""
        return (
            _by_end(self.rank_pattern, path, self.rank),
            _by_end(self.alpha_pattern, path, self.alpha),
        )

    def layers_of(self, path: str) -> tuple[int, ...]:
        """Returns the layers in which the linear of a dotted path is adapted, () for all."""
        numbers = _by_end(self.layers_pattern, path, None)
        return self.layers if numbers is None else _numbers(numbers) or ()

    def saves(self, path: str) -> bool:
        """Whether the module at this dotted path trains in full."""
        return any(ends(path, name) for name in self.modules_to_save)

    def matches(self, path: str) -> bool:
        """Whether a module of this dotted path gets an adapter."""
        if self.saves(path):
            return False
        if isinstance(self.targets, tuple):
            return any(ends(path, name) for name in self.targets)
        if self.targets == ALL_LINEAR:
            return not any(ends(path, table) for table in TABLES)
        return matching.fullmatch(self.targets, path) is not None

    def token_rows(self, path: str) -> tuple[int, ...]:
        """Ids of the tokens whose rows of the embedding or head at this path train."""
        if path == EMBEDDING:
            return self.tokens
        return self.tokens if self.head_tokens is None else self.head_tokens


def read_targets(given: Names) -> Names:
    """Returns targets as LoRAConfig holds them.

    Args:
      given: Names, in a tuple or joined by commas, all-linear, or a regular expression.

    Returns:
      A tuple of names; or a str, which is ALL_LINEAR or a regular expression. A text is an
      expression if it has a character that means something in one, other than a dot
      between two parts of a path: layers.attn.q_proj is a name. In a tuple all are names.
    """
    if isinstance(given, str) and (given == ALL_LINEAR or _EXPRESSION.search(given)):
        return given
    return read_names(given)


def read_names(given: Names) -> tuple[str, ...]:
    """Returns the names in a tuple, or in a text where commas join them."""
    texts = (given,) if isinstance(given, str) else given
    names = (name.strip() for text in texts for name in text.split(","))
    return tuple(name for name in names if name)


def ends(path: str, name: str) -> bool:
    """Whether a dotted path is a name or ends with it."""
    return path == name or path.endswith(f".{name}")


def _by_end(patterns: dict[str, Any], path: str, default: Any) -> Any:
    for end, value in patterns.items():
        if ends(path, end):
            return value
    return default


def _numbers(text: str) -> tuple[int, ...] | None:
    """Returns the numbers of layers that a text lists, () for all, None of another text."""
    if text == "all":
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len({*parts}) < len(parts):
        return None
    return tuple(sorted(map(int, parts)))
