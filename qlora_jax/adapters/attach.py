"""Attaching LoRA to a model, and taking it apart into what trains and what not."""

import difflib
import logging
import re
import zlib
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from qlora_jax.adapters.compensate import Moments, Original, describe, start
from qlora_jax.adapters.fingerprint import fingerprint
from qlora_jax.config.lora import LoRAConfig, ends, read_targets
from qlora_jax.errors import AdapterMismatchError, ConfigError, gathered
from qlora_jax.models import Decoder
from qlora_jax.models.vocabulary import is_tied, tied_again, untied, vocab_size
from qlora_jax.names import (
    EMBEDDING,
    HEAD,
    PER_LAYER,
    dotted,
    is_stacked,
    layers_at,
    plain,
)
from qlora_jax.nn import (
    Adapted,
    FrozenLinear,
    FrozenTable,
    LoRA,
    LoRAEmbedding,
    TrainedRows,
    Weighted,
)
from qlora_jax.nn.frozen import modules, replaced
from qlora_jax.nn.quantizing import check_module

M = TypeVar("M", bound=nnx.Module)

logger = logging.getLogger(__name__)


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
    what quantization lost, as `compensate` says. With 'pissa' the model comes back with
    another 4-bit base, which goes with the adapter: save_model(detach(model), folder).

    Args:
      model: Any nnx.Module with qlora_jax linears. It is left as it was.
      config: The adapter's shape and targets.
      key: The random key for lora_a. Each linear's values depend on the key and its path
        alone.
      original: The dense weights that the base was quantized from, for another init than
        'zero'.
      moments: The second moments of the linears' inputs, from `input_moments`, for init
        'qera' and 'qera-diagonal'.

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
    model = attach_zero(model, config, key=key)
    model, errors = start(model, config.init, original, moments, key=key)
    logger.info("%s: %s", config.init, describe(errors))
    return model


def attach_zero(model: M, config: LoRAConfig, *, key: Array) -> M:
    """Attaches an adapter whose factors start as for init 'zero', or are filled later.

    Args, returns and raises as `attach`.
    """
    check_module(model)
    _check(model, config)
    base = fingerprint(model, scales=config.init != "zero")
    if HEAD in config.modules_to_save or not config.tied:
        model = untied(model)

    def adapt(path: tuple, node: Weighted) -> nnx.Module:
        name = plain(path)
        tokens = config.token_rows(name) if name in (EMBEDDING, HEAD) else ()
        if tokens and not config.saves(name):
            rows = nnx.LoRAParam(node.rows(jnp.asarray(tokens, jnp.int32)))
            return TrainedRows(node, _marked(rows, base), tokens)
        if node.can_train and config.saves(name):
            for own in node.parameters():
                node.unfreeze(own).set_metadata(base=base)
        elif isinstance(node, FrozenTable):
            if not config.matches(name):
                return node
            if name == PER_LAYER:
                logger.warning(
                    "targets match %s, which takes no adapter and stays as it is; name it in "
                    "modules_to_save to train it whole",
                    name,
                )
                return node
            return _lora_embedding(node, name, config, base, key)
        elif isinstance(node, FrozenLinear):
            adapted = config.matches(name) and _adapted_here(path, config)
            if node.bias is not None and config.bias != "none":
                if adapted or config.bias == "all":
                    node.unfreeze("bias").set_metadata(base=base)
            return _lora(node, path, config, base, key) if adapted else node
        return node

    return replaced(model, Weighted, adapt)


def _adapted_here(path: tuple, config: LoRAConfig) -> bool:
    """Whether any layer of a linear's stack is to have an adapter."""
    layers, own = config.layers_of(plain(path)), layers_at(path)
    return not layers or own is None or not {*layers}.isdisjoint(own)


