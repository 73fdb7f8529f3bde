"""Tensors differ in more than their names between a GGUF file and a folder.

- Rows of q and k are interleaved in architectures llama, arcee and those of Granite: their
  files rotate neighbouring features, Hugging Face the two halves of a head.
- Norms of Gemma and Qwen3.5 have the 1 in them that Hugging Face adds when it runs.
- Axes of size 1 are left out.
- Vectors of Mamba layers have two axes.
- The decay of delta nets and of Mamba layers is what Hugging Face makes of it when it runs.
- Value heads of Qwen3.5's delta net that share a key head are as far apart as there are key
  heads; in a folder they are neighbours.
- Two tensors of a file may be one of a folder, and gate and up of experts the other way
  around; what is written has both apart.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from qlora_jax.models import DecoderConfig
from qlora_jax.models.spec import DeltaSpec, MambaSpec
from qlora_jax.sources.gguf.architectures import ARCHITECTURES, QWEN35

DELTA_NETS = (*QWEN35, "qwen3next")
_DECAYS = (*DELTA_NETS, "granitehybrid")
_INTERLEAVED = ("llama", "arcee", "granite", "granitemoe", "granitehybrid")
T = TypeVar("T")


class Joint(NamedTuple):
    """A linear of a folder that is two tensors of a file.

    Attributes:
      path: Its path in a layer.
      stored: The tensors' names in a layer of the file.
      shape: (their shapes, config) -> its shape.
      join: (the tensors, config) -> the linear.
      cut: The inverse.
    """

    path: str
    stored: tuple[str, str]
    shape: Callable[[Sequence[tuple[int, ...]], DecoderConfig], tuple[int, ...]]
    join: Callable[[Sequence[np.ndarray], DecoderConfig], np.ndarray]
    cut: Callable[[np.ndarray, DecoderConfig], list[np.ndarray]]


def _mixer(config: DecoderConfig, kind: type[T]) -> T:
    """Returns a decoder's first mixer of a kind."""
    mixers = (spec.mixer for spec in config.specs)
    return next(mixer for mixer in mixers if isinstance(mixer, kind))


def _delta(config: DecoderConfig) -> DeltaSpec:
    return _mixer(config, DeltaSpec)


def _join_qkvz(parts: Sequence[np.ndarray], config: DecoderConfig) -> np.ndarray:
    """Puts queries, keys, values and gates of each key head together."""
    spec = _delta(config)
    ends = spec.key_size, 2 * spec.key_size
    rows = *np.split(parts[0], ends), parts[1]
    each = [one.reshape(spec.key_heads, -1, one.shape[-1]) for one in rows]
    return np.concatenate(each, axis=1).reshape(-1, parts[0].shape[-1])


def _cut_qkvz(w: np.ndarray, config: DecoderConfig) -> list[np.ndarray]:
    """Takes queries, keys, values and gates of all key heads apart."""
    spec, hidden = _delta(config), w.shape[-1]
    wide = spec.value_heads // spec.key_heads * spec.value_dim
    ends = spec.key_dim, 2 * spec.key_dim, 2 * spec.key_dim + wide
    rows = np.split(w.reshape(spec.key_heads, -1, hidden), ends, axis=1)
    q, k, v, z = (one.reshape(-1, hidden) for one in rows)
    return [np.concatenate([q, k, v]), z]


def _join_kv(parts: Sequence[np.ndarray], config: DecoderConfig) -> np.ndarray:
    """Puts what makes keys and what makes values of each head together."""
    del config
    keys, values = parts
    each = np.concatenate([keys.swapaxes(1, 2), values], axis=1)
    return each.reshape(-1, each.shape[-1])


def _cut_kv(w: np.ndarray, config: DecoderConfig) -> list[np.ndarray]:
    """Takes what makes keys and what makes values of each head apart."""
    plain = config.head_dim - (config.rotary_dim or 0)
    each = w.reshape(config.num_heads, -1, w.shape[-1])
    keys = np.ascontiguousarray(each[:, :plain].swapaxes(1, 2))
    return [keys, each[:, plain:]]


def _below(shapes: Sequence[tuple[int, ...]], config: DecoderConfig) -> tuple[int, ...]:
    """Returns the shape of two linears one below the other."""
    del config
    return (shapes[0][0] + shapes[1][0], shapes[0][-1])


def _gate_up(path: str, end: str) -> Joint:
    """Returns what gate and up of a feed-forward are where a folder has them in one."""
    return Joint(
        f"{path}.gate_up_proj.kernel",
        (f"ffn_gate{end}.weight", f"ffn_up{end}.weight"),
        _below,
        lambda parts, _: np.concatenate(parts),
        lambda w, _: np.split(w, 2),
    )


