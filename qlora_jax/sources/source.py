"""What a base is read from: its config, and its tensors under their usual names.

A folder or GGUF file is taken as transformers takes it (5.24): tensors whose names lack
`model.` or have it twice get their usual ones, the language model of a multimodal folder
is opened alone (models/wrappers.py), and a head that differs from the embedding is used
though config.json says that they are tied. Tensors that the model has no place for are
left out, and named once; one that it lacks is an error.
"""

import copy
import dataclasses
import functools
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pallas_kernels.formats import renamed, weight_of
from pallas_kernels.formats.absmax4.storage import stored_block_size
from qlora_jax.config.quant import QuantConfig
from qlora_jax.errors import CheckpointError, gathered
from qlora_jax.inputs import read_json
from qlora_jax.models import (
    FAMILIES,
    DecoderConfig,
    fused_in,
    hf_table,
    read_config,
)
from qlora_jax.models.fused import cuts
from qlora_jax.models.nearest import nearest
from qlora_jax.models.settings import misfitting_quantization
from qlora_jax.models.wrappers import WRAPPERS, unwrap, without_wrapper
from qlora_jax.names import STACK, template_of
from qlora_jax.sources import bitsandbytes
from qlora_jax.sources.encoded import Encoding, join, read_encoding
from qlora_jax.sources.gguf.file import GGUF, open_gguf
from qlora_jax.sources.hub import find, is_gguf
from qlora_jax.sources.safetensors import Checkpoint, TensorInfo, shortened
from qlora_jax.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

