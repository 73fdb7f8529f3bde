"""A GGUF file as a source of tensors.

A GGUF file has named metadata, a tokenizer among them, and tensors that may be quantized
in blocks. What differs from a Hugging Face folder, and is undone on reading:

- Tensors have other names, and their shapes are written in reverse.
- Rows, axes and values of some are otherwise (forms.py).
- There is no output.weight where the head is the embedding.
- The experts of a layer are together in one tensor a linear, and cut apart.

Needs the package gguf, which is imported on use.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from qlora_jax.errors import CheckpointError, gathered
from qlora_jax.models import FAMILIES, DecoderConfig, read_config
from qlora_jax.names import Table
from qlora_jax.sources.gguf import config as gguf_config
from qlora_jax.sources.gguf import scan
from qlora_jax.sources.gguf import tokenizer as gguf_tokenizer
from qlora_jax.sources.gguf.architectures import ARCHITECTURES, model_type
from qlora_jax.sources.gguf.forms import (
    JOINTS,
    Joint,
    axis_left_out,
    from_file,
    interleaved,
    permuted,
)
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


class Part(NamedTuple):
    """A tensor of a file, or one expert's part of it.

    Attributes:
      tensor: The whole, as the package gguf has it.
      expert: Which of its parts; None for all of it.
      axis: An axis of size 1 that the file leaves out, or None.
      joint: Where it is the first of two tensors that are one linear, what these are, the
        second, and the linear's shape.
    """

    tensor: Any
    expert: int | None = None
    axis: int | None = None
    joint: "tuple[Joint, Part, tuple[int, ...]] | None" = None

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Its shape with the axes that Hugging Face has."""
        shape = _shape(self.tensor)
        if self.axis is not None:
            return (*shape[: self.axis], 1, *shape[self.axis :])
        return shape[self.expert is not None :]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is read."""
        return self.own_shape if self.joint is None else self.joint[2]

    @property
    def data(self) -> np.ndarray:
        """Its values, or quantized rows."""
        data = self.tensor.data
        return data if self.expert is None else data[self.expert]

    @property
    def n_bytes(self) -> int:
        """The bytes that it takes in the file."""
        count = 1 if self.expert is None else _shape(self.tensor)[0]
        more = 0 if self.joint is None else self.joint[1].n_bytes
        return int(self.tensor.n_bytes) // count + more

    @property
    def offset(self) -> int:
        """It begins at this byte of the file."""
        return self.tensor.data_offset + (self.expert or 0) * self.n_bytes


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
            vocab_size = [*_shape(tensors[_EMBEDDING]), 0][0]
            self.config, problems = gguf_config.read(
                self._meta, tensors, factors, vocab_size
            )
        if problems:
            raise CheckpointError(gathered(f"{path} cannot be used", problems))
        layers = self.config["num_hidden_layers"]
        self._heads = interleaved(
            arch, self.config["num_attention_heads"], self.config["num_key_value_heads"]
        )
        decoder, _ = read_config(self.config)
        assert decoder is not None
        self._decoder = decoder
        self._parts = _parts(arch, decoder, tensors)
        count = self._meta.get(f"{arch}.nextn_predict_layers", 0)
        self._leave_out(range(layers, layers + count))
        self.infos = {
            name: TensorInfo(
                path,
                np.dtype(_STORED.get(part.tensor.tensor_type.name, np.float32)),
                part.shape,
                part.offset,
            )
            for name, part in self._parts.items()
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
          CheckpointError: it has a quantization that the package gguf does not know.
        """
        part = self._parts[name]
        if part.joint is None:
            return self._decoded(name, part)
        parts = [self._decoded(name, part), self._decoded(name, part.joint[1])]
        return part.joint[0].join(parts, self._decoder)

    def _decoded(self, name: str, part: Part) -> np.ndarray:
        """Reads a tensor, or an expert's part of one."""
        tensor = part.tensor
        rows = permuted(part.data, name, self._heads, undo=True)
        stored = _STORED.get(tensor.tensor_type.name)
        if stored is not None:
            w = rows.view(stored).reshape(part.own_shape)
        else:
            try:
                w = package().quants.dequantize(rows, tensor.tensor_type)
            except NotImplementedError as error:
                raise CheckpointError(f"{name} in {self.path}: {error}") from None
            w = w.reshape(part.own_shape)
        return from_file(w, name, self._arch, self._decoder)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor, without reading it."""
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        """Yields the names."""
        return iter(self._parts)

    def __len__(self) -> int:
        """Counts the tensors."""
        return len(self._parts)

    def damage(self) -> list[str]:
        """Returns nothing: a GGUF file has no digests to compare with."""
        return []

    def stored(self, name: str) -> tuple[str, int]:
        """Returns how a tensor is stored: the name of its kind (q4_k), and its bytes."""
        part = self._parts[name]
        return part.tensor.tensor_type.name.lower(), part.n_bytes

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


def _parts(
    arch: str, config: DecoderConfig, tensors: dict[str, Any]
) -> dict[str, Part]:
    """Returns the tensors of a file by their Hugging Face names.

    Raises:
      CheckpointError: a tensor does not hold as many experts as the settings say.
    """
    layers, experts = config.num_layers, config.num_experts
    held: dict[str, list[tuple[str, int | None]]] = {}
    for name, (stored, expert) in names_of(arch, layers, experts).items():
        held.setdefault(stored, []).append((name, expert))
    parts, problems = {}, []
    for stored, tensor in tensors.items():
        for name, expert in held.get(stored, [(stored, None)]):
            if expert is not None and _shape(tensor)[:1] != (experts,):
                shape = _shape(tensor)
                problems.append(
                    f"{stored} has shape {shape}, expected {experts} experts"
                )
                break
            parts[name] = Part(tensor, expert, axis_left_out(name, arch))
    if problems:
        raise CheckpointError(gathered("its tensors do not fit its settings", problems))
    for name, stored in joined_in(arch, layers).items():
        if all(one in parts for one in stored):
            first, second = (parts.pop(one) for one in stored)
            joint = JOINTS[arch]
            shape = joint.shape((first.own_shape, second.own_shape), config)
            parts[name] = first._replace(joint=(joint, second, shape))
    return parts


def joined_in(arch: str, layers: int) -> dict[str, list[str]]:
    """Returns {Hugging Face name: names in the file} of what a file has as two tensors."""
    if (joint := JOINTS.get(arch)) is None:
        return {}
    name = FAMILIES[ARCHITECTURES[arch].model_type].NAMES[f"layers.{joint.path}"]
    return {
        name.format(i): [f"blk.{i}.{one}" for one in joint.stored]
        for i in range(layers)
    }


def _layer(name: str) -> int:
    """Returns the layer that a name of a file's tensor says; -1 where it says none."""
    found = re.match(r"blk\.(\d+)\.", name)
    return -1 if found is None else int(found[1])


