"""A GGUF file as a source of tensors.

A GGUF file has named metadata, a tokenizer among them, and tensors that may be quantized
in blocks. What differs from a Hugging Face folder, and is undone on reading:

- Tensors have other names, and their shapes are written in reverse.
- Rows of q and k are interleaved in architectures llama and arcee: their files rotate
  neighbouring features, Hugging Face the two halves of a head.
- Gemma's norms have the 1 in them that Hugging Face adds when it runs.
- There is no output.weight where the head is the embedding.

Needs the package gguf, which is imported on use.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from qlora_jax.errors import CheckpointError, gathered
from qlora_jax.models import FAMILIES
from qlora_jax.names import Table
from qlora_jax.sources.gguf import config as gguf_config
from qlora_jax.sources.gguf import scan
from qlora_jax.sources.gguf import tokenizer as gguf_tokenizer
from qlora_jax.sources.gguf.architectures import ARCHITECTURES
from qlora_jax.sources.safetensors import TensorInfo
from qlora_jax.text.tokenizer import Tokenizer

_EMBEDDING = "token_embd.weight"
_STORED = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


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
        if problems := gguf_config.misfitting(self._meta):
            raise CheckpointError(gathered(f"{path} cannot be used", problems))
        arch = self._arch = self._meta.get("general.architecture", "")
        dense = ", ".join(ARCHITECTURES)
        if arch not in ARCHITECTURES:
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
            vocab_size = [*_shape(tensors[_EMBEDDING]), 0][0]
            self.config, problems = gguf_config.read(
                self._meta, tensors, factors, vocab_size
            )
        if problems:
            raise CheckpointError(gathered(f"{path} cannot be used", problems))
        names = names_of(arch, self.config["num_hidden_layers"])
        self._heads = interleaved(
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
        rows = permuted(tensor.data, name, self._heads, undo=True)
        if tensor.tensor_type.name in _STORED:
            w = rows.view(info.dtype).reshape(info.shape)
        else:
            try:
                w = package().quants.dequantize(rows, tensor.tensor_type)
            except NotImplementedError as error:
                raise CheckpointError(f"{name} in {self.path}: {error}") from None
        return w - w.dtype.type(1) if has_one(name, self._arch) else w

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor, without reading it."""
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        """Yields the names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Counts the tensors."""
        return len(self._tensors)

    def damage(self) -> list[str]:
        """Returns nothing: a GGUF file has no digests to compare with."""
        return []

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


def package() -> ModuleType:
    """Returns the package gguf.

    Raises:
      CheckpointError: it is not installed.
    """
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
    gguf = package()
    if not os.path.lexists(path):
        raise CheckpointError(f"{path} is no file; expected a GGUF model")
    scan.check(path)
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


def names_of(arch: str, layers: int) -> dict[str, str]:
    """Returns {name in the file: Hugging Face name} of every tensor of a model."""
    gguf = package()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[arch], layers)
    family = FAMILIES[ARCHITECTURES[arch].model_type]
    names = {}
    for _, name in Table(family.NAMES, layers).all():
        stem, _, end = name.rpartition(".")
        if (stored := table.get_name(stem)) is not None:
            names[f"{stored}.{end}"] = name
    return names


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def has_one(name: str, arch: str) -> bool:
    """Whether a tensor has the 1 in it that Hugging Face adds when it runs."""
    return arch.startswith("gemma") and name.endswith("norm.weight")


def interleaved(arch: str, heads: int, kv_heads: int) -> dict[str, int]:
    """Returns {linear: its heads} of those whose rows an architecture interleaves."""
    rotated = {"q_proj": heads, "k_proj": kv_heads}
    return rotated if arch in ("llama", "arcee") else {}


def permuted(
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
