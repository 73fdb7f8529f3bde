"""What 'decode' refuses, when it suits, and how it is cut."""

import dataclasses
import math
from typing import Any

from pallas_kernels.device import Device
from pallas_kernels.formats import QuantizedTensor
from pallas_kernels.packed_matmul import mosaic
from pallas_kernels.tuning import Problem

TOKENS = 16
"""Up to here a free choice takes 'decode': two token blocks of its products.

On an H200 it was measured against 'hopper' at up to these, where it was faster by a seventh
to a third (scripts/results/nvidia_h200_suite.jsonl), and not beyond.
"""

_SUMS = 155 << 10
"""Bytes of shared memory beside the table, of 227 KiB, with room for barriers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Says how a product is cut into blocks and splits; all of it is static.

    Attributes:
      teams: Tiles that a block has in work at a time.
      team: Warpgroups that share a tile; its 4 * team warps split k. A power of two.
      splits: Blocks of a cluster, which split k (and so x) once more.
      batch: Tiles whose sums a team keeps in shared memory until it adds them up; 1 with
        splits.
      rows: Rows of W in a tile, a multiple of 16.
      ahead: Tiles that a warpgroup loads ahead of the one that it multiplies.
      hold_x: Whether a warp keeps its part of x in registers, 32 for 8 tokens, rather
        than in shared memory. Where a team takes several steps along k, it takes each
        for all tiles of a batch; ahead must be 1 then.
    """

    teams: int = 1
    team: int = 4
    splits: int = 1
    batch: int = 1
    rows: int = 16
    ahead: int = 1
    hold_x: bool = False


def refuses(
    problem: Problem, w: QuantizedTensor, device: Device, exact: bool
) -> str | None:
    """Returns why the kernel cannot run a product, or None."""
    wanted = "sm_90 GPU (H100, H200)"
    if reason := mosaic.refuses(problem, w, device, ((9, 0),), wanted):
        return reason
    if problem.m > 32:
        return f"takes up to 32 tokens, these are {problem.m}"
    if exact:
        return "rounds the codebook to x's dtype, exact weights were asked for"
    if problem.n % 16:
        return f"takes n in multiples of 16, this is {problem.n}"
    return None


def suits(problem: Problem, device: Device) -> bool:
    """Returns whether a free choice takes it."""
    return problem.m <= TOKENS


def configure(problem: Problem, device: Device, exact: bool = False) -> dict[str, Any]:
    """Returns the Config fields that were fastest at the shapes measured.

    More tokens than those (8) have more of x in registers and more sums in shared memory:
    then what fits, which was compiled and not measured.
    """
    # A tile's sums stay in shared memory; a block adds up all of its tiles at once.
    tiles = math.ceil(problem.n / 16 / (device.cores or 132))
    tokens = math.ceil(problem.m / 8)  # blocks of 8
    team = 4 if tokens == 1 else 2  # 4 spill with 16 tokens on jax 0.11.2
    fit = _SUMS // (team * tokens * 64 * 8 * 4)
    fields = {"hold_x": True, "batch": min(14, tiles, fit)}
    return fields if team == 4 else fields | {"team": team}


def candidates(problem: Problem, device: Device) -> list[dict[str, Any]]:
    """Returns Config fields worth timing: the default's neighbours, those that can cut k
    alone."""
    groups = -(-problem.k // 256)
    base = configure(problem, device)
    found = [base]
    for change in (
        {"batch": max(1, base["batch"] // 2)},
        {"team": 2},
        {"rows": 32, "batch": max(1, base["batch"] // 2)},
        {"hold_x": False},
        {"hold_x": False, "ahead": 2},
        {"hold_x": False, "team": 2, "splits": 2, "batch": 1},
        {"hold_x": False, "teams": 4, "team": 1, "splits": 2, "batch": 1},
    ):
        fields = base | change
        fits = problem.n % fields.get("rows", 16) == 0 and groups >= 8
        if fits and fields not in found:
            found.append(fields)
    return found
