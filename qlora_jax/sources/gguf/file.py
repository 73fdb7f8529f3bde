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
from qlora_jax.models import DecoderConfig, hf_table, read_config
from qlora_jax.sources.gguf import config as gguf_config
from qlora_jax.sources.gguf import scan
from qlora_jax.sources.gguf import tokenizer as gguf_tokenizer
from qlora_jax.sources.gguf.architectures import ARCHITECTURES
from qlora_jax.sources.gguf.forms import (
    GATE_UP,
    JOINTS,
    Joint,
    folder_shape,
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


class Place(NamedTuple):
    """Where a file has what a folder has under one name.

    Attributes:
      stored: Names of the file: one, or the two of a joint.
      expert: Which of the parts of these; None for all of them.
      joint: What the two are, or None.
    """

    stored: tuple[str, ...]
    expert: int | None = None
    joint: Joint | None = None


class Part(NamedTuple):
    """A tensor of a file, or one expert's part of it, or half of the rows of that.

    Attributes:
      tensor: The whole, as the package gguf has it.
      own_shape: Its shape, or that of the part, with the axes that Hugging Face has.
      expert: Which of its parts; None for all of it.
      half: Which half of the rows; None for all of them.
      joint: Where it is the first of two tensors that are one linear, what these are, the
        second, and the linear's shape.
    """

    tensor: Any
    own_shape: tuple[int, ...]
    expert: int | None = None
    half: int | None = None
    joint: "tuple[Joint, Part, tuple[int, ...]] | None" = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is read."""
        return self.own_shape if self.joint is None else self.joint[2]

    @property
    def data(self) -> np.ndarray:
        """Its values, or quantized rows."""
        data = self.tensor.data
        if self.expert is not None:
            data = data[self.expert]
        return data if self.half is None else np.split(data, 2)[self.half]

    @property
    def n_bytes(self) -> int:
        """The bytes that what is read takes in the file."""
        return self._own_bytes + (0 if self.joint is None else self.joint[1].n_bytes)

    @property
    def offset(self) -> int:
        """It begins at this byte of the file."""
        before = (self.expert or 0) * (1 if self.half is None else 2) + (self.half or 0)
        return self.tensor.data_offset + before * self._own_bytes

    @property
    def _own_bytes(self) -> int:
        count = 1 if self.expert is None else _shape(self.tensor)[0]
        return int(self.tensor.n_bytes) // (count * (1 if self.half is None else 2))


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
        decoder, _ = read_config(self.config)
        assert decoder is not None
        self._decoder = decoder
        self._heads = interleaved(arch, decoder)
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
          CheckpointError: it has a quantization that the package gguf does not know, or a
            shape that the settings do not ask for.
        """
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
    parts, problems, used = {}, [], set()
    for name, place in names_of(arch, config).items():
        try:
            found = [_found(one, arch, tensors) for one in place.stored]
            if not all(one in tensors for one, _ in found):
                continue  # what has this name is missing, which reading it says
            used.update(one for one, _ in found)
            pieces = []
            for one, half in found:
                shape = _shape_in(tensors[one], place, half, config.num_experts)
                own = folder_shape(name, arch, shape)
                pieces.append(Part(tensors[one], own, place.expert, half))
            parts[name] = pieces[0]
            if place.joint is not None:
                shape = place.joint.shape([piece.own_shape for piece in pieces], config)
                joint = (place.joint, pieces[1], shape)
                parts[name] = pieces[0]._replace(joint=joint)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        problems = list(dict.fromkeys(problems))
        raise CheckpointError(gathered("its tensors do not fit its settings", problems))
    left = {name: tensor for name, tensor in tensors.items() if name not in used}
    return parts | {name: Part(one, _shape(one)) for name, one in left.items()}


def _found(name: str, arch: str, tensors: Mapping[str, Any]) -> tuple[str, int | None]:
    """Returns the tensor that holds what has a name in a file, and which half of its rows.

    Raises:
      ValueError: two hold it.
    """
    layer, _, own = name.rpartition(".ffn_")
    halves = {"gate_exps.weight": 0, "up_exps.weight": 1}
    whole = f"{layer}.ffn_gate_up_exps.weight"
    if arch not in GATE_UP or own not in halves or whole not in tensors:
        return name, None
    if name in tensors:
        raise ValueError(f"{whole} is there, and {name} too; expected one of them")
    return whole, halves[own]


def _shape_in(
    tensor: Any, place: Place, half: int | None, experts: int
) -> tuple[int, ...]:
    """Returns the shape of what a tensor of a file has of one of a folder.

    Raises:
      ValueError: it has not.
    """
    shape = whole = _shape(tensor)
    if place.expert is not None:
        if shape[:1] != (experts,):
            raise ValueError(
                f"{tensor.name} has shape {whole}, expected {experts} experts"
            )
        shape = shape[1:]
    if half is not None:
        if not shape or shape[0] % 2:
            raise ValueError(
                f"{tensor.name} has shape {whole}, expected rows of gate and as many of up"
            )
        shape = (shape[0] // 2, *shape[1:])
    if place.joint is not None and len(shape) < 2:
        raise ValueError(f"{tensor.name} has shape {whole}, expected a matrix")
    return shape


def _layer(name: str) -> int:
    """Returns the layer that a name of a file's tensor says; -1 where it says none."""
    found = re.match(r"blk\.(\d+)\.", name)
    return -1 if found is None else int(found[1])


_OWN = {
    "attn.sinks.weight": "attn_sinks.weight",
    "attn.decay.weight": "ssm_a",
    "attn.decay.bias": "ssm_dt.bias",
    "attn.skip.weight": "ssm_d",
    "mlp.down_proj.kernel": "ffn_down.weight",
    "mlp.router.correction.weight": "exp_probs_b.bias",
    **{
        f"mlp.experts.{linear}_proj.{ours}": f"ffn_{linear}_exps.{theirs}"
        for linear in ("gate", "up", "down")
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    },
}
"""Paths of a layer whose names in a file are not those that the package gguf makes of Hugging
Face's."""


def names_of(arch: str, config: DecoderConfig) -> dict[str, Place]:
    """Returns where a file has each tensor of a model, by its Hugging Face name."""
    gguf = package()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[arch], config.num_layers)
    joints = {f"layers.{joint.path}": joint for joint in JOINTS.get(arch, ())}
    places: dict[str, Place] = {}
    owner: dict[tuple[str, int | None], str] = {}
    for numbered, name in hf_table(config).all():
        layer, expert = (*numbered.numbers, None, None)[:2]
        stem, _, end = name.rpartition(".")
        joint = joints.get(numbered.path)
        own = _OWN.get(numbered.path.removeprefix("layers."))
        if joint is not None:
            stored = tuple(f"blk.{layer}.{one}" for one in joint.stored)
        elif own is not None:
            stored = (f"blk.{layer}.{own}",)
        elif (found := table.get_name(stem)) is not None:
            stored = (f"{found}.{end}",)
        else:
            continue
        places[name] = Place(stored, expert, joint)
        # Of two names that are one in the file the later one is the family's (Phi-3).
        owner |= {(one, expert): name for one in stored}
    return {
        name: place
        for name, place in places.items()
        if all(owner[one, place.expert] == name for one in place.stored)
    }


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))
