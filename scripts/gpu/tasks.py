"""What gpu/suite.py measures on a device, most telling first."""

import itertools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.device import Device
from pallas_kernels.formats import QuantizedTensor
from pallas_kernels.packed_matmul import IMPLEMENTATIONS, choose
from pallas_kernels.shapes import SHAPES
from scripts.gpu import step

Task = dict[str, Any]

SECTIONS = ("ceilings", "numerics", "sweep", "lora", "step", "memory")
DIRECTIONS = ("forward", "backward")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
GOALS = (1, 8, 16, 64, 128, 512, 1024, 4096)
"""Tokens that the goals speak of."""
SMALL = ("llama3_8b_gate_up", "llama3_8b_down", "llama3_8b_q_o", "llama3_8b_k_v")
LARGE = ("llama3_70b_gate_up", "llama3_70b_down", "llama3_70b_q_o", "llama3_70b_k_v")
RIVALS = ("dense", "bitsandbytes")
RANK = 16

ODD = ((1, 512, 1024), (7, 768, 2560), (33, 512, 1024), (300, 1152, 1536))
"""(m, n, k) of numerics: odd m, and n and k that are no power of two."""


def tasks(
    device: Device, sections: tuple[str, ...] = SECTIONS, wheels: tuple[str, ...] = ()
) -> list[Task]:
    """Returns the tasks of a device.

    Args:
      device: What they run on. Implementations that refuse it are left out; without a GPU
        only numerics are left.
      sections: The sections to include, some of SECTIONS.
      wheels: The ones of 'bitsandbytes' and 'peft' that are installed.
    """
    found = []
    gpu = device.platform == "gpu"
    if "ceilings" in sections and gpu:
        found += [{"section": "ceilings", "what": what} for what in ("copy", "product")]
    if "numerics" in sections:
        found += numerics(device)
    measured = []
    if "sweep" in sections and gpu:
        measured += sweep(device, "bitsandbytes" in wheels)
    if "lora" in sections and gpu:
        measured += [
            {"section": "lora", "what": what, "m": m} | sides(s)
            for s in SMALL[:3]
            for m in (512, 2048, 4096)
            for what in ("ours", "two_pass and separate")
        ]
    found += sorted(measured, key=_rank)
    for section in ("step", "memory"):
        if section in sections and gpu:
            found += step.tasks(section, "peft" in wheels)
    return found


def sweep(device: Device, bitsandbytes: bool) -> list[Task]:
    """Every implementation that can run, and its rivals, over all tokens and linears."""
    found = []
    for name, m, direction in itertools.product(SMALL + LARGE, TOKENS, DIRECTIONS):
        at = {"section": "sweep", "direction": direction, "m": m} | sides(name)
        whats = [
            i for i in IMPLEMENTATIONS if can(i, direction, m, at["n"], at["k"], device)
        ]
        whats += ["dense", *(["bitsandbytes"] if bitsandbytes else [])]
        found += [{**at, "what": what} for what in whats]
    return found


def sides(name: str) -> dict[str, int]:
    """Returns a task's n and k of a linear of SHAPES."""
    return {"n": SHAPES[name].n, "k": SHAPES[name].k}


def first(task: Task) -> bool:
    """Returns whether a task comes before the training steps: all but the sweep's tail."""
    return task["section"] != "sweep" or _rank(task)[0] <= 2


def _rank(task: Task) -> tuple[int, ...]:
    """Sorts what is timed: the goals on the largest linear of 8B, then of all, then all."""
    shapes = [(SHAPES[s].n, SHAPES[s].k) for s in SMALL + LARGE]
    shape = shapes.index((task["n"], task["k"]))
    if task["section"] == "lora":
        tier = 1
    elif task["what"] == "xla":  # never the choice on a GPU
        tier = 6
    elif task["m"] in GOALS:
        tier = 0 if shape == 0 else 2 if shape < len(SMALL) else 3
    else:
        tier = 4 if shape < len(SMALL) else 5
    return tier, shape, TOKENS.index(task["m"])