def _lora(
    node: FrozenLinear,
    path: tuple,
    config: LoRAConfig,
    base: str | None,
    key: Array,
) -> LoRA:
    rank, alpha = config.shape_of(plain(path))
    layers = config.layers_of(plain(path)) if node.stack else ()
    inside, own = layers, layers_at(path)
    if own is not None:  # a stack of some layers, whose indices are not their numbers
        inside = tuple(i for i, number in enumerate(own) if number in layers)
        inside = () if len(inside) == len(own) else inside
        layers = tuple(own[i] for i in inside)
    lora = LoRA(
        node,
        rank=rank,
        alpha=alpha,
        dropout=config.dropout,
        init=config.init,
        rslora=config.rslora,
        dora=config.dora,
        layers=inside,
        key=jax.random.fold_in(key, zlib.crc32(dotted(path).encode())),
    )
    for variable in (lora.lora_a, lora.lora_b, lora.magnitude):
        if variable is not None:
            _marked(variable, base, stack=len(node.stack), layers=layers)
    return lora


def _lora_embedding(
    node: FrozenTable, name: str, config: LoRAConfig, base: str | None, key: Array
) -> LoRAEmbedding:
    rank, alpha = config.shape_of(name)
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    lora = LoRAEmbedding(node, rank=rank, alpha=alpha, rslora=config.rslora, key=key)
    for variable in (lora.lora_a, lora.lora_b):
        _marked(variable, base)
    return lora


def _marked(
    variable: nnx.LoRAParam, base: str | None, stack: int = 0, **metadata: Any
) -> nnx.LoRAParam:
    """Says of a variable what saving it alone must know: its base, its leading axes."""
    variable.set_metadata(base=base, stack=stack, **metadata)
    return variable


def _check(model: nnx.Module, config: LoRAConfig) -> None:
    """Raises what `attach` does of a config that does not fit a model."""
    for path, _ in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        raise AdapterMismatchError(
            f"the model has an adapter at {plain(path[:-1])} already; merge it first, "
            "or attach to the model without it"
        )
    nodes = {plain(path): node for path, node in modules(model, Weighted)}
    linears = [name for name, node in nodes.items() if isinstance(node, FrozenLinear)]
    dense = [name for name, node in nodes.items() if node.can_train]
    packed = [name for name, node in nodes.items() if node.packed]
    problems: list[str] = []
    tied = is_tied(model)
    # A head that gets its own copy of the table is a linear like others.
    asked = tied and config.tied and _asks_for_head(config, linears)
    paths = [*linears, *([HEAD] if tied and (asked or not config.tied) else [])]
    found = any(map(config.matches, paths))
    if asked:
        problems.append(
            f"--lora.targets {_said(config)}: {HEAD} is tied to {EMBEDDING} and has no "
            "weight of its own; --lora.no-tied (LoRAConfig.tied=False) gives it a copy, "
            "which may have an adapter"
        )
    embeds = EMBEDDING in (*dense, *packed) and config.matches(EMBEDDING)
    alone = config.modules_to_save or config.tokens
    if not (found or embeds) and not (config.targets == () and alone):
        raise ConfigError(_no_match(_said(config), linears))
    problems += _unmatched(config, [*paths, EMBEDDING])
    for name in config.modules_to_save:
        if not any(ends(path, name) for path in (*dense, *([HEAD] if tied else []))):
            quantized = any(ends(path, name) for path in packed)
            why = (
                "is quantized, and only dense modules train" if quantized else "is none"
            )
            problems.append(
                f"--lora.modules-to-save {name} {why}; there are {', '.join(dense)}"
            )
    problems += _beyond(config, model)
    follows = tied and config.tied and HEAD not in config.modules_to_save
    if config.head_tokens and follows:
        problems.append(
            "--lora.head-tokens: the head is tied and follows --lora.tokens"
        )
    if config.tokens or config.head_tokens:
        size = vocab_size(model)
        wrong = [t for t in (*config.tokens, *(config.head_tokens or ())) if t >= size]
        if wrong:
            problems.append(
                f"--lora.tokens {wrong}: the vocabulary has {size}; add_tokens makes room"
            )
        if config.matches(EMBEDDING):
            problems.append(
                f"--lora.tokens and an adapter on {EMBEDDING} exclude each other"
            )
    if config.token_rows(HEAD) and not (tied and config.tied) and config.matches(HEAD):
        problems.append(
            f"--lora.tokens and an adapter on {HEAD} exclude each other; "
            "--lora.head-tokens of none leaves the head's rows alone"
        )
    if config.dora and embeds:
        _without_dora(config, problems)
    if problems:
        raise ConfigError(gathered("the adapter does not fit this model", problems))


