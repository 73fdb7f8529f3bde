"""A GGUF file as a source of tensors.

A GGUF file has named metadata, a tokenizer among them, and tensors that may be quantized
in blocks. What differs from a Hugging Face folder, and is undone on reading:

- Tensors have other names, and their shapes are written in reverse.
- Rows, axes and values of some are otherwise (forms.py).
- There is no output.weight where the head is the embedding.
- The experts of a layer are together in one tensor a linear, and cut apart.
- Where all experts are in MXFP4 they are given as a folder has them (mxfp4.py); whatever else
  is quantized is decoded.

Needs the package gguf, which is imported on use.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qlora_jax.errors import CheckpointError, gathered
from qlora_jax.models import read_config
from qlora_jax.sources import bitsandbytes
from qlora_jax.sources.gguf import config as gguf_config
from qlora_jax.sources.gguf import mxfp4, scan
from qlora_jax.sources.gguf import tokenizer as gguf_tokenizer
from qlora_jax.sources.gguf.architectures import ARCHITECTURES
from qlora_jax.sources.gguf.forms import from_file, interleaved, permuted
from qlora_jax.sources.gguf.places import Part, package, parts_of, shape_of
from qlora_jax.sources.gguf.rope import FREQS, LONG, SHORT
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

    A weight in MXFP4 that is kept so is two tensors, its blocks and its scales.

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
        known = ", ".join(ARCHITECTURES)
        if arch not in ARCHITECTURES:
            raise CheckpointError(
                f"{path}: general.architecture is {arch!r}; known: {known}"
            )
        problems = []
        if (parts := self._meta.get("split.count", 1)) > 1:
            problems.append(
                f"it is 1 of {parts} parts; join them: llama-gguf-split --merge"
            )
        if _EMBEDDING not in tensors:
            problems.append(f"{_EMBEDDING} is missing")
        if not problems:
            factors = {
                name: tensors.pop(name).data
                for name in (FREQS, LONG, SHORT)
                if name in tensors
            }
            vocab_size = [*shape_of(tensors[_EMBEDDING]), 0][0]
            self.config, problems = gguf_config.read(
                self._meta, tensors, factors, vocab_size
            )
        if problems:
            raise CheckpointError(gathered(f"{path} cannot be used", problems))
        layers = self.config["num_hidden_layers"]
        decoder, _ = read_config(self.config)
        assert decoder is not None
        self._decoder = decoder
        self._heads = interleaved(arch, decoder)
        self._parts = parts_of(arch, decoder, tensors)
        count = self._meta.get(f"{arch}.nextn_predict_layers", 0)
        self._leave_out(range(layers, layers + count))
        self._packed = self._take_mxfp4()
        self.infos = {
            name: TensorInfo(
                path,
                np.dtype(_STORED.get(part.tensor.tensor_type.name, np.float32)),
                part.shape,
                part.offset,
            )
            for name, part in self._parts.items()
        }
        self.infos |= {
            name: TensorInfo(
                path, np.dtype(np.uint8), entry.shape(part.shape), part.offset
            )
            for name, (part, entry) in self._packed.items()
        }

    def _take_mxfp4(self) -> dict[str, tuple[Part, mxfp4.Entry]]:
        """Takes experts in MXFP4 out of the tensors that are decoded.

        Returns:
          {name of an entry: the weight that it is of, and what it is}; nothing where some
          experts are otherwise, as a model holds all of them alike.
        """
        experts = [
            name
            for name, part in self._parts.items()
            if part.expert is not None and name.endswith(".weight")
        ]
        packed = [
            name
            for name in experts
            if self._parts[name].tensor.tensor_type.name == "MXFP4"
        ]
        if len(packed) < len(experts):
            if packed:
                self.notes.append(
                    f"of {len(experts)} linears of experts {len(packed)} are in MXFP4; they "
                    "are decoded as the others are, since a model holds all of them alike"
                )
            return {}
        if packed:
            self.config["quantization_config"] = {"quant_method": bitsandbytes.MXFP4}
        return {
            name + entry.end: (part, entry)
            for name in packed
            for part in [self._parts.pop(name)]
            for entry in mxfp4.ENTRIES
        }

    def _leave_out(self, layers: range) -> None:
        """Leaves out layers behind the model's own."""
        left = [name for name in self._parts if _layer(name) in layers]
        for name in left:
            del self._parts[name]
        if left:
            self.notes.append(
                f"tensors of layers from {layers.start} on ({len(left)} in all), which "
                "predict further tokens, are left out"
            )

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads one tensor.

        Raises:
          CheckpointError: it has a quantization that the package gguf does not know, or a
            shape that the settings do not ask for.
        """
        if name in self._packed:
            part, entry = self._packed[name]
            return entry.of(part.data)
        part = self._parts[name]
        try:
            if part.joint is None:
                return self._decoded(name, part)
            parts = [self._decoded(name, part), self._decoded(name, part.joint[1])]
            return part.joint[0].join(parts, self._decoder)
        # numpy's of a shape, though `load` compares shapes before; gguf's of a quantization.
        except (ValueError, NotImplementedError) as error:
            raise CheckpointError(f"{name} in {self.path}: {error}") from None

    def _decoded(self, name: str, part: Part) -> np.ndarray:
        """Reads a tensor, or an expert's part of one."""
        tensor = part.tensor
        rows = permuted(part.data, name, self._heads, undo=True)
        stored = _STORED.get(tensor.tensor_type.name)
        if stored is not None:
            w = rows.view(stored).reshape(part.own_shape)
        else:
            w = package().quants.dequantize(rows, tensor.tensor_type)
            w = w.reshape(part.own_shape)
        return from_file(w, name, self._arch, self._decoder)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor, without reading it."""
        return name in self.infos

    def __iter__(self) -> Iterator[str]:
        """Yields the names."""
        return iter(self.infos)

    def __len__(self) -> int:
        """Counts the tensors."""
        return len(self.infos)

    def damage(self) -> list[str]:
        """Returns nothing: a GGUF file has no digests to compare with."""
        return []

    def stored(self, name: str) -> tuple[str, int]:
        """Returns how a tensor is stored: the name of its kind (q4_k), and its bytes."""
        part, entry = self._packed.get(name) or (self._parts[name], None)
        size = part.n_bytes if entry is None else entry.n_bytes(part.n_bytes)
        return part.tensor.tensor_type.name.lower(), size

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


def _layer(name: str) -> int:
    """Returns the layer that a name of a file's tensor says; -1 where it says none."""
    found = re.match(r"blk\.(\d+)\.", name)
    return -1 if found is None else int(found[1])
