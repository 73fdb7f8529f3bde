"""Adapters on disk: Orbax, flat dotted names, nothing of the base (contract C6).

A folder holds the arrays under `arrays/` (one array a name) and `adapter.json`:
rank, alpha, dropout, targets, the base's fingerprint.
"""

import dataclasses
import json
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
from qlora_jax.adapters.fingerprint import MARK, difference
from qlora_jax.adapters.names import (
    check_names,
    explicit_layers,
    flatten,
    unflatten,
)
from qlora_jax.adapters.value import other_base
from qlora_jax.config.lora import LoRAConfig
from qlora_jax.errors import (
    AdapterMismatchError,
    ConfigError,
    OutputExistsError,
    gathered,
)
from qlora_jax.exchange.digests import array_digest, text_digest
from qlora_jax.exchange.peft import (
    describe_peft,
    fit_peft,
    import_peft,
    is_peft,
    peft_misfits,
)
from qlora_jax.files import write_file
from qlora_jax.inputs import check_tree, read_json
from qlora_jax.models import Decoder
from qlora_jax.models.settings import MAX_LAYERS
from qlora_jax.models.vocabulary import check_rows, resize_tokens
from qlora_jax.nn import Linear, LoRA
from qlora_jax.schema import NULL, OBJECT, TEXT, either, listed, mapped, whole
from qlora_jax.schema import misfits as misfits_of
from qlora_jax.text.tokenizer import FILES as TOKENIZER_FILES
from qlora_jax.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

METADATA = "adapter.json"
ARRAYS = "arrays"
ADAPTER, BASE = "adapter", "base"
"""Folders that a run folder has: the adapter, and the 4-bit base that init 'pissa' made for
it."""
FORMAT = 1
_KINDS = {
    "format": whole(1, 2**31),
    "lora": OBJECT,
    "base": either(NULL, MARK),
    "arrays": mapped(listed(whole(0, 2**31), 8)),
    "layers": mapped(listed(whole(0, MAX_LAYERS - 1), MAX_LAYERS)),
    "digests": mapped(TEXT),
    "sha256": TEXT,
}
"""Fields of adapter.json -> their kinds."""

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
    if path.exists() and (path.is_file() or any(path.iterdir())):
        # Without metadata but with nothing else either: a save that was killed.
        half = overwrite and path.is_dir() and all(map(_is_ours, path.iterdir()))
        if not (path / METADATA).exists() and not half:
            raise OutputExistsError(
                f"{path} exists and is no adapter; choose another path"
            )
        if not overwrite:
            raise OutputExistsError(
                f"{path} holds an adapter; pass overwrite to replace it"
            )
    path.mkdir(parents=True, exist_ok=True)
    # First away and last written, so that it never describes other arrays.
    (path / METADATA).unlink(missing_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / ARRAYS, dict(arrays), force=True)
        checkpointer.wait_until_finished()
    if tokenizer is not None:
        tokenizer.save(path)
    write_file(path / METADATA, adapter_metadata(arrays, config, base, layers))
    return path


def adapter_metadata(
    arrays: Mapping[str, np.ndarray],
    config: LoRAConfig,
    base: dict[str, Any] | None,
    layers: Mapping[str, list[int]] | None = None,
) -> str:
    """Returns the text of an adapter's adapter.json; see `write_adapter` for the arguments.

    It has the digest of every array, and one of itself.
    """
    metadata = {
        "format": FORMAT,
        "lora": dataclasses.asdict(config),
        "base": base,
        "arrays": {name: list(x.shape) for name, x in arrays.items()},
        **({"layers": layers} if layers else {}),
        "digests": {name: array_digest(x) for name, x in arrays.items()},
    }
    metadata["sha256"] = text_digest(metadata)
    return json.dumps(metadata, indent=2) + "\n"


def _is_ours(entry: Path) -> bool:
    return entry.name.startswith((ARRAYS, METADATA)) or entry.name in TOKENIZER_FILES


def adapter_tokenizer(
    path: str | os.PathLike[str], base: Tokenizer | None
) -> Tokenizer | None:
    """Returns the tokenizer of a base with the tokens that an adapter added."""
    own = load_tokenizer(path)
    if base is None or own is None:
        return base or own
    return base.with_vocabulary(own) if own.rows > base.rows else base


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer | None:
    """Opens the tokenizer of a run folder, adapter folder or model folder.

    Returns:
      None where there is none: an adapter without new tokens has its base's.
    """
    folder = Path(path).expanduser()
    if (folder / ADAPTER / METADATA).is_file():
        folder = folder / ADAPTER
    return Tokenizer.open(folder)