def _without_dora(config: LoRAConfig, problems: list[str]) -> None:
    """Refuses DoRA for an embedding that targets name; warns where they match it by the way."""
    said = f"--lora.dora has no form for {EMBEDDING}"
    if isinstance(config.targets, tuple):
        problems.append(said)
    else:
        logger.warning("%s, which gets a plain LoRA", said)


def _asks_for_head(config: LoRAConfig, linears: list[str]) -> bool:
    """Whether targets name the head, rather than match it among other modules."""
    named = isinstance(config.targets, tuple) and HEAD in config.targets
    if named or any(map(config.matches, linears)):
        return named and not config.saves(HEAD)
    return config.matches(HEAD)


def _beyond(config: LoRAConfig, model: nnx.Module) -> list[str]:
    """Returns the layers that a config names, and the model or a linear does not have."""
    problems: dict[tuple[int, ...], str] = {}
    having: dict[str, set[int]] = {}
    for keys, node in modules(model, FrozenLinear):
        if not node.stack:
            continue
        path, count = plain(keys), node.stack[0]
        if isinstance(model, Decoder) and is_stacked(keys):
            count = model.config.num_layers
        layers = config.layers_of(path)
        if not config.matches(path) or not layers:
            continue
        having.setdefault(path, set()).update(layers_at(keys) or range(count))
        if max(layers) >= count:
            flag = "layers" if layers == config.layers else f"layers-pattern of {path}"
            problems[layers] = (
                f"--lora.{flag} {list(layers)}: the model has {count} layers, from 0"
            )
    if problems:
        return list(problems.values())
    names = config.targets if isinstance(config.targets, tuple) else ("",)
    without = []
    for name in names:  # a name may stand for linears of several kinds of layers
        found = {p: own for p, own in having.items() if not name or ends(p, name)}
        if found and all(
            own.isdisjoint(config.layers_of(p)) for p, own in found.items()
        ):
            layers = sorted({i for path in found for i in config.layers_of(path)})
            without.append(
                f"--lora.targets {name or config.targets}: none of the layers {layers} has "
                f"it; it is in {sorted(set().union(*found.values()))}"
            )
    return without


def detach(model: M) -> M:
    """Returns the base of a model with an adapter; the model is left as it was.

    Raises:
      AdapterMismatchError: something of the base trained in place (a bias, or a module of
        modules_to_save), so that the base is no longer there.
    """
    base = replaced(model, Adapted, lambda _, node: node.base)
    if left := nnx.to_flat_state(nnx.state(base, nnx.LoRAParam)):
        names = ", ".join(plain(path) for path, _ in left)
        raise AdapterMismatchError(
            f"the model's own {names} trained in place; load the base anew"
        )
    return tied_again(base)


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
    """Puts a model together from what `split` gave.

    Its variables are new ones, so that it may be made inside of jax.grad or jax.lax.scan;
    the arrays are the same.
    """
    return nnx.merge(graphdef, lora, base, copy=True)


def _unmatched(config: LoRAConfig, paths: list[str]) -> list[str]:
    """Returns what of a config's names is the end of no path, or of none with an adapter."""
    problems = []
    for name in config.targets if isinstance(config.targets, tuple) else ():
        if not any(ends(path, name) for path in paths):
            alone = isinstance(read_targets(name), str)
            hint = "; all-linear and regular expressions stand alone" if alone else ""
            problems.append(_no_match(name, paths) + hint)
    adapted = [path for path in paths if config.matches(path)]
    for flag, patterns in (
        ("rank-pattern", config.rank_pattern),
        ("alpha-pattern", config.alpha_pattern),
        ("layers-pattern", config.layers_pattern),
    ):
        for name in patterns:
            if not any(ends(path, name) for path in adapted):
                last = sorted({path.rpartition(".")[2] for path in adapted})
                problems.append(
                    f"--lora.{flag} {name} is no linear with an adapter; there are "
                    f"{', '.join(last)}"
                )
    return problems


def _said(config: LoRAConfig) -> str:
    """Returns targets as the flag has them."""
    targets = config.targets
    return targets if isinstance(targets, str) else ",".join(targets)


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
