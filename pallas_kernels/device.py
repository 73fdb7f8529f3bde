"""What a computation is traced for, and how much of it may be alive at once there.

Kernels are chosen, and work is cut in pieces, while a program is traced: by what is known
then of the device that will run it.
"""

import dataclasses
import re
from typing import Any

import jax

Limit = dict[str, int]
"""Bytes by platform; what is no CPU takes a GPU's."""

XLA_WHOLE_BYTES: Limit = {"cpu": 8 << 20, "gpu": 128 << 20}
"""Decoded weight up to which 'xla' tiles nothing: one product of the whole is faster than
four of planes while it is small."""

XLA_TILE_BYTES: Limit = {"cpu": 4 << 20, "gpu": 128 << 20}
"""Decoded weight alive at once in a tiled product of 'xla'. On a CPU a tile stays in cache:
at 4 MiB 512 x 4096 x 11008 takes half of what it takes untiled. Elsewhere few large launches
are better."""

TWO_PASS_WHOLE_BYTES: Limit = {"cpu": 128 << 20, "gpu": 128 << 20}
"""'two_pass' decodes a weight whole up to so many decoded bytes, and by pieces above."""

TWO_PASS_PIECE_BYTES: Limit = {"cpu": 32 << 20, "gpu": 32 << 20}
"""A larger weight is decoded so many bytes at a time; products of such pieces are bound by
arithmetic."""

INT8_PIECE_BYTES: Limit = {"cpu": 4 << 20, "gpu": 32 << 20}
"""An int8 table is multiplied in pieces whose rows in the compute dtype, and whose float32
product, take at most so many bytes each; the same as for 4-bit weights."""

LOGITS_BYTES: Limit = {"cpu": 32 << 20, "gpu": 256 << 20}
"""Float32 logits alive at once in a loss. On a GPU each chunk of tokens reads the whole head
twice: these are 500 tokens of a vocabulary of 128,256, so that the products are bound by
arithmetic. An 8B-shaped step of 2048 tokens or more peaks elsewhere (XLA's memory analysis for
an H200)."""

SCORE_BYTES: Limit = {"cpu": 16 << 20, "gpu": 64 << 20}
"""Float32 scores of attention alive at once. On a GPU small blocks are all launches; these are
the most that do not raise the peak of an 8B-shaped step of 2048 tokens (XLA's memory analysis
for an H200)."""

_CAPABILITIES = {
    r"H100|H200|H800|GH200": (9, 0),
    r"A100|A800|A30\b": (8, 0),
    r"RTX 30|A10\b|A40\b|RTX A\d": (8, 6),
    r"RTX 40|\bL4\b|L40|RTX \d+ Ada": (8, 9),
}


@dataclasses.dataclass(frozen=True)
class Device:
    """What a computation is compiled for.

    Attributes:
      platform: 'gpu', 'cpu', ...
      kind: The device's name in jax, such as 'NVIDIA H200'; empty without a GPU.
      capability: CUDA compute capability, (0, 0) if unknown or no GPU.
      cores: Streaming multiprocessors; 0 if unknown or no GPU.
    """

    platform: str
    kind: str = ""
    capability: tuple[int, int] = (0, 0)
    cores: int = 0

    def __str__(self) -> str:
        major, minor = self.capability
        return f"{self.kind} (sm_{major}{minor})" if self.kind else self.platform


def current_device() -> Device:
    """Returns the device that is traced for, as far as jax lets one know it by then.

    That is the device of the mesh in whose context (`jax.set_mesh`, `use_abstract_mesh`,
    `shard_map`) the trace is, else `jax.default_device`, else the default backend's first.
    Arrays that were put elsewhere, and the platforms that a caller of `lower` names, are not
    known before the trace has ended: say such a device by one of the two.
    """
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None:
        return _absent(abstract.platform, abstract.device_kind, abstract.num_cores or 0)
    default = jax.config.jax_default_device  # a device, the name of a platform, or None
    if default is None or isinstance(default, str):
        default = jax.local_devices(backend=default)[0]
    return _present(default)


def limit(by_platform: Limit) -> int:
    """Returns the bytes that hold for the device that is traced for."""
    cpu = current_device().platform == "cpu"
    return by_platform["cpu" if cpu else "gpu"]


def _present(device: Any) -> Device:
    """Describes one of jax's devices."""
    if device.platform != "gpu":
        return Device(device.platform)
    major, _, minor = str(getattr(device, "compute_capability", "0.0")).partition(".")
    return Device(
        "gpu",
        device.device_kind,
        (int(major), int(minor or 0)),
        getattr(device, "core_count", 0),
    )


def _absent(platform: str, kind: str, cores: int) -> Device:
    """Describes what a mesh says of its devices, which need not be there."""
    if platform != "gpu":
        return Device(platform)
    for device in jax.local_devices():
        if device.device_kind == kind:
            return _present(device)
    for pattern, capability in _CAPABILITIES.items():
        if re.search(pattern, kind):
            return Device("gpu", kind, capability, cores)
    return Device("gpu", kind, (0, 0), cores)