_GRANITE = (
    _gate_up("mlp", ""),
    _gate_up("mlp.shared.mlp", "_shexp"),
    _gate_up("mlp.experts", "_exps"),
)
JOINTS = {
    "deepseek2": (
        Joint(
            "attn.kv_b_proj.kernel",
            ("attn_k_b.weight", "attn_v_b.weight"),
            lambda shapes, _: (
                shapes[0][0] * (shapes[0][-1] + shapes[1][1]),
                shapes[1][-1],
            ),
            _join_kv,
            _cut_kv,
        ),
    ),
    "qwen3next": (
        Joint(
            "attn.in_proj_qkvz.kernel",
            ("attn_qkv.weight", "attn_gate.weight"),
            _below,
            _join_qkvz,
            _cut_qkvz,
        ),
    ),
    **dict.fromkeys(("granite", "granitemoe", "granitehybrid"), _GRANITE),
}
"""Architecture -> the linears that its files have as two tensors, where the family has such a
linear: a Granite 3 has none."""


GATE_UP = ("deepseek2", "qwen35moe", "qwen3next")
"""Architectures whose files may have gate and up of a layer's experts in one tensor, whose rows
are those of gate and then of up."""


def has_one(name: str, arch: str) -> bool:
    """Whether a tensor has the 1 in it that Hugging Face adds when it runs."""
    own = arch.startswith("gemma") or arch in DELTA_NETS
    return own and name.endswith("norm.weight") and "linear_attn" not in name


def _ending(ends: Mapping[str, T], name: str) -> T | None:
    """Returns what stands for the end of a name; None where nothing does."""
    return next((value for end, value in ends.items() if name.endswith(end)), None)


def folder_shape(name: str, arch: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a folder's shape of a tensor of which this is a file's."""
    known = ARCHITECTURES[arch]
    if _ending(known.counted, name) is not None:
        return (math.prod(shape),)
    axis = _ending(known.rows, name)
    return shape if axis is None else (*shape[:axis], 1, *shape[axis:])


def file_shape(
    name: str, arch: str, shape: tuple[int, ...], config: DecoderConfig
) -> tuple[int, ...]:
    """Returns a file's shape of a tensor of which this is a folder's."""
    known = ARCHITECTURES[arch]
    if (field := _ending(known.counted, name)) is not None:
        count = getattr(_mixer(config, MambaSpec), field)
        return (count, math.prod(shape) // count)
    axis = _ending(known.rows, name)
    return shape if axis is None else (*shape[:axis], *shape[axis + 1 :])


def interleaved(arch: str, config: DecoderConfig) -> dict[str, int]:
    """Returns {linear: its heads} of those whose rows an architecture interleaves."""
    rotated = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    return rotated if arch in _INTERLEAVED else {}


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


def from_file(w: np.ndarray, name: str, arch: str, config: DecoderConfig) -> np.ndarray:
    """Returns a file's tensor as a folder has it, but for its axes and rotated rows."""
    if has_one(name, arch):
        return w - w.dtype.type(1)
    if arch in _DECAYS and name.endswith("A_log"):
        w = np.log(-w)
    return w if arch not in QWEN35 else _reordered(w, name, _delta(config), undo=True)


def to_file(w: np.ndarray, name: str, arch: str, config: DecoderConfig) -> np.ndarray:
    """Returns a folder's tensor as a file has it, but for its axes and rotated rows."""
    w = w + np.float32(has_one(name, arch))
    if arch in _DECAYS and name.endswith("A_log"):
        w = -np.exp(w)
    return w if arch not in QWEN35 else _reordered(w, name, _delta(config), undo=False)


def _reordered(w: np.ndarray, name: str, spec: DeltaSpec, *, undo: bool) -> np.ndarray:
    """Puts value heads of a delta net from a folder's order into a file's, or back."""
    last = name.rsplit("linear_attn.", 1)[-1]
    keys = spec.key_heads
    counts = (
        (spec.value_heads // keys, keys) if undo else (keys, spec.value_heads // keys)
    )
    if last in ("in_proj_qkv.weight", "conv1d.weight"):
        first, values = np.split(w, [2 * spec.key_size])
        return np.concatenate([first, _turned(values, counts)])
    if last in ("in_proj_z.weight", "in_proj_a.weight", "in_proj_b.weight"):
        return _turned(w, counts)
    if last in ("A_log", "dt_bias"):
        return _turned(w, counts)
    if last == "out_proj.weight":
        return np.ascontiguousarray(_turned(w.T, counts).T)
    return w


def _turned(w: np.ndarray, counts: tuple[int, int]) -> np.ndarray:
    """Swaps the two numbers that rows are counted by first."""
    apart = w.reshape(*counts, -1, *w.shape[1:])
    return np.ascontiguousarray(apart.swapaxes(0, 1)).reshape(w.shape)
