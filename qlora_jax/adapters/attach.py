"""Attaching LoRA to a model, and taking it apart into what trains and what not."""

import dataclasses
import difflib
import json
import logging
import re
import zlib
from collections import Counter
from typing import Any, TypeVar, get_args

import jax
from flax import nnx
from jaxtyping import Array

from qlora_jax.adapters.compensate import Moments, Original, compensate, describe
from qlora_jax.adapters.fingerprint import fingerprint
from qlora_jax.adapters.names import dotted
from qlora_jax.errors import AdapterMismatchError, ConfigError
from qlora_jax.nn import Linear, LoRA, QuantizedLinear
from qlora_jax.nn.lora import Init

M = TypeVar("M", bound=nnx.Module)

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """The adapter's shape and where it goes."""

    rank: int = 16
    """Columns of lora_a; r in the paper."""

    alpha: float = 32.0
    """The update is scaled by alpha / rank."""

    dropout: float = 0.0
    """Probability that an input feature of the adapter is dropped while training."""

    targets: str = ALL_LINEAR
    """Which linears: all-linear (all but the head), names joined by commas
    (q_proj,v_proj), or a regular expression for the whole path (layers\\.attn\\..*)."""

    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, so that high ranks learn as fast."""

    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    """Other ranks: the end of a linear's path -> its rank."""

    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    """Other alphas: the end of a linear's path -> its alpha."""

    init: Init = "zero"
    """How it starts: zero changes nothing; loftq is the best low-rank copy of what
    quantization lost of the weights, qera of what it lost of the outputs, given the second
    moments of the inputs (qera-diagonal: their diagonal, for less memory). All but zero
    need the original weights, and the adapter then belongs to the 4-bit base alone."""

    def __post_init__(self):
        problems = []
        if self.rank < 1:
            problems.append(f"--lora.rank is {self.rank}, expected at least 1")
        if not self.alpha > 0:
            problems.append(f"--lora.alpha is {self.alpha}, expected more than 0")
        if not 0 <= self.dropout < 1:
            problems.append(f"--lora.dropout is {self.dropout}, expected 0 <= p < 1")
        for key, rank in self.rank_pattern.items():
            if rank < 1:
                problems.append(
                    f"--lora.rank-pattern {key} is {rank}, expected 1 or more"
                )
        for key, alpha in self.alpha_pattern.items():
            if not alpha > 0:
                problems.append(
                    f"--lora.alpha-pattern {key} is {alpha}, expected above 0"
                )
        if self.init not in get_args(Init):
            problems.append(
                f"--lora.init is {self.init!r}, expected {', '.join(get_args(Init))}"
            )
        try:
            re.compile(self.targets)
        except re.error as error:
            problems.append(f"--lora.targets {self.targets!r} is no pattern: {error}")
        if problems:
            raise ConfigError("; ".join(problems))

    def shape_of(self, path: str) -> tuple[int, float]:
        """Returns the rank and alpha of a linear of this dotted path."""
        return (
            _by_end(self.rank_pattern, path, self.rank),
            _by_end(self.alpha_pattern, path, self.alpha),
        )

    def matches(self, path: str) -> bool:
        """Whether a linear of this dotted path gets an adapter."""
        if self.targets == ALL_LINEAR:
            return path.rpartition(".")[2] != "lm_head"
        if re.fullmatch(self.targets, path):
            return True
        names = [name.strip() for name in self.targets.split(",")]
        return any(path == name or path.endswith(f".{name}") for name in names)


def _by_end(patterns: dict[str, Any], path: str, default: Any) -> Any:
    for end, value in patterns.items():
        if path == end or path.endswith(f".{end}"):
            return value
    return default


def attach(
    model: M,
    config: LoRAConfig | None = None,
    *,
    key: Array,
    original: Original | nnx.Module | None = None,
    moments: Moments | None = None,
) -> M:
    """Puts a new LoRA beside every targeted linear.

    With config.init 'zero' the output does not change yet; else the adapter makes up for
    what quantization lost, as `compensate` says.

    Args:
      model: Any nnx.Module with qlora_jax linears. It is left as it was.
      config: The adapter's shape and targets.
      key: For lora_a. Each linear's values depend on the key and its path alone.
      original: The dense weights, for another init than zero.
      moments: From `input_moments`, for init 'qera' and 'qera-diagonal'.

    Returns:
      A model with LoRA modules in place of the targeted linears.

    Raises:
      ConfigError: the targets match nothing (names near matches), or what config.init
        needs is missing.
      AdapterMismatchError: the model has adapters already, or the original does not fit.
    """
    config = config or LoRAConfig()
    if config.init == "zero":
        return attach_zero(model, config, key=key)
    weighted = config.init != "loftq"
    if original is None or (weighted and moments is None):
        needs = "original and moments (input_moments)" if weighted else "original"
        raise ConfigError(f"init {config.init!r} needs {needs}")
    model = attach_zero(model, config, key=key)
    model, errors = compensate(model, original, moments if weighted else None, key=key)
    logger.info("%s: %s", config.init, describe(errors))
    return model