HF_EMBEDDING, HF_HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Source:
    """An opened checkpoint: a folder, or a GGUF file. Whatever is asked of it is read once.

    Attributes:
      path: The path of the folder or file.
    """

    def __init__(self, path: Path):
        self.path = path

    def __str__(self) -> str:
        """Returns the path."""
        return str(self.path)

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF file."""
        return is_gguf(self.path)

    @property
    def hf(self) -> dict[str, Any]:
        """A copy of config.json's object; of a multimodal model its text model's alone."""
        return copy.deepcopy(self._settings[0])

    @property
    def family(self) -> ModuleType:
        """The module that knows the model_type."""
        return FAMILIES[self.config.model_type]

    @property
    def config(self) -> DecoderConfig:
        """The model's shape."""
        return self._settings[1]

    @property
    def stored(self) -> QuantConfig | None:
        """The settings that the stored linears were quantized with; None for a dense model."""
        return self._settings[2]

    @functools.cached_property
    def encoding(self) -> Encoding | None:
        """The form of another library that its linears are decoded from as they are read."""
        return read_encoding(self._written[0])[0]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer; None where it has none."""
        if self.is_gguf:
            return self._gguf.tokenizer()
        return Tokenizer.open(self.path)

    @property
    def notes(self) -> list[str]:
        """Sentences for the user on what was left out, or read otherwise than it is written."""
        return self.tensors.notes

    @functools.cached_property
    def tensors(self) -> "Checkpoint | GGUF":
        """The tensors, by their usual names; those that the family lacks keep their own."""
        _, config, _, named = self._written
        if self.is_gguf:
            _check_size(self.path, config, self._gguf)
            return self._gguf
        checkpoint = Checkpoint(self.path)
        if self.encoding is not None:
            join(checkpoint, self.encoding)
        family = FAMILIES[config.model_type]
        known = {*family.NAMES.values(), *(one.name for one in fused_in(family))}
        wrapped = named in WRAPPERS
        checkpoint.rename(lambda name: _usual(name, known, wrapped))
        infos = checkpoint.infos
        if (
            config.tie_word_embeddings
            and HF_EMBEDDING not in infos
            and HF_HEAD in infos
        ):
            infos[HF_EMBEDDING] = infos.pop(HF_HEAD)  # the same table by its other name
        self._cut(checkpoint, config)
        _check_size(self.path, config, infos)
        if wrapped:
            checkpoint.notes.append(
                f"it is a {named}: its text model is opened alone, as {config.model_type}"
            )
        if (self.path / "adapter_config.json").exists():
            checkpoint.notes.append(
                "adapter_config.json is there: its adapter is not applied (--adapter does)"
            )
        return checkpoint

    def _cut(self, checkpoint: Checkpoint, config: DecoderConfig) -> None:
        """Cuts tensors that hold all experts of a layer."""
        fused, problems = fused_in(FAMILIES[config.model_type]), []
        shapes = {name: info.shape for name, info in checkpoint.infos.items()}
        for name, one, places in cuts(fused, shapes, config.num_experts):
            if not places:
                problems.append(
                    f"{name} has shape {shapes[name]}, which does not hold the "
                    f"{len(one.parts)} matrices of {config.num_experts} experts"
                )
                continue
            shape = one.part_shape(shapes[name])
            checkpoint.split(
                name,
                {
                    part: (shape, functools.partial(one.cut, place=place))
                    for part, place in places.items()
                },
            )
        if problems:
            raise CheckpointError(
                gathered(f"{self.path} does not fit its config.json", problems)
            )

    def damage(self) -> list[str]:
        """Returns a sentence for each tensor, of those read so far, that is damaged.

        Known are those of folders with digests, which qlora_jax wrote.
        """
        return self.tensors.damage()

    @functools.cached_property
    def _gguf(self) -> GGUF:
        return open_gguf(self.path)

    @functools.cached_property
    def _written(
        self,
    ) -> tuple[dict[str, Any], DecoderConfig, QuantConfig | None, str]:
        """Reads config.json alone; the last value is the model_type that it names."""
        where = self.path / "config.json"
        if self.is_gguf:
            hf = dict(self._gguf.config)
        elif os.path.lexists(where):
            hf = read_json(where)
        else:
            raise CheckpointError(_no_model(self.path))
        return _parsed(hf, where)

    @functools.cached_property
    def _settings(self) -> tuple[dict[str, Any], DecoderConfig, QuantConfig | None]:
        """config.json, and what the weights themselves say where there are any.

        They say whether the embedding is the head, and how 4-bit ones are stored.
        """
        hf, config, stored, _ = self._written
        asks = stored is not None or config.tie_word_embeddings
        if self.is_gguf or not asks or not any(self.path.glob("*.safetensors")):
            return hf, config, stored
        if stored is not None:
            size = stored_block_size(self.tensors)
            stored = dataclasses.replace(stored, block_size=size)
            config = with_dense_linears(config, self.tensors)
        if _has_own_head(self.tensors, config):
            hf = {**hf, "tie_word_embeddings": False}
            config = dataclasses.replace(config, tie_word_embeddings=False)
            self.notes.append(
                f"config.json says tie_word_embeddings, but {HF_HEAD} differs from the "
                "embedding: the head is used, as by transformers 5"
            )
        return hf, config, stored


def open_source(
    path_or_repo: "str | os.PathLike[str] | Source", revision: str | None = None
) -> Source:
    """Opens a folder, a GGUF file or a hub id; one that is open stays so.

    What is in it is read when it is asked for, and CheckpointError raised then.

    Raises:
      CheckpointError: there is none.
    """
    if isinstance(path_or_repo, Source):
        return path_or_repo
    return Source(find(path_or_repo, revision))


def _parsed(
    hf: dict[str, Any], where: Path
) -> tuple[dict[str, Any], DecoderConfig, QuantConfig | None, str]:
    """Reads the object of a config.json; the last value is the model_type that it names."""
    named = hf.get("model_type")
    if not isinstance(named, str) or named not in FAMILIES.keys() | WRAPPERS.keys():
        known = sorted(FAMILIES) + [f"{name} (its text)" for name in sorted(WRAPPERS)]
        raise CheckpointError(
            f"{where}: model_type is {named!r}; known architectures: {', '.join(known)}. "
            f"{nearest(hf, _tensors(where.parent, hf))}"
        )
    config, stored = None, None
    # What it says of its weights first: the text model of a wrapper takes a part of that.
    inner = hf.get("text_config")
    problems = misfitting_quantization(hf)
    problems += misfitting_quantization(inner) if isinstance(inner, dict) else []
    if not problems and named in WRAPPERS:
        hf, problems = unwrap(hf)
        if problems and isinstance(inner, dict):  # a text model of no family here
            problems.append(nearest(hf, _tensors(where.parent, hf)))
    if not problems:
        config, found = read_config(hf)
        encoding, more = read_encoding(hf)
        if encoding is None:
            stored, more = bitsandbytes.read_quantization_config(hf)
        problems = [*found, *more]
    if problems:
        raise CheckpointError(gathered(f"{where} cannot be used", problems))
    assert config is not None
    return hf, config, stored, named


def _tensors(folder: Path, hf: dict[str, Any]) -> Collection[str]:
    """Returns the names of the tensors of a folder, none where they cannot be read."""
    try:
        checkpoint = Checkpoint(folder)
        encoding = None if misfitting_quantization(hf) else read_encoding(hf)[0]
        if encoding is not None:
            join(checkpoint, encoding)
        return checkpoint.infos.keys()
    except CheckpointError:  # config.json, which is refused already, says enough
        return ()


def _check_size(path: Path, config: DecoderConfig, names: Collection[str]) -> None:
    """Refuses settings of more layers or experts than there are tensors.

    What they say is compared tensor by tensor, which takes time and memory for each.
    """
    for count, said in (
        (config.num_layers, "num_hidden_layers"),
        (config.num_experts, "experts"),
    ):
        if count > len(names):
            raise CheckpointError(
                f"{path}: its settings say {said} {count}, and it has {len(names)} tensors "
                "in all"
            )


def _no_model(folder: Path) -> str:
    """Says what a folder without config.json is, as far as its files tell."""
    text = f"{folder} has no config.json"
    if (folder / "adapter_config.json").exists():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        return (
            f"{text}: it is a PEFT adapter. Give it as --adapter, and its base "
            f"({base or 'which its adapter_config.json does not name'}) as --model"
        )
    if (folder / "adapter").is_dir() or (folder / "adapter.json").exists():
        return (
            f"{text}: it is a run's or an adapter's folder. Give it as --adapter, and its "
            "base as --model"
        )
    if files := sorted(path.name for path in folder.glob("*.gguf")):
        return f"{text}, but GGUF files; give one of them: {shortened(files)}"
    return f"{text}; expected a Hugging Face model folder"


def _usual(name: str, known: Collection[str], wrapped: bool) -> str:
    """Returns the usual name of a tensor: its own where none fits."""
    weight = weight_of(name)
    inner = without_wrapper(weight) if wrapped else weight
    for one in (inner, f"model.{inner}", inner.removeprefix("model.")):
        if template_of(one) in known:
            return renamed(name, one)
    return name


def _has_own_head(checkpoint: Checkpoint | GGUF, config: DecoderConfig) -> bool:
    """Whether the files have a head of their own, though config.json says tied."""
    infos = checkpoint.infos
    if not config.tie_word_embeddings or not (
        HF_EMBEDDING in infos and HF_HEAD in infos
    ):
        return False
    table, head = infos[HF_EMBEDDING], infos[HF_HEAD]
    if table.shape != head.shape:
        return True
    if table.encoded is not None or head.encoded is not None:
        return not np.array_equal(checkpoint[HF_EMBEDDING], checkpoint[HF_HEAD])
    return not _equal(table, head)


def _equal(a: TensorInfo, b: TensorInfo) -> bool:
    """Compares two matrices by value, some rows at a time."""
    x, y = (np.memmap(i.file, i.dtype, "r", i.start, i.shape) for i in (a, b))
    rows = max(1, (16 << 20) // max(1, x[:1].nbytes))
    return all(
        np.array_equal(x[i : i + rows], y[i : i + rows])
        for i in range(0, x.shape[0], rows)
    )


def left_out(
    tensors: Iterable[str], wanted: Collection[str], family: ModuleType, layers: int
) -> list[str]:
    """Returns what a model has no place for, a line for each kind.

    Args:
      tensors: Names in the files.
      wanted: Names that the model is made of.
      family: Its module; what that ignores is not named.
      layers: The number of layers of the model.
    """
    kinds: Counter[str] = Counter()
    for name in tensors:
        weight = weight_of(name)
        if name in wanted or (name != weight and weight in wanted):
            continue
        # A head that is the embedding once more loses nothing.
        if not name.endswith(family.IGNORED) and weight != HF_HEAD:
            kinds[_kind(weight, layers)] += 1
    return [
        f"{kind} ({kinds[kind]} tensor{'s' if kinds[kind] > 1 else ''})"
        for kind in sorted(kinds, key=_natural)
    ]


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 13."""
    parts = re.split(r"(\d+)", text)
    return [(int(p), "") if p.isdigit() else (-1, p) for p in parts]


