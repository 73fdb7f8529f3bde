"""Products as gpu/suite.py and gpu/tune.py compile and time them."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.device import current_device
from pallas_kernels.formats import QuantizedTensor
from pallas_kernels.packed_matmul import (
    IMPLEMENTATIONS,
    choose,
    nf4_lora_matmul,
    nf4_matmul,
)
from pallas_kernels.tuning import Choice

REPEATS = 2
CALLS = 24  # of a repeat, at least
ROTATED_BYTES = 200_000_000  # past any L2
RANK = 16
SCALE = 2.0

spec = jax.ShapeDtypeStruct


class Built:
    """A compiled task: run(*fixed, *rotated), and what goes in."""

    def __init__(self, f: Callable, fixed: list, rotated: list):
        self.run = jax.jit(f).lower(*fixed, *rotated).compile()
        self.fixed, self.rotated = fixed, rotated


def build(task: dict[str, Any]) -> Built:
    """Compiles the product of a task (see gpu/tasks.py) from shapes alone."""
    if task["section"] == "ceilings":
        return _ceiling(task["what"])
    m, n, k, what = task["m"], task["n"], task["k"], task["what"]
    dtype = jnp.dtype(task.get("dtype", "bfloat16"))
    w = QuantizedTensor.abstract((n, k), codebook=task.get("codebook", "nf4"))
    x, dy = spec((m, k), dtype), spec((m, n), dtype)
    factors = [spec((k, RANK), jnp.float32), spec((RANK, n), jnp.float32)]
    if task["section"] == "lora":
        name = None if what == "ours" else "two_pass"
        return Built(_adapted(name), [x, dy, *factors], [w])
    forward = task["direction"] == "forward"
    first = x if forward else dy
    if task["section"] == "tune":
        return _candidate(task, first, w)
    if what == "dense":
        f = _dense_forward if forward else _dense_backward
        return Built(f, [first], [spec((n, k), dtype)])
    fixed = [first, *(factors if task.get("rank") else [])]
    exact = task.get("exact", False)

    def product(x, *rest):
        if fixed[1:]:
            a, b, w = rest
            return nf4_lora_matmul(x, w, a, b, SCALE, what, exact=exact)
        return nf4_matmul(x, rest[0], what, exact=exact)

    def gradient(dy, *rest):
        # The product is linear in x, so its transpose needs no forward pass.
        pull = jax.vjp(lambda x: product(x, *rest), jnp.zeros(x.shape, x.dtype))[1]
        return pull(dy)[0]

    return Built(product if forward else gradient, fixed, [w])


def _ceiling(what: str) -> Built:
    if what == "copy":
        return Built(
            lambda x: x + jnp.bfloat16(1), [spec((1 << 31,), jnp.bfloat16)], []
        )
    return Built(jnp.dot, [spec((8192, 8192), jnp.bfloat16)] * 2, [])


def _dense_forward(x, w):
    y = jnp.dot(x, w.T, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def _dense_backward(dy, w):
    return jnp.dot(dy, w, preferred_element_type=jnp.float32).astype(dy.dtype)


def _adapted(name: str | None) -> Callable:
    """An adapted linear with all of its gradients."""

    def f(x, dy, a, b, w):
        def product(x, a, b):
            return nf4_lora_matmul(x, w, a, b, SCALE, name)

        y, pull = jax.vjp(product, x, a, b)
        return y, *pull(dy)

    return f


def _candidate(task: dict[str, Any], x: Any, w: Any) -> Built:
    """A product with the config that the task names, whatever the table says."""
    device = current_device()
    choice = Choice(task["what"], tuple(sorted(task["config"].items())))
    one = IMPLEMENTATIONS[task["what"]]
    run = getattr(one, task["direction"])
    width = w.shape[0] if task["direction"] == "forward" else w.shape[1]
    rank = task["rank"]
    pair = [spec((x.shape[0], rank), x.dtype), spec((width, rank), x.dtype)]
    fixed = [x, *(pair if rank else [])]

    def f(x, *rest):
        *addend, w = rest
        return run(x, w, tuple(addend) or None, choice, device)

    return Built(f, fixed, [w])


class Data:
    """Random arrays: never zeros, which run faster than real data."""

    def __init__(self):
        self.seed = time.time_ns() % (1 << 31)

    def __call__(self, one: Any) -> jax.Array:
        self.seed += 1
        key = jax.random.key(self.seed)
        if one.dtype in (jnp.uint16, jnp.uint8):
            return jax.random.bits(key, one.shape, one.dtype)
        if one.dtype == jnp.float32 and len(one.shape) < 2:  # absmax and its parts
            return jax.random.uniform(key, one.shape, jnp.float32, 0.02, 0.1)
        return jax.random.normal(key, one.shape, jnp.float32).astype(one.dtype)


def time_on_device(built: Built, data: Data) -> dict[str, Any]:
    """Returns the device microseconds of a call.

    The sum of a call's kernels, by CUPTI, over calls that rotate among weights larger
    together than the L2.
    """
    # The reader that jax's own mosaic_gpu.profiler.measure is made of; that one repeats a
    # call with the same arguments, which the L2 would serve.
    from jax._src.lib import mosaic_gpu

    cupti = mosaic_gpu._mosaic_gpu_ext
    args = [data(one) for one in built.fixed]
    sets = [
        [jax.tree.map(data, w) for w in built.rotated] for _ in range(rotated(built.rotated))
    ]  # fmt: skip
    for one in sets:
        jax.block_until_ready(built.run(*args, *one))
    turns = max(2, CALLS // len(sets))
    repeats = []
    for _ in range(REPEATS):
        cupti._cupti_init()
        for _ in range(turns):
            results = [built.run(*args, *one) for one in sets]
        jax.block_until_ready(results)
        kernels = [1e3 * ms for _, ms in cupti._cupti_get_timings(True)]
        repeats.append(per_call(kernels, turns * len(sets)))
    return {**statistic(repeats), "kernels": len(kernels) // (turns * len(sets))}


def rotated(weights: list) -> int:
    """Returns how many sets of weights to rotate among."""
    total = sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(weights))
    return max(3, min(24, -(-ROTATED_BYTES // total))) if total else 1


def per_call(kernels: list[float], calls: int) -> list[float]:
    """Adds up the kernels of each call, which are alike in all of them."""
    if not kernels or len(kernels) % calls:
        raise RuntimeError(f"{len(kernels)} kernels in {calls} calls")
    each = len(kernels) // calls
    return [sum(kernels[i * each : (i + 1) * each]) for i in range(calls)]


def statistic(repeats: list[list[float]]) -> dict[str, Any]:
    """Returns what is kept of the calls' times: of everyone, ours and rivals', the same.

    The median of all calls, their 10th and 90th percentile, and each repeat's median.
    """
    every = sorted(us for repeat in repeats for us in repeat)
    return {
        "us": every[len(every) // 2],
        "us_10": every[len(every) // 10],
        "us_90": every[-1 - len(every) // 10],
        "us_repeats": [sorted(repeat)[len(repeat) // 2] for repeat in repeats],
    }


def chosen(task: dict[str, Any]) -> dict[str, Any]:
    """Returns a sweep task's config and whether it is what a free choice takes."""
    w = QuantizedTensor.abstract((task["n"], task["k"]))
    if task["what"] not in IMPLEMENTATIONS:
        return {}
    args = (task["direction"], task["m"], w, jnp.dtype(jnp.bfloat16))
    free = choose(*args)
    named = choose(*args, name=task["what"])
    return {
        "chosen": free.implementation == task["what"],
        "config": dict(named.config),
        "why": free.why,
    }
