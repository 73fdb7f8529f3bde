"""Adapters on disk: Orbax, flat dotted names, nothing of the base (contract C6).

A folder holds the arrays under `arrays/` (one array a name) and `adapter.json`:
rank, alpha, dropout, targets, the base's fingerprint.
"""

import dataclasses
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from qlora_jax.adapters.attach import attach_zero, detach
from qlora_jax.adapters.attached import base_fingerprint
from qlora_jax.adapters.fingerprint import difference
from qlora_jax.adapters.names import (
    check_names,
    explicit_layers,
    flatten,
    unflatten,
)
from qlora_jax.adapters.value import other_base
from qlora_jax.config.lora import LoRAConfig
from qlora_jax.digests import NAME as DIGESTS
from qlora_jax.disk import check_room, unwritten
from qlora_jax.errors import (
    AdapterMismatchError,
    ConfigError,
    OutputError,
    OutputExistsError,
    gathered,
)
from qlora_jax.exchange.find import find_adapter
from qlora_jax.exchange.metadata import (
    ADAPTER,
    ARRAYS,
    BASE,
    METADATA,
    adapter_metadata,
    check_unchanged,
    read_metadata,
    restored,
)
from qlora_jax.exchange.peft import (
    describe_peft,
    fit_peft,
    import_peft,
    is_peft,
    peft_misfits,
)
from qlora_jax.files import new_folder
from qlora_jax.models import Decoder
from qlora_jax.models.vocabulary import check_rows, resize_tokens
from qlora_jax.nn import LoRA
from qlora_jax.nn.frozen import modules
from qlora_jax.text.tokenizer import FILES as TOKENIZER_FILES
from qlora_jax.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nnx.Module)


def save_adapter(
    path: str | os.PathLike[str],
    lora: nnx.State,
    config: LoRAConfig,
    *,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
) -> Path:
    """Saves an adapter alone.

    Args:
      path: The folder.
      lora: The adapter's parameters, from `split`.
      config: The LoRAConfig that it was attached with.
      tokenizer: Saved along, where tokens were added; `load_tokenizer` reads it.
      overwrite: Replace an adapter that is there.

    Returns:
      The folder.

    Raises:
      OutputExistsError: the folder is taken, and is no adapter or overwrite is false.
      OutputError: the folder cannot be written; one that was there is as it was.
    """
    arrays = {name: np.asarray(x) for name, x in flatten(lora).items()}
    return write_adapter(
        *(path, arrays, config, base_fingerprint(lora)),
        layers=explicit_layers(lora, config),
        tokenizer=tokenizer,
        overwrite=overwrite,
    )


def write_adapter(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    config: LoRAConfig,
    base: dict[str, Any] | None,
    *,
    layers: Mapping[str, list[int]] | None = None,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
) -> Path:
    """Saves an adapter that is in no model.

    Args:
      path: The folder.
      arrays: {dotted name, layers numbered: float32 array}.
      config: What it is to be attached with.
      base: The fingerprint of its base.
      layers: {linear: its layers}, for linears whose layers the config does not tell; see
        `explicit_layers`.
      tokenizer, overwrite: See `save_adapter`.

    Returns and raises as `save_adapter`.
    """
    path = Path(path).absolute()
    check_free(path, overwrite)
    size = sum(np.asarray(x).nbytes for x in arrays.values())
    with new_folder(path, opened_by=METADATA, replaces=is_ours) as new:
        check_room(new.path, size)
        _save_arrays(new.path / ARRAYS, arrays)
        if tokenizer is not None:
            tokenizer.save(new.path)
        text = adapter_metadata(arrays, config, base, layers)
        (new.path / METADATA).write_text(text, encoding="utf-8")
    return path


def check_free(path: Path, overwrite: bool) -> None:
    """Refuses a folder that an adapter cannot be saved in.

    Raises:
      OutputExistsError: it is taken, and is no adapter or overwrite is false.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    # Without metadata but with nothing else either: a save that was killed.
    half = overwrite and path.is_dir() and all(is_ours(x.name) for x in path.iterdir())
    if not (path / METADATA).exists() and not half:
        raise OutputExistsError(f"{path} exists and is no adapter; choose another path")
    if not overwrite:
        raise OutputExistsError(
            f"{path} holds an adapter; pass overwrite to replace it"
        )


def _save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays with Orbax.

    Raises:
      OutputError: they cannot be written; Orbax's own errors are of many kinds.
    """
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, dict(arrays))
            checkpointer.wait_until_finished()
    except Exception as error:  # Orbax raises of every kind, Exception itself too
        raise OutputError(unwritten(path.parent, error)) from error


