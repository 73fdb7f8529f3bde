"""Reading a PEFT folder onto a model: what PEFT opens, or why it cannot be held here."""

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import jax
import numpy as np
from flax import nnx

from qlora_jax.adapters.attach import attach_zero
from qlora_jax.adapters.names import check_names, flatten, unflatten
from qlora_jax.config.lora import Bias, LoRAConfig
from qlora_jax.errors import AdapterMismatchError, ConfigError, gathered
from qlora_jax.exchange.peft.even import evened
from qlora_jax.exchange.peft.names import (
    CONFIG,
    TENSORS,
    Tensors,
    check_undamaged,
    named,
    read_folder,
)
from qlora_jax.exchange.peft.parameters import apart
from qlora_jax.exchange.peft.settings import (
    matched,
    not_held,
    saved_modules,
    targeted,
    token_indices,
)
from qlora_jax.exchange.peft.tables import TABLES, follow_the_embedding, not_copies
from qlora_jax.models import FAMILIES, Decoder, whole_parameters
from qlora_jax.models.vocabulary import check_rows, resize_tokens
from qlora_jax.names import EMBEDDING, HEAD, Numbered, plain

logger = logging.getLogger(__name__)

_IN_PLACE = ("kernel", "weight", "bias")
"""Parameters of the base itself that may train."""


@dataclasses.dataclass
class _Understood:
    """What a folder is to a model.

    Attributes:
      flat: {our name, numbered: array as ours is}.
      config: What it is attached with.
      rows: Rows that the vocabulary needs.
      problems: Why it cannot be imported.
      notes: What of it is held in another way than in PEFT.
    """

    flat: dict[str, np.ndarray]
    config: LoRAConfig
    rows: int
    problems: list[str]
    notes: list[str]


def import_peft(path: str | os.PathLike[str], model: Decoder) -> Decoder:
    """Returns the model with a PEFT adapter attached; the model is left as it was.

    The logits are those that PEFT gives. Where layers differ in what our stacks share, the
    function stays the same and one warning says what was changed: lower ranks are padded
    with zeros (which learn nothing), scales that differ go into lora_b (which then learns at
    another rate), and a tied head with an adapter of its own gets a copy of the table.
    `export_peft` writes it in the changed form.

    Args:
      path: The folder.
      model: A Decoder, dense or quantized, without adapter. Its vocabulary grows where
        the adapter's is larger.

    Raises:
      AdapterMismatchError: the folder cannot be read, holds something that our adapters
        cannot represent, or does not fit the model; all problems in one message.
    """
    folder = Path(path)
    read = _fitting(folder, model)
    model = _attached(folder, read, model)
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    lora = unflatten(_filled(read, lora), lora, str(folder))
    check_undamaged(folder)
    _say(folder, read)
    return nnx.merge(graphdef, lora, rest)


def fit_peft(
    path: str | os.PathLike[str], base: Decoder
) -> tuple[Decoder, dict[str, np.ndarray]]:
    """Reads a PEFT folder for a base whose kernels may be shapes alone.

    Args and raises as `import_peft`.

    Returns:
      The base with the adapter, all of it shapes alone, and the adapter's arrays by dotted
      name, layers numbered; a module that trained in some layers has none in the others.
    """
    folder = Path(path)
    read = _fitting(folder, base)
    graphdef, state = nnx.split(base)
    shapes = nnx.eval_shape(
        lambda state: _attached(folder, read, nnx.merge(graphdef, state)), state
    )
    lora = nnx.state(shapes, nnx.LoRAParam)
    left = _left(read, jax.eval_shape(flatten, lora))
    check_names(read.flat | left, lora, str(folder))
    check_undamaged(folder)
    _say(folder, read)
    return shapes, read.flat


def _fitting(folder: Path, model: Decoder) -> _Understood:
    read = _understood(folder, model)
    if read.problems:
        raise AdapterMismatchError(
            gathered(f"{folder} cannot be imported", read.problems)
        )
    return read


def _attached(folder: Path, read: _Understood, model: Decoder) -> Decoder:
    try:
        model = resize_tokens(model, read.rows)
        return attach_zero(model, read.config, key=jax.random.key(0))
    except ConfigError as error:
        raise AdapterMismatchError(f"{folder} cannot be imported: {error}") from None


def _say(folder: Path, read: _Understood) -> None:
    if read.notes:
        logger.warning("%s: %s", folder, "; ".join(read.notes))


