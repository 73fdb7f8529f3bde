"""Weights of all experts of a layer in one tensor, and their scales in another.

FP8 folders of transformers 5 have M.experts.gate_up_proj, (experts, rows, columns), and
M.experts.gate_up_proj_scale_inv, (experts, its rows, its columns), whose grid says how large a
block is. Source: transformers 5.24, integrations/finegrained_fp8.py, FP8Experts.

An expert is decoded when it is asked for: all of a layer at once would take gigabytes.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from qlora_jax.errors import CheckpointError
from qlora_jax.sources.encoded.form import FLOAT8, Form, Part, Settings
from qlora_jax.sources.safetensors import Checkpoint, Encoded, TensorInfo

STACKED = ("_scale_inv", "_activation_scale")
"""The names of a stack's scales, and of its activations', are its own with these behind it."""


class Stack:
    """The matrices of a stack, each decoded when it is asked for."""

    def __init__(self, decode: Any, count: int):
        self._decode, self._count = decode, count

    def __getitem__(self, expert: int) -> np.ndarray:
        """Decodes one."""
        return self._decode(expert)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Decodes all."""
        del copy
        whole = np.stack([self[i] for i in range(self._count)])
        return whole if dtype is None else whole.astype(dtype)


def stacks(
    checkpoint: Checkpoint, form: Form, settings: Settings
) -> Iterator[tuple[str, str, TensorInfo]]:
    """Finds the stacks of a folder.

    Args:
      checkpoint: Its tensors, under their own names.
      form: The form of their matrices, which have a weight and a scale.
      settings: What forms have to know.

    Yields:
      (name, end of its scales' name, what is known of it, and how it is decoded).
    """
    end = STACKED[0]
    for name, info in list(checkpoint.infos.items()):
        scale = checkpoint.infos.get(name + end)
        axes = len(info.shape), 0 if scale is None else len(scale.shape)
        if scale is None or info.dtype not in FLOAT8 or axes != (3, 3):
            continue
        size = sum(math.prod(x.shape) * x.dtype.itemsize for x in (info, scale))
        try:
            _check_grid(name + end, info.shape, scale.shape)
            grid = [
                n // by for n, by in zip(info.shape[1:], scale.shape[1:], strict=True)
            ]
            own = settings._replace(blocks=(*settings.blocks, (grid[0], grid[1])))
            read = functools.partial(
                _measured, checkpoint, name, info, scale, form, own
            )
            made = read(0)
            whole = Stack(lambda i, read=read: read(i).decode(), info.shape[0])
            encoded = Encoded(form.called, size, lambda whole=whole: whole)
            shape, dtype = (info.shape[0], *made.shape), made.dtype
        except CheckpointError as error:
            shape, dtype = (), np.dtype(np.float32)
            encoded = Encoded(form.called, size, None, str(error))
        info = TensorInfo(info.file, dtype, shape, info.start, encoded=encoded)
        yield name, end, info


def _check_grid(name: str, shape: tuple[int, ...], grid: tuple[int, ...]) -> None:
    """Raises CheckpointError if scales are no even grid over each matrix."""
    pairs = zip(shape[1:], grid[1:], strict=True)
    if grid[0] != shape[0] or 0 in grid or any(n % by for n, by in pairs):
        raise CheckpointError(
            f"{name} has shape {grid}, which does not fit a stack of shape {shape}: expected "
            "for each of its matrices a grid of scales that divides it evenly"
        )


def _measured(
    checkpoint: Checkpoint,
    name: str,
    info: TensorInfo,
    scale: TensorInfo,
    form: Form,
    settings: Settings,
    expert: int,
) -> Any:
    """Returns what is known of one matrix of a stack."""

    def part(called: str, whole: TensorInfo) -> Part:
        one = whole._replace(shape=whole.shape[1:])
        return Part(called, one, lambda: checkpoint.map(called, whole)[expert])

    entries = {
        "weight": part(name, info),
        f"weight{STACKED[0]}": part(name + STACKED[0], scale),
    }
    return form.measure(entries, settings)