def find_adapter(path: str | os.PathLike[str]) -> Path:
    """Returns the adapter folder of a run folder or of an adapter folder.

    Raises:
      AdapterMismatchError: there is none.
    """
    path = Path(path).expanduser()
    for candidate in (path, path / ADAPTER):
        if (candidate / METADATA).is_file():
            return candidate.absolute()
    if is_peft(path):
        raise AdapterMismatchError(
            f"{path} is a PEFT adapter; import it first (qlora import)"
        )
    raise AdapterMismatchError(
        f"{path} holds no adapter; expected a run folder, an adapter folder with "
        f"{METADATA}, or a PEFT folder"
    )


def changed_base(path: str | os.PathLike[str]) -> Path | None:
    """Returns the folder of the base that a run changed, which lies beside its adapter.

    Args:
      path: A run folder, the adapter folder in it, or any other adapter.

    Returns:
      None where the adapter's init changes no base, or its base is not there.
    """
    if is_peft(path):
        return None
    folder = find_adapter(path)
    base = folder.parent / BASE
    if folder.name != ADAPTER or read_adapter_config(folder).init != "pissa":
        return None
    return base if (base / "config.json").is_file() else None


def read_adapter_config(path: str | os.PathLike[str]) -> LoRAConfig:
    """Reads an adapter's rank, alpha, dropout and targets."""
    return read_metadata(find_adapter(path))[0]


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
    dense = any(
        isinstance(node, LoRA) and isinstance(node.base, Linear)
        for _, node in nnx.iter_graph(model)
    )
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


def restored(folder: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """Reads an adapter's arrays, by dotted name, and compares them with their digests.

    Adapters of versions that wrote no digests are read unchecked.

    Args:
      folder: A folder with adapter.json: an adapter's, or a checkpoint of a run.
      metadata: What adapter.json says.

    Raises:
      AdapterMismatchError: what is there is damaged; every array that is not as it was
        written is named.
    """
    place = folder / ARRAYS
    if not place.exists() and (folder / ADAPTER).is_dir():
        place = folder / ADAPTER  # of a checkpoint
    check_tree(place, AdapterMismatchError)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore(place, _abstract(metadata))
    except Exception as error:  # Orbax raises of every kind, Exception itself too
        raise AdapterMismatchError(
            f"{place} cannot be read, so it is damaged: {_first_line(error)}"
        ) from None
    digests = metadata.get("digests", {})
    problems = [
        f"{name} is not as it was written: its sha256 is {found[:12]}..., expected "
        f"{str(digests.get(name))[:12]}..."
        for name, x in arrays.items()
        if digests and (found := array_digest(x)) != digests.get(name)
    ]
    if problems:
        raise AdapterMismatchError(gathered(f"adapter {folder} is damaged", problems))
    return arrays


def check_unchanged(folder: Path, metadata: dict[str, Any]) -> None:
    """Refuses an adapter.json that is not as it was written.

    Where it does not fit the model, that says more, so it is asked for afterwards.

    Raises:
      AdapterMismatchError: it was changed, or is damaged.
    """
    own = {name: value for name, value in metadata.items() if name != "sha256"}
    if not metadata.keys() & {"sha256", "digests"}:
        return  # of a version that wrote no digests
    if text_digest(own) != metadata.get("sha256"):
        raise AdapterMismatchError(
            f"{folder / METADATA} was changed after it was written, or is damaged; to use it "
            "as it is now, take the entries sha256 and digests out of it"
        )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


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


def _abstract(metadata: dict[str, Any]) -> dict[str, Any]:
    # The arrays are restored onto this process's device, whatever saved them.
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {
        name: jax.ShapeDtypeStruct(tuple(shape), np.float32, sharding=sharding)
        for name, shape in metadata["arrays"].items()
    }


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


def read_metadata(folder: Path) -> tuple[LoRAConfig, dict[str, Any]]:
    """Reads the adapter.json of a folder.

    Raises:
      AdapterMismatchError: it cannot be read, or is of a later format.
    """
    path = folder / METADATA
    metadata = read_json(path, error=AdapterMismatchError)
    problems = misfits_of(metadata, {"format": _KINDS["format"]}, ("format",))
    if not problems and metadata["format"] > FORMAT:
        raise AdapterMismatchError(
            f"{folder} has format {metadata['format']}; this version reads up to {FORMAT}"
        )
    if "base" not in metadata:
        problems.append("base is missing")
    problems += misfits_of(metadata, _KINDS, ("lora", "arrays"))
    if problems:
        raise AdapterMismatchError(gathered(f"{path} cannot be read", problems))
    try:
        return LoRAConfig.from_json(metadata["lora"]), metadata
    except ConfigError as error:
        raise AdapterMismatchError(f"{path} cannot be read: {error}") from None