_OWN = {
    "attn.sinks.weight": "attn_sinks.weight",
    "attn.decay.weight": "ssm_a",
    "attn.decay.bias": "ssm_dt.bias",
    "mlp.router.correction.weight": "exp_probs_b.bias",
    **{
        f"mlp.experts.{linear}_proj.{ours}": f"ffn_{linear}_exps.{theirs}"
        for linear in ("gate", "up", "down")
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    },
}
"""Paths of a layer whose names in a file are not those that the package gguf makes of Hugging
Face's."""


def names_of(
    arch: str, layers: int, experts: int = 0
) -> dict[str, tuple[str, int | None]]:
    """Returns {Hugging Face name: (name in the file, expert)} of every tensor of a model.

    The expert is None of what a tensor of the file holds alone.
    """
    gguf = package()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[arch], layers)
    family = FAMILIES[model_type(arch, bool(experts))]
    names: dict[tuple[str, int | None], str] = {}
    for numbered, name in Table(family.NAMES, layers, experts).all():
        own = _OWN.get(numbered.path.removeprefix("layers."))
        stem, _, end = name.rpartition(".")
        if own is not None:
            layer, *expert = numbered.numbers
            names[f"blk.{layer}.{own}", expert[0] if expert else None] = name
        elif (stored := table.get_name(stem)) is not None:
            # Of two names that are one in the file the later one is the family's (Phi-3).
            names[f"{stored}.{end}", None] = name
    return {name: place for place, name in names.items()}


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))
