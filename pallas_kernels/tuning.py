"""Which kernel, tiled how: tables measured on a device, and a model where they are silent.

A table is one JSON file a device kind, `tuned/<kind>.json`, filled by
scripts/tune_kernels.py. Its entries are

    "forward m<=512 n=4096 k=4096 bfloat16": {"implementation": "hopper",
        "config": {"block_m": 128, ...}, "m": 512, "us": 28.4}

with m in the key rounded up to a power of two and "m" the tokens that were timed, which
may be those of a neighbouring entry; candidates that failed are under "failures". A file of
the same name in the folder that $QLORA_JAX_TUNED names comes first. Nothing is measured
here: tables are read when a product is traced.
"""

import dataclasses
import functools
import json
import math
import os
import re
from pathlib import Path
from typing import Any, Literal

import jax

Direction = Literal["forward", "backward"]

LARGEST_BUCKET = 16384
DECODE_TOKENS = 16
"""Up to here a free choice takes 'decode': two token blocks of its products.

On an H200 it was measured against 'hopper' at up to these, where it was faster by a seventh
to a third (scripts/results/nvidia_h200_suite.jsonl), and not beyond.
"""

_CAPABILITIES = {
    r"H100|H200|H800|GH200": (9, 0),
    r"A100|A800|A30\b": (8, 0),
    r"RTX 30|A10\b|A40\b|RTX A\d": (8, 6),
    r"RTX 40|\bL4\b|L40|RTX \d+ Ada": (8, 9),
}


@dataclasses.dataclass(frozen=True)
class Device:
    """What a product is compiled for.

    Attributes:
      platform: 'gpu', 'cpu', ...
      kind: As jax names it, 'NVIDIA H200'.
      capability: CUDA compute capability, (0, 0) if unknown or no GPU.
      cores: Streaming multiprocessors; 0 if no GPU.
    """

    platform: str
    kind: str = ""
    capability: tuple[int, int] = (0, 0)
    cores: int = 0


def current_device() -> Device:
    """Returns the device being traced for: an abstract mesh's, else the default one."""
    abstract = jax.sharding.get_abstract_mesh()
    abstract = None if abstract.empty else getattr(abstract, "abstract_device", None)
    if abstract is not None and getattr(abstract, "platform", None) == "gpu":
        kind = abstract.device_kind
        return Device("gpu", kind, _capability(kind), abstract.num_cores or 0)
    backend = jax.default_backend()
    if backend != "gpu":
        return Device(backend)
    device = jax.devices()[0]
    major, _, minor = str(getattr(device, "compute_capability", "0.0")).partition(".")
    return Device(
        "gpu",
        device.device_kind,
        (int(major), int(minor or 0)),
        getattr(device, "core_count", 0),
    )


def _capability(kind: str) -> tuple[int, int]:
    for pattern, capability in _CAPABILITIES.items():
        if re.search(pattern, kind):
            return capability
    return 0, 0


@dataclasses.dataclass(frozen=True)
class Problem:
    """One product: y (m, n) = x (m, k) @ W.T forward, dx = dy @ W backward."""

    direction: Direction
    m: int
    n: int
    k: int
    dtype: str

    @property
    def bucket(self) -> int:
        """Tokens of the table's entry: m rounded up to a power of two."""
        return min(LARGEST_BUCKET, 1 << max(0, self.m - 1).bit_length())

    @property
    def key(self) -> str:
        """The table's key."""
        return f"{self.direction} m<={self.bucket} n={self.n} k={self.k} {self.dtype}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """An implementation, the fields of its Config, and why it was taken."""

    implementation: str
    config: tuple[tuple[str, Any], ...] = ()
    why: str = ""


def look_up(problem: Problem, device: Device) -> Choice | None:
    """Returns the table's choice for a problem, or None."""
    table = _table(device.kind, os.environ.get("QLORA_JAX_TUNED"))
    entry = table.get(problem.key)
    if entry is None:
        return None
    timed, bucket = entry.get("m"), problem.bucket
    how = "measured" if timed in (None, bucket) else f"taken over from m={timed}"
    return Choice(
        entry["implementation"],
        tuple(sorted(entry.get("config", {}).items())),
        f"{how} on {device.kind}: {problem.key}",
    )


def table_name(kind: str) -> str:
    """Returns a device kind's file name: 'nvidia_h200.json'."""
    return re.sub(r"\W+", "_", kind.lower()).strip("_") + ".json"


@functools.cache
def _table(kind: str, folder: str | None) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    folders = [Path(__file__).parent / "tuned"] + ([Path(folder)] if folder else [])
    for place in folders:
        path = place / table_name(kind)
        if kind and path.is_file():
            entries |= json.loads(path.read_text())["entries"]
    return entries


# --- The model: what a tile costs, fitted to measurements on an H200 ----------------------

