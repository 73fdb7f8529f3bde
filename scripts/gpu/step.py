"""Whole training steps of ours, really run: sections `step` and `memory` of gpu/suite.py.

`step` is a step of an 8B-shaped Llama at two batch sizes, beside PEFT's (gpu/peft.py).
`memory` runs what the plan and XLA's account promise (scripts/results/memory_h200.jsonl): an
8B-shaped step plain, paged and streamed, and a 70B-shaped one on 48 GB and, streamed, on
12 GB. Weights are random and alike in all layers; memory and time do not depend on them.
"""

import dataclasses
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

from scripts.bench import harness

TABLES = {"embedding": "4bit", "head": "4bit"}
LEAST = {**TABLES, "checkpoint": "host", "offload": True}
CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "8b": ("llama-8b", {}, 0),
    "8b paged": ("llama-8b", {"offload": True}, 0),
    "8b streamed": ("llama-8b", {"stream": True}, 0),
    "8b streamed, 4 micro-batches": ("llama-8b", {"stream": True, "grad_accum": 4}, 0),
    "70b in 48 GB": ("llama-70b", LEAST, 48e9),
    "70b streamed in 12 GB": ("llama-70b", {**LEAST, "stream": True}, 12e9),
}
"""What -> (model of bench/memory.py, settings, device bytes it may take; 0 for all)."""
BY_XLA = "ours, attention by xla"
WARM_UP, STEPS = 2, 4


def tasks(section: str, peft: bool) -> list[dict[str, Any]]:
    """Returns a section's tasks, most wanted first; PEFT's too where it is there."""
    if section == "memory":
        return [{"section": section, "what": what, "seq": 2048} for what in CASES]
    return [
        {"section": section, "what": what, "batch": batch, "seq": 2048}
        for batch in (1, 4)
        for what in ("ours", "peft", BY_XLA)
        if what != "peft" or peft
    ]


def our_step(task: dict[str, Any], turn: Callable[[], Any]) -> dict[str, Any]:
    """Runs a task's step; the GPU is used inside `with turn()`.

    Call it before jax starts: it bounds this process's allocator, and names the attention.
    """
    model, changes, size = CASES.get(task["what"], CASES["8b"])
    if size:
        _cap(size)
    if task["what"] == BY_XLA:
        os.environ["QLORA_JAX_ATTENTION"] = "xla"
    from scripts.bench.memory import setup_of

    changes = {**changes, "micro_batch": task.get("batch", 1)}
    figures = measured(setup_of(model, {**changes, "max_tokens": task["seq"]}), turn)
    if task["section"] == "step":
        figures["peak_gib"] = (figures.get("peak_bytes") or 0) / 2**30
    return figures


def _cap(size: float) -> None:
    asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    fraction = size / (float(answer.split()[0]) * 2**20)
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{fraction:.4f}"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true"  # in one piece


def timed(step: Callable[[], Any], steps: int = STEPS) -> float:
    """Returns the median seconds of a step, of ours and of PEFT's, after two others."""
    taken = harness.take_turns({"step": step}, steps, WARM_UP)["step"]
    return statistics.median(taken)


def measured(setup: Any, turn: Callable[[], Any], steps: int = STEPS) -> dict[str, Any]:
    """Returns tokens a second, peak memory, XLA's account and the plan's of a setup's step."""
    import jax
    import numpy as np

    from qlora_jax.budget.estimate import estimate, tree_bytes
    from qlora_jax.train.compiled import account, compile_step

    began = time.perf_counter()
    compiled = compile_step(setup)
    compile_s = time.perf_counter() - began
    platform = "gpu" if jax.default_backend() == "gpu" else "cpu"
    rng = np.random.default_rng(0)
    with turn():
        infos, places = compiled.args_info[0], compiled.input_shardings[0]
        lora, base, state = (
            filled(x, place, rng)
            for x, place in zip(infos[:3], places[:3], strict=True)
        )
        here, shape = jax.tree.leaves(lora)[0].sharding, infos[3]["tokens"].shape
        batch = {
            "tokens": rng.integers(0, setup.config.vocab_size, shape).astype(np.int32),
            "weights": np.ones(shape, np.float32),
        }
        batch = jax.device_put(batch, here)
        away = [
            x
            for x in jax.tree.leaves(base)
            if x.sharding.memory_kind != here.memory_kind
        ]
        copy_s = arrival_seconds(away, here) if away else 0.0
        held = [lora, state, {}]

        def step() -> None:
            lora, state, _ = held
            held[:] = jax.block_until_ready(compiled(lora, base, state, batch))

        step_s = timed(step, steps)
        stats = jax.devices()[0].memory_stats() or {}
    return {
        "tokens_per_s": setup.tokens * setup.grad_accum / step_s,
        "step_s": step_s,
        "copies_s": 2 * copy_s,  # forward and backward, by themselves
        "compile_s": compile_s,
        "loss": float(held[2]["loss"]),
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "limit_bytes": stats.get("bytes_limit"),
        "host_bytes": tree_bytes(away),
        "xla": account(compiled)._asdict(),
        "plan": dataclasses.asdict(estimate(setup, platform)),
        "kernels": compiled.as_text().count('custom_call_target="mosaic_gpu'),
    }


def filled(tree: Any, places: Any, rng: Any) -> Any:
    """Returns arrays of random values, where and as a compiled step wants them."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    def fill(x: Any, place: Any) -> Any:
        dtype = np.dtype(x.dtype)
        cell = x.shape[1:]  # alike in all layers
        if not x.shape:
            made = np.zeros((), dtype)
        elif dtype.kind in "ui":
            made = rng.integers(0, np.iinfo(dtype).max, cell, dtype, endpoint=True)
        else:
            made = (0.01 * rng.random(cell, np.float32)).astype(dtype)
        if place.memory_kind == "pinned_host":
            made = np.ascontiguousarray(np.broadcast_to(made, x.shape))
            return jax.block_until_ready(jax.device_put(made, place))
        repeat = jax.jit(lambda c: jnp.broadcast_to(c, x.shape), out_shardings=place)
        return jax.block_until_ready(repeat(made))

    specs, structure = jax.tree.flatten(tree)
    places = structure.flatten_up_to(places)
    made = {  # the largest first, while the free memory is in one piece
        i: fill(specs[i], places[i])
        for i in sorted(range(len(specs)), key=lambda i: -math.prod(specs[i].shape))
    }
    return structure.unflatten([made[i] for i in range(len(specs))])


def arrival_seconds(arrays: list[Any], here: Any) -> float:
    """Returns how long the host's arrays take to the device, measured on a layer of one."""
    import jax
    import numpy as np

    largest = max(arrays, key=lambda x: x.nbytes)
    layer = np.ones(largest.shape[1:], largest.dtype)
    layer = jax.block_until_ready(jax.device_put(layer, largest.sharding))
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        jax.block_until_ready(jax.device_put(layer, here))
        seconds.append(time.perf_counter() - began)
    return min(seconds) * sum(x.nbytes for x in arrays) / layer.nbytes