def _kind(name: str, layers: int) -> str:
    place = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    if name.startswith("model.layers.") and place and int(place[1]) >= layers:
        return f"layer {place[1]} of {layers}"
    parts = name.split(".")
    if name.startswith("model.layers."):
        return template_of(name).replace("{}", "*")
    first = 2 if parts[0] == "model" else 1
    return name if len(parts) <= first + 1 else ".".join(parts[:first]) + ".*"


def misnamed(missing: Iterable[str], tensors: Collection[str]) -> str | None:
    """Says what stands before the names of tensors that seem to be missing."""
    for name in missing:
        for found in tensors:
            if found.endswith(f".{name}"):
                before = found.removesuffix(name)
                return (
                    f"{name} may be {found}: save the model itself, not what it is "
                    f"wrapped in, so that names do not begin with {before!r}"
                )
    return None


def say(path: Path, notes: list[str]) -> None:
    """Logs what a user should know of a source, as one warning."""
    if notes:
        logger.warning("%s: %s", path, "; ".join(notes))


def with_dense_linears(
    config: DecoderConfig, tensors: Collection[str]
) -> DecoderConfig:
    """Returns a config whose layers say which linears a 4-bit folder keeps dense in them.

    Only what is 4-bit in other layers is marked: layers of one stack must be stored alike.

    Args:
      config: The config of the model.
      tensors: Names in the folder's files.
    """
    table = hf_table(config)
    dense: dict[int, set[str]] = {}
    packed: set[str] = set()
    for place, name in table.all():
        if not place.numbers or not place.path.endswith(".kernel"):
            continue
        linear = place.path.removeprefix(f"{STACK}.").removesuffix(".kernel")
        if bitsandbytes.is_packed(tensors, name):
            packed.add(linear)
        elif name in tensors:
            dense.setdefault(place.numbers[0], set()).add(linear)
    marks = {layer: tuple(sorted(linears & packed)) for layer, linears in dense.items()}
    if not any(marks.values()):
        return config
    specs = [
        dataclasses.replace(spec, dense=marks.get(layer, ()))
        for layer, spec in enumerate(config.specs)
    ]
    return dataclasses.replace(config, layers=tuple(specs))
