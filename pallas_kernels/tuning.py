"""Tables of which kernel runs a product, tiled how, as measured on a device.

A table is one JSON file a device kind, `tuned/<kind>.json`, filled by
scripts/gpu/tune.py. Its entries are

    "forward m<=512 n=4096 k=4096 bfloat16": {"implementation": "hopper",
        "config": {"block_m": 128, ...}, "m": 512, "us": 28.4}

with m in the key rounded up to a power of two and "m" the tokens that were timed, which
may be those of a neighbouring entry; one that was chosen by hand has no "us". Candidates that
failed are under "failures". A file of
the same name in the folder that $QLORA_JAX_TUNED names comes first. Nothing is measured
here: tables are read when a product is traced.
"""

import dataclasses
import functools
import json
import os
import re
from pathlib import Path
from typing import Any, Literal

from pallas_kernels.device import Device

Direction = Literal["forward", "backward"]

LARGEST_BUCKET = 16384


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
