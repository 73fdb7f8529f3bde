"""What 'ampere' refuses, and how it is tiled."""

import dataclasses
from typing import Any

from pallas_kernels.device import Device
from pallas_kernels.formats import QuantizedTensor
from pallas_kernels.packed_matmul import mosaic
from pallas_kernels.tuning import Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(mosaic.Tiling):
    """Says how a kernel is tiled; all of it is static.

    Attributes:
      block_m: Tokens of an output tile: 8 to 128, a power of two.
      decoder: The method that turns codes into values (registers.py); the tables take 64
        KiB of shared memory.
      rows: Rows of an output tile. Forward: of n, 64 or 128. Backward: of k, 128 or 256,
        which are two or four nibble planes of 64 words.
      depth: Forward: words along k of a step, 32, or 64 for small block_m.
      x_stages: Turns (of half a step forward, a step backward) whose x is in shared
        memory, 2 or more.
      weight_stages: Word tiles in shared memory, 2 or more. Forward x_stages is less than
        twice of it; backward it equals x_stages.
      blocks_per_sm: Blocks on an SM; shared memory must hold the buffers of all.
    """

    block_m: int = 64
    decoder: mosaic.Decoder = "permute"
    rows: int = 128
    depth: int = 32
    x_stages: int = 3
    weight_stages: int = 2
    blocks_per_sm: int = 2


def refuses(
    problem: Problem, w: QuantizedTensor, device: Device, exact: bool
) -> str | None:
    """Returns why the kernels cannot run a product, or None."""
    capabilities = ((8, 0), (8, 6), (8, 9))
    wanted = "sm_80, 86 or 89 GPU (A100, 3090, 4090)"
    if reason := mosaic.refuses(problem, w, device, capabilities, wanted):
        return reason
    if exact:
        return "its exact decoder is too slow to be of use; take 'two_pass'"
    if problem.n % 128:
        return f"takes n in multiples of 128, this is {problem.n}"
    return None


def configure(problem: Problem, device: Device, exact: bool = False) -> dict[str, Any]:
    """Returns the Config fields; not measured, chosen to compile without spills.

    Two blocks share a multiprocessor, whose shared memory is 164 KiB on an A100, else 100.
    """
    fields: dict[str, Any] = {"block_m": 64, "rows": 128}
    if problem.direction == "forward":
        return fields
    stages = 3 if device.capability == (8, 0) else 2
    return fields | {"x_stages": stages, "weight_stages": stages}


def candidates(problem: Problem, device: Device) -> list[dict[str, Any]]:
    """Returns Config fields worth timing: tiles no larger than the tokens, k cut where few."""
    forward = problem.direction == "forward"
    base, found = configure(problem, device), []
    for block_m in (16, 32, 64, 128):
        if block_m > 16 and block_m >= 2 * problem.m:
            continue
        for rows in (64, 128) if forward else (128, 256):
            if block_m == 128 and rows == (128 if forward else 256):
                continue  # spills
            tiles = (
                -(-problem.m // block_m) * (problem.n if forward else problem.k) // rows
            )
            steps = problem.k // 256 if forward else problem.n // 64
            for split in (1, 4):
                if split > 1 and (tiles > 512 or steps % split or steps == split):
                    continue
                fields = base | {"block_m": block_m, "rows": rows}
                found.append(fields | ({"split_k": split} if split > 1 else {}))
    return found
