"""What 'hopper' refuses, how it is tiled, and a model of what a tile costs."""

import dataclasses
import math
from typing import Any

from pallas_kernels.device import Device
from pallas_kernels.formats import QuantizedTensor
from pallas_kernels.packed_matmul import mosaic
from pallas_kernels.tuning import Problem

MEMORY_REGISTERS = 40
"""Registers a thread of the warpgroup that only copies keeps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(mosaic.Tiling):
    """Says how a kernel is tiled; all of it is static.

    Attributes:
      block_m: Tokens of an output tile: 8 to 256, a power of two.
      weight_stages: Word tiles in flight (backward with low rank: at least
        warpgroups * planes).
      x_stages: Tiles of x in flight.
      x_depth: Features of such a tile: 64, or 256 in forward for small block_m, where
        fewer and larger copies keep up with the products.
      warpgroups: Warpgroups that compute: 2, or 4 for small m, where more warps hide
        latency.
      planes: Nibble planes a warpgroup owns in backward: 2, or 1 (with 4 warpgroups, or
        for block_m 256), which needs a table decoder.
      out_stages: Buffers of 64 tokens that a warpgroup's results leave through.
    """

    block_m: int = 128
    decoder: mosaic.Decoder = "permute"
    weight_stages: int = 3
    x_stages: int = 6
    x_depth: int = 64
    warpgroups: int = 2
    planes: int = 2
    out_stages: int = 2

    @property
    def compute_registers(self) -> int:
        """Registers a thread of the computing warpgroups may take from the loader."""
        threads = self.warpgroups + 1
        total = 65536 // (128 * threads) // 8 * 8 * threads
        return (total - MEMORY_REGISTERS) // self.warpgroups // 8 * 8

    @property
    def in_flight(self) -> int:
        """Uses of x whose products may run on while the next plane is decoded."""
        return 1 if self.warpgroups == 2 else 0  # more would not fit the registers


def refuses(
    problem: Problem, w: QuantizedTensor, device: Device, exact: bool
) -> str | None:
    """Returns why the kernels cannot run a product, or None."""
    wanted = "sm_90 GPU (H100, H200)"
    if reason := mosaic.refuses(problem, w, device, ((9, 0),), wanted):
        return reason
    least = 128 if problem.direction == "forward" else 64
    if problem.n % 8 or problem.n < least:
        return f"takes n in multiples of 8 from {least} on, this is {problem.n}"
    return None


# --- The model, fitted to measurements on an H200 -----------------------------------------

# Microseconds of one step (256 of k forward, 64 of n backward) of a block's tile, by
# block_m (and planes): one wave of tiles, less the fixed cost. Their record was not kept.
_FORWARD_STEP = {16: 0.80, 32: 0.87, 64: 1.06, 128: 1.59, 256: 2.56}
_BACKWARD_STEP = {(64, 2): 0.60, (64, 1): 0.44, (128, 2): 0.83, (128, 1): 0.50}
_BACKWARD_STEP[256, 1] = 0.74
_FIXED = 4.0  # to launch, fill the table and drain
_REDUCE = 2.5  # the second kernel that adds the parts of a split, and
_BYTES_A_MICROSECOND = 3.0e6  # the parts' way through memory
_TRIED = 6  # of the model's order


def configure(problem: Problem, device: Device, exact: bool = False) -> dict[str, Any]:
    """Returns the Config fields that the model expects to be fastest."""
    return min(fitting(problem, exact), key=lambda c: cost(problem, device.cores, c))


def candidates(problem: Problem, device: Device) -> list[dict[str, Any]]:
    """Returns Config fields worth timing, the model's favourites first."""
    found = fitting(problem)
    return sorted(found, key=lambda c: cost(problem, device.cores, c))[:_TRIED]


def fitting(problem: Problem, exact: bool = False) -> list[dict[str, Any]]:
    """Returns Config fields that are all valid for the problem.

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
