"""Writing a model folder as a GGUF file, one tensor at a time."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.errors import CheckpointError, OutputExistsError, ShapeError, gathered
from qlora_jax.files import new_file
from qlora_jax.sources import bitsandbytes
from qlora_jax.sources.gguf import config as gguf_config
from qlora_jax.sources.gguf import tokenizer as gguf_tokenizer
from qlora_jax.sources.gguf.architectures import WRITTEN_AS, written_as
from qlora_jax.sources.gguf.forms import (
    file_shape,
    interleaved,
    permuted,
    to_file,
)
from qlora_jax.sources.gguf.places import Place, names_of, package
from qlora_jax.sources.load import outline
from qlora_jax.sources.source import Source, open_source, say

DTYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
"""What matrices can be written as -> its number in general.file_type."""

_ADD = {str: "add_string", bool: "add_bool", int: "add_uint32", float: "add_float32"}


def write_gguf(
    folder: str | os.PathLike[str] | Source,
    out: str | os.PathLike[str],
    dtype: str = "f16",
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a dense Hugging Face folder as a GGUF file, one tensor at a time.

    Args:
      folder: A dense folder with config.json, safetensors and tokenizer.json.
      out: The file.
      dtype: The dtype of matrices: 'f16', 'q8_0', 'bf16' or 'f32'. Vectors and routers are
        float32, and rows that q8_0's blocks of 32 do not divide are float16.
      overwrite: Replace a file that exists.

    Returns:
      {"out": path, "bytes": of the file}.

    Raises:
      ShapeError: `dtype` is none of these.
      OutputExistsError: `out` exists.
      CheckpointError: the folder cannot be read, has 4-bit weights, or is a model or a
        tokenizer that llama.cpp would run otherwise.
      OutputError: the file cannot be written; one that was there is as it was.
    """
    if dtype not in DTYPES:
        raise ShapeError(f"dtype is {dtype!r}, expected {', '.join(DTYPES)}")
    gguf, source, out = package(), open_source(folder), Path(out)
    if out.exists() and (out.is_dir() or not overwrite):
        raise OutputExistsError(
            f"{out} exists; choose another file, or pass --overwrite to replace it"
        )
    config, kind = source.config, source.hf["model_type"]
    kept = bitsandbytes.mxfp4_config(source.hf)
    if source.stored is not None or kept is not None or source.is_gguf:
        raise CheckpointError(
            f"{source} has quantized weights; a GGUF file is made from a dense folder"
        )
    arch = written_as(kind, config)
    if arch is None:
        known = ", ".join(sorted(WRITTEN_AS))
        raise CheckpointError(
            f"{source}: a {kind} cannot be written as GGUF; known: {known}"
        )
    say(source.path, outline(source).notes)
    checkpoint = source.tensors
    places = names_of(arch, config)
    if config.tie_word_embeddings:
        places.pop("lm_head.weight", None)
    stored: dict[str, list[str]] = {}
    for name, place in places.items():  # in the order of the experts
        if name in checkpoint:
            for one in place.stored:
                stored.setdefault(one, []).append(name)
    meta, factors = gguf_config.write(config, arch)
    if problems := gguf_config.lost(config, meta, stored, factors):
        raise CheckpointError(gathered(f"{source} does not fit a GGUF file", problems))
    meta |= {
        "general.type": "model",
        "general.name": source.path.resolve().name,
        "general.file_type": DTYPES[dtype],
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    meta |= gguf_tokenizer.write(source.path, source.hf, config.vocab_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    with new_file(out, overwrite=overwrite) as beside:
        problems = _write(beside, meta, factors, source, places, stored, dtype)
        if damage := source.damage():
            raise CheckpointError(gathered(f"{source} has unusable weights", damage))
        if problems:
            raise CheckpointError(gathered(f"{source} does not fit {dtype}", problems))
    return {"out": str(out), "bytes": out.stat().st_size}


def _write(
    path: Path,
    meta: dict[str, Any],
    factors: dict[str, np.ndarray],
    source: Source,
    places: dict[str, Place],
    stored: dict[str, list[str]],
    dtype: str,
) -> list[str]:
    """Writes a file; returns the tensors that its dtype cannot hold.

    Args:
      path: The file.
      meta, factors: From `gguf.config.write`.
      source: The folder.
      places: Where the file has its tensors, from `names_of`.
      stored: {name in the file: names of the tensors that it holds}.
      dtype: See `write_gguf`.
    """
    gguf, problems, config = package(), [], source.config
    arch = meta["general.architecture"]
    heads = interleaved(arch, config)
    writer = gguf.GGUFWriter(path, arch)
    for key, value in meta.items():
        if key != "general.architecture":  # the writer's own
            getattr(writer, _ADD.get(type(value), "add_array"))(key, value)
    checkpoint = source.tensors

    def tensor(name: str, one: str) -> np.ndarray:
        """Returns what a tensor of the file has of one of the folder's."""
        w = np.asarray(factors[one] if one in factors else checkpoint[one], np.float32)
        w = to_file(permuted(w, one, heads, undo=False), one, arch, config)
        if one in places and (joint := places[one].joint) is not None:
            return joint.cut(w, config)[places[one].stored.index(name)]
        return w.reshape(file_shape(one, arch, w.shape, config))

    shapes = {name: w.shape for name, w in factors.items()}
    for name, held in stored.items():
        one = held[0]
        if places[one].joint is not None:
            shape = tensor(name, one).shape
        else:
            shape = file_shape(one, arch, checkpoint.infos[one].shape, config)
        shapes[name] = (len(held), *shape) if "_exps." in name else shape
    kinds = {}
    for name, shape in shapes.items():
        kinds[name] = kind = gguf.GGMLQuantizationType[_kind(name, shape, dtype)]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        size_bytes, float32 = math.prod(shape) // block * size, np.dtype(np.float32)
        writer.add_tensor_info(name, shape, float32, size_bytes, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, kind in kinds.items():
            largest = np.finfo(np.float16 if kind.name == "F16" else np.float32).max
            made = []
            for one in stored.get(name, [name]):
                w = tensor(name, one)
                if not (np.abs(w) <= largest).all():
                    problems.append(f"{one}: NaN or Inf values (or too large for it)")
                    w = np.zeros_like(w)
                made.append(gguf.quants.quantize(w, kind))
            writer.write_tensor_data(np.stack(made) if "_exps." in name else made[0])
    finally:
        writer.close()
    return problems


def _kind(name: str, shape: tuple[int, ...], dtype: str) -> str:
    """Returns the type that a tensor is written as."""
    if len(shape) == 1 or name.endswith(".bias") or "ffn_gate_inp" in name:
        return "F32"
    if any(part in name for part in ("ssm_conv1d", "shortconv.conv", "ssm_norm")):
        return "F32"  # llama.cpp takes no others
    if name.endswith(("ssm_a", "ssm_d")):
        return "F32"
    return "F16" if dtype == "q8_0" and shape[-1] % 32 else dtype.upper()
