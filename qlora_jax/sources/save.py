"""Saving a model as a Hugging Face folder, from a model or parameter by parameter."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.formats import PackedWeight
from qlora_jax.errors import CheckpointError
from qlora_jax.files import NewFolder, check_output, new_folder
from qlora_jax.models import (
    Decoder,
    DecoderConfig,
    config_json,
    fused_in,
    hf_table,
    llama,
)
from qlora_jax.models.fused import Joining
from qlora_jax.names import (
    TABLES,
    Numbered,
    Table,
    dotted,
    template_of,
)
from qlora_jax.sources import bitsandbytes
from qlora_jax.sources.source import Source, open_source
from qlora_jax.sources.writer import Writer, weight_files
from qlora_jax.text.folder import check_copies, copy_tokenizer, refuse_another

MERGE_REPORT = "merge_report.json"
"""The file in which a merge says, beside the merged model, what it lost."""


def save_model(
    model: nnx.Module,
    out: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | Source | None = None,
    overwrite: bool = False,
    shard_bytes: int = 4 << 30,
) -> dict[str, Any]:
    """Saves a Hugging Face folder: 4-bit linears with bitsandbytes' keys, dense as is.

    A 4-bit embedding or head is written dense, as other tools have it; one in int8 as it
    is, in a folder that opens in qlora_jax alone.

    Args:
      model: A model without adapters (merge first).
      out: The folder.
      source: The model's original folder or file, whose config and tokenizer go along;
        without it the config is written as a Llama's.
      overwrite: Write into a folder that is not empty. A model there is replaced whole and
        at once; see `qlora_jax.files` for what is kept.
      shard_bytes: Largest size of a file.

    Returns:
      {"out": path, "bytes": of all tensors}.

    Raises:
      OutputExistsError: see `check_output` and `write_folder`.
      OutputError: the folder cannot be written; one that was there is as it was.
      CheckpointError: the model has adapters attached, or values that are not finite
        (as of weights too large for float16); nothing is written then.
    """
    out = Path(out)
    if not isinstance(model, Decoder):
        raise CheckpointError(
            f"save_model writes Hugging Face folders, whose names only a Decoder has; of "
            f"{type(model).__name__} save nnx.state(model) with Orbax, or its adapter alone "
            "with save_adapter"
        )
    check_output(out, overwrite)
    if nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        raise CheckpointError(
            "the model has adapters attached; merge before save_model"
        )
    origin = None if source is None else open_source(source)
    hf = config_json.write_config(model.config) if origin is None else origin.hf
    config = saved_config(model)
    with new_model_folder(out, origin) as new:
        return write_folder(
            _parameters(model, saved_names(config, origin), joining(config, origin)),
            *(config, model.compute_dtype.name, hf, new),
            origin=origin,
            shard_bytes=shard_bytes,
        )


@contextlib.contextmanager
def new_model_folder(out: Path, origin: Source | None) -> Iterator[NewFolder]:
    """Gives the folder to write a model into with `write_folder`; it is then put in place.

    A model that is in `out` is replaced whole: config, weights and tokenizer.

    Args:
      out: The folder.
      origin: See `write_folder`.

    Raises:
      OutputError: see `new_folder`.
      CheckpointError: the tokenizer of `origin` lies elsewhere, see `check_copies`.
    """
    if origin is not None and not origin.is_gguf:
        check_copies(origin.path)
    weights = weight_files(out)
    with new_folder(
        out,
        opened_by="config.json",
        replaces=lambda name: name in weights or name == MERGE_REPORT,
    ) as new:
        yield new


def saved_config(model: Decoder) -> DecoderConfig:
    """Returns the config of the folder that a model becomes."""
    tied = model.lm_head is None
    return dataclasses.replace(model.config, tie_word_embeddings=tied)


def saved_names(config: DecoderConfig, origin: Source | None) -> Table:
    """Returns what a folder calls each parameter: as its source does, or a Llama's."""
    if origin is not None:
        return hf_table(config)
    return Table(llama.NAMES, config.num_layers, config.num_experts)