# Microseconds of one step (256 of k forward, 64 of n backward) of a block's tile, by
# block_m (and planes). From scripts/results/hopper_h200.jsonl: one wave of tiles, less the
# fixed cost.
_FORWARD_STEP = {16: 0.80, 32: 0.87, 64: 1.06, 128: 1.59, 256: 2.56}
_BACKWARD_STEP = {(64, 2): 0.60, (64, 1): 0.44, (128, 2): 0.83, (128, 1): 0.50}
_BACKWARD_STEP[256, 1] = 0.74
_FIXED = 4.0  # to launch, fill the table and drain
_REDUCE = 2.5  # the second kernel that adds the parts of a split, and
_BYTES_A_MICROSECOND = 3.0e6  # the parts' way through memory


def hopper_config(problem: Problem, cores: int, exact: bool = False) -> dict[str, Any]:
    """Returns the hopper.Config fields that the model expects to be fastest."""
    candidates = hopper_candidates(problem, exact)
    return min(candidates, key=lambda c: cost(problem, cores, c))


def hopper_candidates(problem: Problem, exact: bool = False) -> list[dict[str, Any]]:
    """Returns Config fields worth trying, all of them valid for the problem.

    Exact decoding holds float32 values, whose registers leave no room for the largest
    tiles.
    """
    forward = problem.direction == "forward"
    steps = problem.k // 256 if forward else math.ceil(problem.n / 64)
    found = []
    for tile in _FORWARD_STEP if forward else _BACKWARD_STEP:
        block_m, planes = (tile, 2) if isinstance(tile, int) else tile
        if block_m > (16 if forward else 64) and block_m >= 2 * problem.m:
            continue  # more padding than tokens, and a smaller tile will do
        if exact and (block_m == 256 or (not forward and planes == 2)):
            continue
        for split in (1, 2, 4, 7, 8, 16):
            if steps % split == 0 and (split == 1 or steps // split > 1):
                decoder = "table_exact" if exact else "table"
                found.append(_fields(forward, block_m, planes, split, decoder))
    return found


def _fields(
    forward: bool, block_m: int, planes: int, split: int, decoder: str
) -> dict[str, Any]:
    fields: dict[str, Any] = {"block_m": block_m, "decoder": decoder, "split_k": split}
    if forward:
        depth = 256 if block_m <= 64 else 64
        stages = {16: 4, 32: 4, 64: 2, 128: 4, 256: 3}[block_m]
        fields |= {"x_depth": depth, "x_stages": stages}
        fields |= {"weight_stages": 4 if block_m <= 64 else 2}
        if block_m == 64:
            fields["out_stages"] = 1
        return fields
    fields |= {"planes": planes, "x_stages": 8 if block_m == 64 else 4}
    if block_m == 256:
        return fields | {"weight_stages": 2, "out_stages": 1}
    return fields | {"weight_stages": 4}


_DECODE_SUMS = 155 << 10
"""Bytes of shared memory beside decode's table, of 227 KiB, with room for barriers."""


def decode_config(problem: Problem, cores: int) -> dict[str, Any]:
    """Returns the decode.Config fields that were fastest at the shapes measured.

    More tokens than those (8) have more of x in registers and more sums in shared memory:
    then what fits, which was compiled and not measured.
    """
    # A tile's sums stay in shared memory; a block adds up all of its tiles at once.
    tiles = math.ceil(problem.n / 16 / (cores or 132))
    tokens = math.ceil(problem.m / 8)  # blocks of 8
    team = 4 if tokens == 1 else 2  # 4 spill with 16 tokens on jax 0.11.2
    fit = _DECODE_SUMS // (team * tokens * 64 * 8 * 4)
    fields = {"hold_x": True, "batch": min(14, tiles, fit)}
    return fields if team == 4 else fields | {"team": team}


def ampere_config(
    problem: Problem, capability: tuple[int, int] = (8, 0)
) -> dict[str, Any]:
    """Returns the ampere.Config fields; not measured, chosen to compile without spills.

    Two blocks share a multiprocessor, whose shared memory is 164 KiB on an A100, else 100.
    """
    fields = {"block_m": 64, "rows": 128}
    if problem.direction == "forward":
        return fields
    stages = 3 if capability == (8, 0) else 2
    return fields | {"x_stages": stages, "weight_stages": stages}


def cost(problem: Problem, cores: int, fields: dict[str, Any]) -> float:
    """Predicts microseconds."""
    block_m, split = fields["block_m"], fields["split_k"]
    rows = math.ceil(problem.m / block_m)
    if problem.direction == "forward":
        columns, steps = problem.n / 128, problem.k // 256
        step, width = _FORWARD_STEP[block_m], problem.n
    else:
        columns, steps = problem.k / (128 * fields["planes"]), math.ceil(problem.n / 64)
        step, width = _BACKWARD_STEP[block_m, fields["planes"]], problem.k
    waves = math.ceil(rows * columns * split / (cores or 132))
    cost = _FIXED + waves * steps / split * step
    if split > 1:
        cost += _REDUCE + 8 * split * problem.m * width / _BYTES_A_MICROSECOND
    return cost