def can(
    name: str,
    direction: tuning.Direction,
    m: int,
    n: int,
    k: int,
    device: Device,
    dtype: str = "bfloat16",
    exact: bool = False,
) -> bool:
    """Returns whether an implementation can run a product, by its own word."""
    w = QuantizedTensor.abstract((n, k))
    try:
        choose(direction, m, w, jnp.dtype(dtype), device=device, name=name, exact=exact)
    except ValueError:
        return False
    return True


def numerics(device: Device) -> list[Task]:
    """Products to compare with float64, of each implementation that can run here."""
    found = []

    def add(what: str, direction: str, m: int, n: int, k: int, **fields: Any) -> None:
        task = {"section": "numerics", "what": what, "direction": direction}
        task |= {"m": m, "n": n, "k": k, "dtype": "bfloat16", "codebook": "nf4"}
        task |= {"exact": False, "rank": 0, "check": "error"} | fields
        runs = can(what, direction, m, n, k, device, task["dtype"], task["exact"])
        if runs and task not in found:
            found.append(task)

    for what in IMPLEMENTATIONS:
        for direction in DIRECTIONS:
            for m, n, k in ODD:
                add(what, direction, m, n, k)
                add(what, direction, m, n, k, rank=RANK)
            m, n, k = ODD[2]
            m = min(m, 32) if what == "decode" else m
            add(what, direction, m, n, k, dtype="float16")
            add(what, direction, m, n, k, dtype="float16", rank=RANK)
            for codebook in ("fp4", "int4"):
                add(what, direction, m, n, k, codebook=codebook)
            if what == "decode":
                continue
            # Against the identity a product is the decoded weight, to the bit.
            for dtype in ("bfloat16", "float16"):
                size = {"m": 512, "n": 512, "k": 512, "dtype": dtype}
                add(what, direction, **size, exact=True, check="bits")
            if what == "hopper":
                for m, n, k in ODD:
                    add(what, direction, m, n, k, exact=True)
    for m in range(1, 33):
        add("decode", "forward", m, 1024, 2048)
        if m in (1, 2, 5, 8, 9, 16, 24, 32):
            add("decode", "forward", m, 1024, 2048, dtype="float16")
        if m in (1, 8, 16):
            for codebook in ("fp4", "int4"):
                add("decode", "forward", m, 1024, 2048, codebook=codebook)
    for what, direction, m, n, k in tuned(device):
        add(what, direction, m, n, k)
    found += [  # tokens, heads, head_dim
        {"section": "numerics", "what": "attention", "direction": d, "m": 1000}
        | {"n": 8, "k": 128, "dtype": "bfloat16", "check": "error"}
        for d in DIRECTIONS
    ]
    return found


def tuned(device: Device) -> list[tuple[str, tuning.Direction, int, int, int]]:
    """Returns a product of each distinct config of the device's shipped table."""
    path = Path(tuning.__file__).parent / "tuned" / tuning.table_name(device.kind)
    if not path.is_file():
        return []
    found = {}
    for key, entry in json.loads(path.read_text())["entries"].items():
        direction, m, n, k, dtype = key.split()
        size = int(m[3:]), int(n[2:]), int(k[2:])
        config = json.dumps([direction, entry["implementation"], entry["config"]])
        if dtype == "bfloat16":
            found.setdefault(config, (entry["implementation"], direction, *size))
    return list(found.values())


def seconds(task: Task) -> tuple[float, float]:
    """Returns how long a task may compile, and hold the GPU; longer is a hang."""
    return (600, 400) if task["section"] in ("step", "memory") else (120, 60)


def size(task: Task) -> int:
    """Returns about the device bytes that a product's task takes."""
    if task["section"] == "ceilings":
        return 8 << 30
    if "m" not in task:
        return 0
    m, n, k = task["m"], task["n"], task["k"]
    return 4 * m * (n + k) * 2 + 3 * 2 * n * k