class Place(NamedTuple):
    """One layer (and expert) of a parameter.

    Attributes:
      numbered: What it is called here, without regard to how a model stacks it.
      name: The name in the folder.
      module: Path in the model of the module that has it.
      variable: The model's variable that holds it, stacked.
      at: Index in the variable's leading axes.
    """

    numbered: Numbered
    name: str
    module: tuple[Any, ...]
    variable: nnx.Variable
    at: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """One layer's parameter has this shape; the leading axes of the stack are not in it."""
        return self.variable.get_value().shape[len(self.at) :]


def places(model: Decoder, table: Table) -> Iterator[Place]:
    """Yields the places of all parameters, in a folder's order.

    Args:
      model: May be shapes alone; dense where `Place.shape` is asked for.
      table: The names in the folder, from `saved_names`.
    """
    for keys, variable in nnx.to_flat_state(nnx.state(model)):
        path = dotted(keys)
        stack = np.ndindex(*table.stack(path))
        for name, index in zip(table.names(path), stack, strict=True):
            yield Place(Numbered.at(keys, index), name, keys[:-1], variable, index)


def as_saved(path: str, value: Any, dtype: str) -> Any:
    """Returns a value as a folder has it: a 4-bit embedding or head is dense there."""
    outer = path.rpartition(".")[0] in TABLES
    if outer and isinstance(value, PackedWeight) and value.LISTED_AS is None:
        return value.decode(dtype)
    return value


def joining(config: DecoderConfig, origin: Source | None) -> Joining:
    """Returns what joins the experts of a layer where files of the model's family do."""
    fused = () if origin is None else fused_in(origin.family)
    return Joining(fused, config.num_experts)


def _parameters(
    model: Decoder, table: Table, joining: Joining
) -> Iterator[tuple[str, Any]]:
    """Yields every parameter by its name, one layer (and expert) at a time."""
    for place in joining.ordered(places(model, table), lambda place: place.name):
        value = as_saved(place.numbered.path, place.variable.get_value(), model.dtype)
        yield place.name, value[place.at]


def write_folder(
    parameters: Iterable[tuple[str, Any]],
    config: DecoderConfig,
    dtype: str,
    hf: dict[str, Any],
    new: NewFolder,
    *,
    origin: Source | None,
    shard_bytes: int = 4 << 30,
) -> dict[str, Any]:
    """Writes a model's folder from its parameters, which need never be there at once.

    Args:
      parameters: Names and values, in order: arrays or packed weights. Where the family's
        files hold the experts of a layer together, these wait until all are there.
      config: The config of the model.
      dtype: The name of the dtype that the model computes in.
      hf: A config.json, whose quantization, dtype and vocabulary are replaced.
      new: The folder, from `new_model_folder`.
      origin: The source whose tokenizer goes along; None for no tokenizer.
      shard_bytes: Largest size of a file; so much waits in memory.

    Returns:
      {"out": path, "bytes": of all tensors}.

    Raises:
      CheckpointError: values that are not finite, or whatever `parameters` raises.
      OutputExistsError: the old folder has a tokenizer's files that would be taken for the
        new model's.
    """
    # Linears that stay dense in 4-bit folders: what the source says, and a router, which
    # transformers 4 would take for 4-bit.
    before = bitsandbytes.linears_config(hf) or {}
    hf.pop("quantization_config", None)
    skip = before.get("llm_int8_skip_modules")
    if skip is None and config.num_experts:
        skip = ["lm_head", "gate"]
    hf.pop("dtype", None)
    hf["torch_dtype"] = dtype
    hf["vocab_size"] = config.vocab_size
    if config.per_layer_vocab:
        hf["vocab_size_per_layer_input"] = config.per_layer_vocab
    hf["tie_word_embeddings"] = config.tie_word_embeddings
    if origin is not None and not origin.is_gguf:
        copy_tokenizer(origin.path, new.path)
    elif origin is not None and origin.tokenizer is not None:
        origin.tokenizer.save(new.path)
    refuse_another(new)
    writer = Writer(new.path, shard_bytes)
    joined = joining(config, origin)
    quantization = _write(parameters, writer, joined, dtype, skip)
    size = writer.close()
    new.digests |= writer.digests
    if quantization is not None:
        hf["quantization_config"] = quantization
    text = json.dumps(hf, indent=2) + "\n"
    (new.path / "config.json").write_text(text, encoding="utf-8")
    return {"out": str(new.out), "bytes": size}