def describe_peft(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns what a PEFT folder is."""
    settings, stored = read_folder(Path(path))
    shown = (
        *(
            "base_model_name_or_path",
            "r",
            "lora_alpha",
            "lora_dropout",
            "target_modules",
        ),
        *("use_rslora", "use_dora", "bias", "modules_to_save", "rank_pattern"),
        *("alpha_pattern", "layers_to_transform", "trainable_token_indices"),
    )
    return {
        "kind": "PEFT adapter",
        **{key: settings[key] for key in shown if settings.get(key)},
        "parameters": sum(array.size for array in stored.values()),
        "arrays": len(stored),
    }


def peft_misfits(path: str | os.PathLike[str], model: Decoder) -> list[str]:
    """Returns why a PEFT adapter does not fit a base, whose kernels may be shapes alone."""
    read = _understood(Path(path), model)
    if read.problems:
        return read.problems
    graphdef, state = nnx.split(model)

    def attached(state: nnx.State) -> nnx.State:
        base = resize_tokens(nnx.merge(graphdef, state), read.rows)
        model = attach_zero(base, read.config, key=jax.random.key(0))
        lora = nnx.state(model, nnx.LoRAParam)
        return unflatten(_filled(read, lora), lora)

    try:
        nnx.eval_shape(attached, state)
    except (AdapterMismatchError, ConfigError) as error:
        return [str(error)]
    return []


def _filled(read: _Understood, lora: nnx.State) -> dict[str, Any]:
    """Returns the adapter's arrays, and the base's own where a module trained elsewhere."""
    return read.flat | _left(read, flatten(lora))


def _left(read: _Understood, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a module trains that PEFT left as it was, in some layers; notes it.

    Here it trains in all of them.
    """
    missing = {
        name: array
        for name, array in wanted.items()
        if name not in read.flat and name.rpartition(".")[2] in _IN_PLACE
    }
    if missing:
        paths = sorted({Numbered.parse(name).path for name in missing})
        read.notes.append(
            f"{', '.join(paths)} trained in some layers only; in the others it is the base's, "
            "and trains too from here on"
        )
    return missing


def _understood(folder: Path, model: Decoder) -> _Understood:
    settings, stored = read_folder(folder)
    if problems := not_held(settings):
        return _Understood({}, LoRAConfig(), 0, problems, [])
    fused = whole_parameters(FAMILIES[model.config.model_type])
    single = apart(settings, stored, fused, model.config.num_experts)
    settings, tensors = single.settings, named(single.tensors, model)
    flat, names = tensors.flat, tensors.names
    problems, notes = single.problems + tensors.problems, list(tensors.notes)
    more, said = _without_tensors(settings, tensors, model, single.modules)
    problems, notes = problems + more, notes + said
    notes += follow_the_embedding(flat, settings, model)
    tokens, head_tokens = token_indices(settings)
    saved = {
        module
        for found in saved_modules(settings, names.values()).values()
        for module in found
    }
    trained = {ours for ours, theirs in names.items() if theirs in saved}
    problems += not_copies(tensors, model, settings, trained, {*tokens})
    rows = [len(flat[name]) for name in TABLES if name in flat and flat[name].ndim]
    ids = (*tokens, *(head_tokens or ()))
    try:
        check_rows(model, rows, ids)
    except ConfigError as error:
        problems.append(str(error))
        ids = ()
    rows += [i + 1 for i in ids]
    read = _Understood(flat, LoRAConfig(), max(rows, default=0), problems, notes)
    _configure(read, settings, names, model, tokens, head_tokens)
    return read


def _without_tensors(
    settings: dict[str, Any], tensors: Tensors, model: Decoder, parameters: set[str]
) -> tuple[list[str], list[str]]:
    """Returns (what settings name and the file has nothing of, what else differs).

    Modules in `parameters` are named by target_parameters.

    PEFT loads a folder without some of its tensors, with a warning, and leaves these linears
    as they are; here it counts as damaged.
    """
    names = tensors.names
    have = {plain(path) for path, _ in nnx.to_flat_state(nnx.state(model))}
    linears = {
        name
        for name in names
        if name in (EMBEDDING, HEAD) or f"{Numbered.parse(name).path}.kernel" in have
    }
    theirs = {n.rpartition(".")[0] for n in tensors.flat}
    adapted = {
        name.rpartition(".")[0]
        for name in tensors.flat
        if name.endswith((".lora_a", ".lora_b"))
    }
    notes = []
    wanted = [
        n
        for n in sorted(linears)
        if names[n] in parameters or targeted(settings, names[n])
    ]
    missing = [names[name] for name in wanted if name not in theirs]
    if settings.get("target_modules") is not None:
        if unnamed := [names[name] for name in sorted(adapted - {*wanted})]:
            notes.append(
                f"{CONFIG} does not name {_some(unnamed)}, of which {TENSORS} has factors: "
                "they count here (PEFT leaves them out)"
            )
    for end, modules in saved_modules(settings, names.values()).items():
        found = {ours for ours, hf in names.items() if hf in modules}
        if not found:
            notes.append(f"modules_to_save {end}: the model has none, as in PEFT")
        elif not found & theirs:
            missing.append(end)
    if not missing:
        return [], notes
    return [f"{CONFIG} names {_some(missing)}, of which {TENSORS} has nothing"], notes


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _configure(
    read: _Understood,
    settings: dict[str, Any],
    names: dict[str, str],
    model: Decoder,
    tokens: tuple[int, ...],
    head_tokens: tuple[int, ...] | None,
) -> None:
    """Finds the config of what is adapted and trained, with one rank a linear."""
    shapes = _shapes(read, settings, names)
    owned = {
        Numbered.parse(name.rpartition(".")[0]).path
        for name in read.flat
        if name.endswith((".kernel", ".weight"))
    }
    layers, pattern = _layers({*shapes}, names, read.problems)
    biased = any(name.endswith(".bias") for name in read.flat)
    if not (shapes or owned or tokens or biased):
        read.problems.append("it has no factors of linears")
    if read.problems:
        return
    rslora = bool(settings.get("use_rslora"))
    read.flat, each, notes = evened(read.flat, shapes, rslora)
    read.notes += notes
    common = Counter(each.values()).most_common(1)
    rank, alpha = (settings["r"], float(settings["lora_alpha"]))
    if common and not (isinstance(rank, int) and rank > 0 and alpha > 0):
        rank, alpha = common[0][0]
    bias = settings.get("bias")
    if bias == "lora_only" and (layers or pattern):
        bias = "all"  # whose values are the base's where none trained
    # PEFT's tied head stays as it was when the embedding trains, unless told otherwise.
    own_head = EMBEDDING in owned and not settings.get("ensure_weight_tying")
    if HEAD in each and model.lm_head is None:
        own_head = True
        read.notes.append(
            "the adapter is on a tied head alone, which gets its own copy of the embedding"
        )
    try:
        read.config = LoRAConfig(
            rank=rank,
            alpha=alpha,
            dropout=float(settings.get("lora_dropout") or 0.0),
            rslora=rslora,
            dora=bool(settings.get("use_dora")),
            bias=cast(Bias, bias if bias in get_args(Bias) else "none"),
            layers=layers,
            layers_pattern=pattern,
            modules_to_save=tuple(sorted(owned)),
            tied=not own_head,
            tokens=tokens,
            head_tokens=None if model.lm_head is None else head_tokens,
            targets=tuple(sorted(each)),
            rank_pattern={p: r for p, (r, _) in sorted(each.items()) if r != rank},
            alpha_pattern={p: a for p, (_, a) in sorted(each.items()) if a != alpha},
        )
    except ConfigError as error:
        read.problems.append(str(error))


def _shapes(
    read: _Understood, settings: dict[str, Any], names: dict[str, str]
) -> dict[str, tuple[int, float]]:
    """Returns {our path of an adapted module, numbered: (rank, alpha)}."""
    shapes = {}
    pairs = [n for n in read.flat if n.endswith((".lora_a", ".lora_b"))]
    for name in sorted({name.rpartition(".")[0] for name in pairs}):
        module = names[name]
        alpha = matched(settings.get("alpha_pattern"), module, settings["lora_alpha"])
        rank = matched(settings.get("rank_pattern"), module, settings["r"])
        shapes[name] = (rank, float(alpha))
        for factor, axis in (("lora_a", 1), ("lora_b", 0)):
            array = read.flat.get(f"{name}.{factor}")
            if array is None:
                read.problems.append(f"{module} has no tensor for {factor}")
            elif array.ndim != 2 or array.shape[axis] != rank:
                has = array.shape[axis] if array.ndim == 2 else f"shape {array.shape}"
                read.problems.append(
                    f"{module}: {factor} has rank {has}, {CONFIG} says {rank}"
                )
    return shapes


def _layers(
    adapted: set[str], names: dict[str, str], problems: list[str]
) -> tuple[tuple[int, ...], dict[str, str]]:
    """Returns the layers of most linears, () for all, and {linear: other layers}."""
    chosen: dict[str, tuple[int, ...]] = {}
    for path in sorted({Numbered.parse(name).path for name in adapted}):
        if not path.startswith("layers."):
            continue
        whole = [name for name in names if Numbered.parse(name).path == path]
        found = [name for name in whole if name in adapted]
        layers = {int(name.split(".")[1]) for name in found}
        wanted = [name for name in whole if int(name.split(".")[1]) in layers]
        if found != wanted:
            problems.append(
                f"{path} is adapted in {len(found)} of {len(wanted)} experts; here all of a "
                "layer's have adapters"
            )
        count = len({name.split(".")[1] for name in whole})
        chosen[path] = () if len(layers) == count else tuple(sorted(layers))
    if not chosen:
        return (), {}
    common = Counter(chosen.values()).most_common(1)[0][0]
    others = {
        path: ",".join(map(str, layers)) or "all"
        for path, layers in chosen.items()
        if layers != common
    }
    return common, others
