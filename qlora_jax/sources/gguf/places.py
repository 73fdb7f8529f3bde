"""Finds where a GGUF file has the tensors of a model, and which of them are one of a folder."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from qlora_jax.errors import CheckpointError, gathered
from qlora_jax.models import DecoderConfig, hf_table
from qlora_jax.sources.gguf.forms import GATE_UP, JOINTS, Joint, folder_shape


class Place(NamedTuple):
    """Says where a file has what a folder has under one name.

    Attributes:
      stored: Names of the file: one, or the two of a joint.
      expert: Which of the parts of these; None for all of them.
      joint: What the two are, or None.
    """

    stored: tuple[str, ...]
    expert: int | None = None
    joint: Joint | None = None


class Part(NamedTuple):
    """Is a tensor of a file, or one expert's part of it, or half of the rows of that.

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
        count = 1 if self.expert is None else shape_of(self.tensor)[0]
        return int(self.tensor.n_bytes) // (count * (1 if self.half is None else 2))


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


def parts_of(
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
    return parts | {name: Part(one, shape_of(one)) for name, one in left.items()}


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
    shape = whole = shape_of(tensor)
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


def shape_of(tensor: Any) -> tuple[int, ...]:
    """Returns the shape of a tensor of a file, whose axes stand in reverse there."""
    return tuple(int(size) for size in reversed(tensor.shape))