def _write(
    parameters: Iterable[tuple[str, Any]],
    writer: Writer,
    joined: Joining,
    dtype: str,
    skip: list[str] | None,
) -> dict[str, Any] | None:
    """Writes all parameters; returns the quantization_config of what is quantized."""

    def write(key: str, array: np.ndarray) -> None:
        for name, whole in joined.add(key, array):
            writer.add(name, whole)

    linears: dict[str, dict[str, Any]] = {}
    tables: dict[str, list[str]] = {}
    packed, dense, own = [], [], False
    for name, value in parameters:
        if not isinstance(value, PackedWeight):
            write(name, np.asarray(value))
            dense.append(name)
            continue
        _check_range(writer, name, value)
        for key, array in value.storage(name).items():
            # Codes that have the weight's own name are no values of the whole's.
            (writer.add if key == name else write)(key, array)
        if value.KNOWN_AS is not None:
            said = bitsandbytes.quantization_config(value, dtype, skip)
            linears[value.KNOWN_AS] = said
            # transformers has MXFP4 in the tensors of all experts that gpt-oss's files have.
            apart = not joined.takes(value.part(name, value.MARK))
            own |= value.KNOWN_AS == bitsandbytes.MXFP4 and apart
            packed.append(name)
        else:
            assert value.LISTED_AS is not None
            module = name.removesuffix(".weight")
            tables.setdefault(value.LISTED_AS, []).append(module)
    writer.problems += joined.incomplete()
    if (bnb := linears.get("bitsandbytes")) is not None:
        bnb["llm_int8_skip_modules"] = _skipped(skip, packed, dense)
    return bitsandbytes.folder_config(linears, tables, own)


def _skipped(
    before: list[str] | None, packed: list[str], dense: list[str]
) -> list[str] | None:
    """Returns which modules other tools must take for dense, as transformers reads the list.

    Args:
      before: The list of the folder that a model came from.
      packed, dense: Names of the tensors that were written in 4 bits, and dense.
    """
    four_bit, plain = (
        [name.removesuffix(".weight") for name in names] for names in (packed, dense)
    )
    # An entry that stands for a module which is 4-bit now would have it read as dense.
    wrong = [e for e in before or () if any(_stands_for(e, one) for one in four_bit)]
    # What other layers have in 4 bits, or such an entry stood for, is named by itself.
    kinds = {template_of(name) for name in packed}
    own = [
        module
        for module, name in zip(plain, dense, strict=True)
        if template_of(name) in kinds or any(_stands_for(e, module) for e in wrong)
    ]
    if not (wrong or own):
        return before
    rest = [e for e in before or ["lm_head"] if e not in wrong]
    return list(dict.fromkeys([*rest, *own]))


def _stands_for(entry: str, module: str) -> bool:
    """Whether an entry of llm_int8_skip_modules means a module, as transformers 5 has it.

    Source: transformers quantizers/quantizers_utils.py, should_convert_module.
    """
    return module.startswith(entry) or module.endswith(entry)


def _check_range(writer: Writer, name: str, w: PackedWeight) -> None:
    """Refuses a quantized weight whose largest values its dtype cannot hold."""
    limit, largest = float(jnp.finfo(w.dtype).max), float(w.largest())
    if not largest <= limit:
        writer.problems.append(
            f"{name}: quantized values up to {largest:.4g}, beyond {limit:.5g}, the largest "
            f"of {w.dtype}; save in bfloat16 or float32 (--dtype)"
        )