def is_ours(name: str) -> bool:
    """Whether a path in an adapter's folder is one that `write_adapter` writes."""
    top = name.partition("/")[0]
    return top.startswith((ARRAYS, METADATA)) or top in (*TOKENIZER_FILES, DIGESTS)


def describe_adapter(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns what an adapter is, from its metadata alone."""
    if is_peft(path):
        return describe_peft(path)
    folder = find_adapter(path)
    config, metadata = read_metadata(folder)
    shapes = metadata["arrays"].values()
    return {
        "kind": "adapter",
        **dataclasses.asdict(config),
        "parameters": sum(math.prod(shape) for shape in shapes),
        "arrays": len(shapes),
        "base_structure": (metadata["base"] or {}).get("structure"),
    }


def misfits(path: str | os.PathLike[str], model: nnx.Module) -> list[str]:
    """Returns why an adapter does not fit a base, whose kernels may be shapes alone."""
    if is_peft(path):
        assert isinstance(model, Decoder)
        return peft_misfits(path, model)
    config, metadata = read_metadata(find_adapter(path))
    problems = _other_base(model, config, metadata)
    try:
        graphdef, state = nnx.split(model)
        shapes = nnx.eval_shape(
            lambda state: attach_zero(
                _with_room(nnx.merge(graphdef, state), config, metadata),
                config,
                key=jax.random.key(0),
            ),
            state,
        )
    except ConfigError as error:
        return [*problems, str(error)]
    return problems + _shape_problems(metadata, shapes)


def load_adapter(path: str | os.PathLike[str], model: M) -> M:
    """Returns the model with a saved adapter attached; the model is left as it was.

    Args:
      path: A run folder, an adapter folder or a PEFT folder.
      model: The base it was trained on, dense or quantized; an adapter that it has is
        replaced.

    Raises:
      AdapterMismatchError: no adapter there, or it does not fit: another base, rank or
        targets; every mismatch is named.
    """
    if nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        model = detach(model)
    if is_peft(path):
        if not isinstance(model, Decoder):
            raise AdapterMismatchError(
                f"{path} is a PEFT adapter; its names fit a Decoder, this is "
                f"{type(model).__name__}"
            )
        return cast(M, import_peft(path, model))
    folder = find_adapter(path)
    config, metadata = read_metadata(folder)
    problems = _other_base(model, config, metadata)
    model = _attached(folder, config, metadata, model, problems)
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    arrays = restored(folder, metadata)
    lora = unflatten(arrays, lora, f"adapter {folder}")
    check_unchanged(folder, metadata)
    return nnx.merge(graphdef, lora, rest)


def fit_adapter(
    path: str | os.PathLike[str], base: Decoder
) -> tuple[Decoder, Mapping[str, Any]]:
    """Reads an adapter for a base whose kernels are not there.

    Args:
      path: A run folder, an adapter folder or a PEFT folder.
      base: The base without adapter; its layers' kernels may be shapes alone (`outline`).
        The scales of 4-bit ones are not compared then: `check_scales` does it.

    Returns:
      The base with the adapter, all of it shapes alone, and the adapter's arrays by dotted
      name, layers numbered; a module that trained in some layers has none in the others.

    Raises:
      AdapterMismatchError: as `load_adapter`.
    """
    if is_peft(path):
        return fit_peft(path, base)
    folder = find_adapter(path)
    config, metadata = read_metadata(folder)
    problems = _other_base(base, config, metadata)
    graphdef, state = nnx.split(base)
    shapes = nnx.eval_shape(
        lambda state: _attached(
            folder, config, metadata, nnx.merge(graphdef, state), problems
        ),
        state,
    )
    arrays = restored(folder, metadata)
    check_names(arrays, nnx.state(shapes, nnx.LoRAParam), f"adapter {folder}")
    check_unchanged(folder, metadata)
    return shapes, arrays


def base_scales(path: str | os.PathLike[str]) -> dict[str, float]:
    """Returns the mean absmax of each 4-bit weight that an adapter was trained on.

    It is empty where the adapter fits its base however that is held.
    """
    if is_peft(path):
        return {}
    return (read_metadata(find_adapter(path))[1]["base"] or {}).get("scales", {})


def check_scales(path: str | os.PathLike[str], scales: dict[str, float]) -> None:
    """Compares some 4-bit weights of a base with those that an adapter was trained on.

    Args:
      path: The adapter's path, as `fit_adapter` takes it, which compares all else.
      scales: {path of a weight: its mean absmax}.

    Raises:
      AdapterMismatchError: they are others.
    """
    folder = find_adapter(path)
    config, metadata = read_metadata(folder)
    theirs = metadata["base"]
    if text := difference(theirs | {"scales": scales}, theirs):
        raise AdapterMismatchError(_unfit(folder, [_with_advice(text, config)]))


def _attached(
    folder: Path,
    config: LoRAConfig,
    metadata: dict[str, Any],
    model: M,
    problems: list[str],
) -> M:
    """Returns the model with an adapter of the right shape, or raises with all problems."""
    try:
        room = _with_room(model, config, metadata)
        model = attach_zero(room, config, key=jax.random.key(0))
    except ConfigError as error:
        problems.append(str(error))
        raise AdapterMismatchError(_unfit(folder, problems)) from None
    dense = any(not node.base.packed for _, node in modules(model, LoRA))
    if config.init != "zero" and dense:
        problems.append(
            f"it began as the principal part of the weights (init pissa), {_ITS_BASE}"
            if config.init == "pissa"
            else f"it began as what quantization lost (init {config.init}), so it belongs to "
            "the 4-bit base; quantize this one (--quant.codebook nf4)"
        )
    if problems:
        problems += _shape_problems(metadata, model)
        raise AdapterMismatchError(_unfit(folder, problems))
    return model


_ITS_BASE = (
    f"so it belongs to the 4-bit base that its run saved in {BASE}/ beside {ADAPTER}/; keep "
    "the two together, or give that folder as --model"
)


def _other_base(
    model: nnx.Module, config: LoRAConfig, metadata: dict[str, Any]
) -> list[str]:
    """Returns how a model differs from the base that an adapter was trained on."""
    text = other_base(model, metadata["base"])
    return [] if text is None else [_with_advice(text, config)]


def _with_advice(text: str, config: LoRAConfig) -> str:
    """Adds to how a base differs which one a changed base is."""
    changed = config.init == "pissa" and "4-bit weights" in text
    return f"{text}; its init is pissa, {_ITS_BASE}" if changed else text


def _with_room(model: M, config: LoRAConfig, metadata: dict[str, Any]) -> M:
    """Returns the model with rows for the tokens that an adapter added."""
    if not isinstance(model, Decoder):
        return model
    ids = (*config.tokens, *(config.head_tokens or ()))
    tables = ("embed_tokens.weight", "embed_tokens.lora_a", "lm_head.kernel")
    shapes = metadata["arrays"]
    rows = [shapes[name][0] for name in tables if shapes.get(name)]
    check_rows(model, rows, ids)
    return cast(M, resize_tokens(model, max(0, *rows, *(i + 1 for i in ids), 0)))


def _shape_problems(metadata: dict[str, Any], model: nnx.Module) -> list[str]:
    wanted = jax.eval_shape(flatten, nnx.state(model, nnx.LoRAParam))
    have = {name: tuple(shape) for name, shape in metadata["arrays"].items()}
    problems = [
        f"{name}: shape {have[name]}, the model has {x.shape}"
        for name, x in wanted.items()
        if name in have and have[name] != x.shape
    ]
    problems += [
        f"{name}: missing from the adapter" for name in wanted.keys() - have.keys()
    ]
    problems += [f"{name}: not in the model" for name in have.keys() - wanted.keys()]
    return problems


def _unfit(folder: Path, problems: list[str]) -> str:
    return gathered(f"adapter {folder} does not fit this model", problems)