def attach_zero(model: M, config: LoRAConfig, *, key: Array) -> M:
    """Attaches an adapter whose factors start as for init 'zero', or are filled later.

    Args, returns and raises as `attach`.
    """
    linears = []
    for path, node in nnx.iter_graph(model):
        if isinstance(node, LoRA):
            raise AdapterMismatchError(
                f"the model has an adapter at {dotted(path)} already; merge it first, or "
                "attach to the model without it"
            )
        if isinstance(node, (Linear, QuantizedLinear)):
            linears.append(dotted(path))
    if not any(config.matches(path) for path in linears):
        raise ConfigError(_no_match(config.targets, linears))
    base = fingerprint(model)

    def replace(path: tuple, node: Any) -> Any:
        name = dotted(path)
        if not isinstance(node, (Linear, QuantizedLinear)) or not config.matches(name):
            return node
        rank, alpha = config.shape_of(name)
        lora = LoRA(
            node,
            rank=rank,
            alpha=alpha,
            dropout=config.dropout,
            init=config.init,
            rslora=config.rslora,
            key=jax.random.fold_in(key, zlib.crc32(name.encode())),
        )
        # Travels with the adapter's own tree, so that saving it alone can name the base.
        for variable in (lora.lora_a, lora.lora_b):
            variable.set_metadata(base=base)
        return lora

    return nnx.recursive_map(replace, model)


def split(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Takes a model apart: (graphdef, lora, base).

    `lora` has the trainable float32 factors alone; `base` everything frozen. Both are
    pytrees; `join` puts them together.

    Raises:
      AdapterMismatchError: the model has no adapter.
    """
    graphdef, lora, base = nnx.split(model, nnx.LoRAParam, ...)
    if not jax.tree.leaves(lora):
        raise AdapterMismatchError(
            "the model has no adapter to train; call attach first"
        )
    return graphdef, lora, base


def join(graphdef: nnx.GraphDef, lora: nnx.State, base: nnx.State) -> Any:
    """Puts a model together from what `split` gave."""
    return nnx.merge(graphdef, lora, base)


def lora_config(model: nnx.Module) -> LoRAConfig:
    """Returns the config that describes a model's attached adapter.

    Targets are the paths that have one, joined by commas.
    """
    found = {dotted(p): n for p, n in nnx.iter_graph(model) if isinstance(n, LoRA)}
    if not found:
        raise AdapterMismatchError("the model has no adapter")
    one = next(iter(found.values()))
    rank, alpha = (
        Counter(getattr(node, field) for node in found.values()).most_common(1)[0][0]
        for field in ("rank", "alpha")
    )
    return LoRAConfig(
        rank=rank,
        alpha=alpha,
        rslora=one.rslora,
        rank_pattern={p: n.rank for p, n in found.items() if n.rank != rank},
        alpha_pattern={p: n.alpha for p, n in found.items() if n.alpha != alpha},
        dropout=one.dropout,
        init=one.init,
        targets=",".join(sorted(found)),
    )


def base_fingerprint(lora: nnx.State) -> dict[str, Any] | None:
    """Returns the fingerprint of the base that an adapter was attached to."""
    for _, variable in nnx.to_flat_state(lora):
        text = variable.get_metadata().get("base")
        if text is not None:
            return json.loads(text)
    return None


def _no_match(targets: str, linears: list[str]) -> str:
    if not linears:
        return (
            "the model has no qlora_jax linear to attach to; call quantize(model) first if "
            "its linears are flax.nnx.Linear"
        )
    last = sorted({path.rpartition(".")[2] for path in linears})
    near = [
        match
        for name in re.split(r"[^\w]+", targets)
        for match in difflib.get_close_matches(name, last, n=2, cutoff=0.5)
    ]
    hint = f"near: {', '.join(dict.fromkeys(near))}; " if near else ""
    return (
        f"--lora.targets {targets!r} matches no linear; {hint}the model has "
        f"{', '.join(last)}, at paths such as {linears[0]}"
    )
