"""GGUF files (llama.cpp): read as a model folder is, and written from one.

A GGUF file has named metadata, a tokenizer among them, and tensors that may be quantized
in blocks. What differs from a Hugging Face folder, and is undone on reading:

- Tensors have other names, and their shapes are written in reverse.
- Rows of q and k are interleaved in architecture llama: its files rotate neighbouring
  features, Hugging Face the two halves of a head.
- Gemma's norms have the 1 in them that Hugging Face adds when it runs.
- There is no output.weight where the head is the embedding.

Needs the package gguf, which is imported on use.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from qlora_jax.errors import CheckpointError, OutputExistsError, ShapeError, gathered
from qlora_jax.io import gguf_config, gguf_tokenizer
from qlora_jax.io.safetensors import Checkpoint, TensorInfo
from qlora_jax.models import FAMILIES
from qlora_jax.names import Table
from qlora_jax.text.tokenizer import Tokenizer

DTYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
"""What matrices can be written as -> its number in general.file_type."""

_EMBEDDING = "token_embd.weight"
_STORED = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_ADD = {str: "add_string", bool: "add_bool", int: "add_uint32", float: "add_float32"}


def open_gguf(path: str | os.PathLike[str]) -> "GGUF":
    """Opens a GGUF file of a known architecture.

    Raises:
      CheckpointError: it cannot be read, is of an unknown architecture, or lacks
        settings; all problems in one message.
    """
    return GGUF(Path(path))


class GGUF(Mapping[str, np.ndarray]):
    """The tensors of a GGUF file by their Hugging Face names, dequantized on access.

    Attributes:
      path: The file.
      config: What its config.json would say.
      infos: {name: TensorInfo}; the dtype is what the tensor is read as, float32 where
        it is quantized. A tensor that is none of its architecture keeps its own name.
      notes: What was left unread.
    """

    def __init__(self, path: Path):
        self.path = path
        self.notes: list[str] = []
        self._meta, tensors = _open(path)
        arch = self._arch = self._meta.get("general.architecture", "")
        dense = ", ".join(gguf_config.ARCHITECTURES)
        if arch not in gguf_config.ARCHITECTURES:
            raise CheckpointError(
                f"{path}: general.architecture is {arch!r}; known: {dense}"
            )
        problems = []
        if self._meta.get(f"{arch}.expert_count"):
            problems.append("it is a mixture of experts; only dense models are read")
        if (parts := self._meta.get("split.count", 1)) > 1:
            problems.append(
                f"it is 1 of {parts} parts; join them: llama-gguf-split --merge"
            )
        if _EMBEDDING not in tensors:
            problems.append(f"{_EMBEDDING} is missing")
        if not problems:
            factors = {
                name: tensors.pop(name).data
                for name in (gguf_config.FREQS, gguf_config.LONG, gguf_config.SHORT)
                if name in tensors
            }
            vocab_size = _shape(tensors[_EMBEDDING])[0]
            try:
                self.config, problems = gguf_config.read(
                    self._meta, tensors, factors, vocab_size
                )
            except (TypeError, ValueError, ArithmeticError, LookupError) as error:
                problems.append(f"its settings are damaged: {error!r}")
        if problems:
            raise CheckpointError(gathered(f"{path} cannot be used", problems))
        names = _names(arch, self.config["num_hidden_layers"])
        self._heads = _interleaved(
            arch, self.config["num_attention_heads"], self.config["num_key_value_heads"]
        )
        self._tensors = {names.get(name, name): t for name, t in tensors.items()}
        self.infos = {
            name: TensorInfo(
                path,
                np.dtype(_STORED.get(t.tensor_type.name, np.float32)),
                _shape(t),
                t.data_offset,
            )
            for name, t in self._tensors.items()
        }

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads one tensor.

        Raises:
          CheckpointError: it has a quantization that the package gguf does not know.
        """
        tensor, info = self._tensors[name], self.infos[name]
        rows = _permuted(tensor.data, name, self._heads, undo=True)
        if tensor.tensor_type.name in _STORED:
            w = rows.view(info.dtype).reshape(info.shape)
        else:
            try:
                w = _package().quants.dequantize(rows, tensor.tensor_type)
            except NotImplementedError as error:
                raise CheckpointError(f"{name} in {self.path}: {error}") from None
        return w - w.dtype.type(1) if _has_one(name, self._arch) else w

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor, without reading it."""
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        """Yields the names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Counts the tensors."""
        return len(self._tensors)

    def stored(self, name: str) -> tuple[str, int]:
        """Returns how a tensor is stored: the name of its kind (q4_k), and its bytes."""
        tensor = self._tensors[name]
        return tensor.tensor_type.name.lower(), int(tensor.n_bytes)

    def tokenizer(self) -> Tokenizer | None:
        """Returns the file's tokenizer, or one that lies beside it; None without any.

        Raises:
          CheckpointError: it is of an unknown kind, or damaged, and there is no
            tokenizer.json beside the file.
        """
        beside = self.path.parent
        if self._meta.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
            return Tokenizer.open(beside)
        try:
            return gguf_tokenizer.read(self._meta)
        except CheckpointError as error:
            if (beside / "tokenizer.json").exists():
                return Tokenizer.open(beside)
            raise CheckpointError(
                f"{self.path}: {error}; put the model's tokenizer.json beside the file"
            ) from None


def write_gguf(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dtype: str = "f16",
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a dense Hugging Face folder as a GGUF file, one tensor at a time.

    Args:
      folder: With config.json, safetensors and tokenizer.json.
      out: The file.
      dtype: Of matrices: 'f16', 'q8_0', 'bf16' or 'f32'. Vectors are float32, and rows
        that q8_0's blocks of 32 do not divide are float16.
      overwrite: Replace a file that exists.

    Returns:
      {"out": path, "bytes": of the file}.

    Raises:
      ShapeError: `dtype` is none of these.
      OutputExistsError: `out` exists.
      CheckpointError: the folder cannot be read, has 4-bit weights, or is a model or a
        tokenizer that llama.cpp would run otherwise.
    """
    if dtype not in DTYPES:
        raise ShapeError(f"dtype is {dtype!r}, expected {', '.join(DTYPES)}")
    from qlora_jax.io import hf  # here, as it reads GGUF files by this module

    gguf, folder, out = _package(), hf.find(folder), Path(out)
    if out.exists() and (out.is_dir() or not overwrite):
        raise OutputExistsError(
            f"{out} exists; choose another file, or pass --overwrite to replace it"
        )
    source, _, config, quantized = hf.read_config(folder)
    if quantized is not None or folder.is_file():
        raise CheckpointError(
            f"{folder} has quantized weights; a GGUF file is made from a dense folder"
        )
    arch = gguf_config.WRITTEN_AS.get(source["model_type"])
    if arch is None:
        known = ", ".join(sorted(gguf_config.WRITTEN_AS))
        raise CheckpointError(
            f"{folder}: a {source['model_type']} cannot be written as GGUF; known: {known}"
        )
    checkpoint = hf.outline(folder)[1]
    hf.say(folder, checkpoint.notes)
    names = {theirs: name for name, theirs in _names(arch, config.num_layers).items()}
    if config.tie_word_embeddings:
        names.pop("lm_head.weight", None)
    stored = [names[name] for name in checkpoint if name in names]
    meta, factors = gguf_config.write(config, arch)
    if problems := gguf_config.lost(config, meta, stored, factors):
        raise CheckpointError(gathered(f"{folder} does not fit a GGUF file", problems))
    meta |= {
        "general.type": "model",
        "general.name": folder.resolve().name,
        "general.file_type": DTYPES[dtype],
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    meta |= gguf_tokenizer.write(folder, source, config.vocab_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")
    try:
        if problems := _write(partial, meta, factors, checkpoint, names, dtype):
            raise CheckpointError(gathered(f"{folder} does not fit {dtype}", problems))
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return {"out": str(out), "bytes": out.stat().st_size}


def _package() -> ModuleType:
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise CheckpointError(
            "GGUF files need the package gguf: pip install gguf"
        ) from None
    return gguf


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a file's metadata and its tensors by name."""
    gguf = _package()
    if not path.is_file():
        raise CheckpointError(f"{path} is no file; expected a GGUF model")
    try:
        reader = gguf.GGUFReader(path)
        if reader.byte_order != "I":
            raise ValueError("its bytes are in another order than this machine's")
        meta = {key: field.contents() for key, field in reader.fields.items()}
    # A damaged file makes the reader stumble over anything.
    except (ValueError, LookupError, OverflowError, TypeError, MemoryError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as GGUF: {error}; if it "
            "is truncated or corrupt, fetch it again"
        ) from None
    return meta, {tensor.name: tensor for tensor in reader.tensors}


def _names(arch: str, layers: int) -> dict[str, str]:
    """Returns {name in the file: Hugging Face name} of every tensor of a model."""
    gguf = _package()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[arch], layers)
    family = FAMILIES[gguf_config.ARCHITECTURES[arch].model_type]
    names = {}
    for _, name in Table(family.NAMES, layers).all():
        stem, _, end = name.rpartition(".")
        if (stored := table.get_name(stem)) is not None:
            names[f"{stored}.{end}"] = name
    return names


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def _has_one(name: str, arch: str) -> bool:
    return arch.startswith("gemma") and name.endswith("norm.weight")


def _interleaved(arch: str, heads: int, kv_heads: int) -> dict[str, int]:
    """Returns {linear: its heads} of those whose rows an architecture interleaves."""
    return {"q_proj": heads, "k_proj": kv_heads} if arch == "llama" else {}


def _permuted(
    rows: np.ndarray, name: str, interleaved: dict[str, int], *, undo: bool
) -> np.ndarray:
    """Puts the rows of q and k from Hugging Face's order into llama's, or back.

    They may be quantized: blocks lie within a row.
    """
    heads = interleaved.get(name.split(".")[-2] if "." in name else name)
    if heads is None:
        return rows
    halves = (-1, 2) if undo else (2, -1)
    apart = rows.reshape(heads, *halves, *rows.shape[1:])
    return np.ascontiguousarray(apart.swapaxes(1, 2)).reshape(rows.shape)


def _write(
    path: Path,
    meta: dict[str, Any],
    factors: dict[str, np.ndarray],
    checkpoint: Checkpoint | GGUF,
    names: dict[str, str],
    dtype: str,
) -> list[str]:
    """Writes a file; returns the tensors that its dtype cannot hold."""
    gguf, problems = _package(), []
    arch = meta["general.architecture"]
    heads = _interleaved(
        arch,
        meta[f"{arch}.attention.head_count"],
        meta[f"{arch}.attention.head_count_kv"],
    )
    writer = gguf.GGUFWriter(path, arch)
    for key, value in meta.items():
        if key != "general.architecture":  # the writer's own
            getattr(writer, _ADD.get(type(value), "add_array"))(key, value)
    kept = {name: checkpoint.infos[name].shape for name in checkpoint if name in names}
    kinds = {}
    for name, shape in ({n: w.shape for n, w in factors.items()} | kept).items():
        kinds[name] = kind = gguf.GGMLQuantizationType[_kind(shape, dtype)]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        size_bytes, float32 = math.prod(shape) // block * size, np.dtype(np.float32)
        writer.add_tensor_info(names.get(name, name), shape, float32, size_bytes, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, kind in kinds.items():
            w = np.asarray(factors[name] if name in factors else checkpoint[name])
            w = _permuted(w.astype(np.float32), name, heads, undo=False)
            w = w + np.float32(_has_one(name, arch))
            largest = np.finfo(np.float16 if kind.name == "F16" else np.float32).max
            if not (np.abs(w) <= largest).all():
                problems.append(f"{name}: NaN or Inf values (or too large for it)")
                w = np.zeros_like(w)
            writer.write_tensor_data(gguf.quants.quantize(w, kind))
    finally:
        writer.close()
    return problems


def _kind(shape: tuple[int, ...], dtype: str) -> str:
    """Returns the type that a tensor is written as."""
    if len(shape) == 1:
        return "F32"
    return "F16" if dtype == "q8_0" and shape[-1] % 32 else dtype.upper()
