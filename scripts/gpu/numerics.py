"""Numerics of gpu/suite.py: products of fresh random inputs against numpy's float64.

A check passes if ||y - want|| / ||want|| is within the tolerance, and every value of y is
finite (what the output's memory held before is NaN). Against the identity ("bits") the
product is the decoded weight, and must be that of bitsandbytes to the bit.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats import QuantizedTensor
from pallas_kernels.formats.absmax4 import codebook as cb
from pallas_kernels.formats.absmax4 import layout
from scripts.gpu import products

SAMPLE = 64  # tokens that are compared, the last among them

BITS = {"bfloat16": 8, "float16": 11}
"""Bits of a dtype's significand."""

ROUNDINGS = {
    "xla": 2,  # the weight, the result
    "two_pass": 2,
    "exact": 2,
    "decode": 2,  # the codebook, the result; absmax and sums stay in float32
    "hopper": 4,  # the codebook, absmax, their product, the result
    "ampere": 4,
    "adapter": 5,  # both factors, hidden; and where the adapter is added apart, two more
    "attention": 12,  # scores' weights, their gradients, and each result
}
"""Roundings to the compute dtype between inputs and result: independent, so their squares
add up. Rounding inside float32 sums is far below."""

MARGIN = 1.3
"""A product of one token has a few hundred values: their error scatters by 4 to 7 %."""


def tolerance(task: dict[str, Any]) -> float:
    """Returns the relative error that a check may have."""
    # Uniform over a unit in the last place, whose relative size is 2^(1-bits) over a
    # significand that is distributed as 1/s over [1, 2).
    once = 2.0 ** (1 - BITS[task["dtype"]]) / math.sqrt(12)
    once *= math.sqrt(3 / (8 * math.log(2)))
    what = "exact" if task.get("exact") else task["what"]
    roundings = ROUNDINGS[what] + (ROUNDINGS["adapter"] if task.get("rank") else 0)
    return MARGIN * math.sqrt(roundings) * once


def check(task: dict[str, Any], turn: Callable[[], Any]) -> dict[str, Any]:
    """Runs a numerics task; what uses the device is inside `with turn()`."""
    rng = np.random.default_rng()
    if task["what"] == "attention":
        return _check_attention(task, turn, rng)
    built = products.build(task)
    w = _random_weight(built.rotated[0], rng)
    args = [_random(one, rng) for one in built.fixed]
    if task["check"] == "bits":
        args[0] = np.eye(*args[0].shape, dtype=args[0].dtype)
    dense = decoded(w)
    weight = dense if task["direction"] == "backward" else dense.T
    if task["check"] == "bits":
        got = _run(built.run, [*args, w], turn)
        want = weight.astype(got.dtype)
        wrong = int((np.asarray(got, np.float32) != np.asarray(want, np.float32)).sum())
        return {"wrong": wrong, "tolerance": 0, "passed": wrong == 0}
    rows = rng.choice(task["m"], min(SAMPLE, task["m"]), replace=False)
    rows[0] = task["m"] - 1
    x, *factors = (np.asarray(a, np.float64) for a in args)
    want = x[rows] @ np.asarray(weight, np.float64)
    if factors:
        a, b = factors
        a, b = (a, b) if task["direction"] == "forward" else (b.T, a.T)
        want = want + products.SCALE * (x[rows] @ a) @ b
    got = np.asarray(_run(built.run, [*args, w], turn), np.float64)
    return _verdict(task, [(got[rows], want)], bool(np.isfinite(got).all()))


def _verdict(task: dict[str, Any], pairs: list, finite: bool) -> dict[str, Any]:
    errors = [np.linalg.norm(g - w) / np.linalg.norm(w) for g, w in pairs]
    error, allowed = float(max(errors)), tolerance(task)
    if not finite or not math.isfinite(error):
        return {"error": None, "tolerance": allowed, "passed": False}
    return {"error": error, "tolerance": allowed, "passed": error <= allowed}


def _run(run: Callable, args: list, turn: Callable[[], Any]) -> Any:
    """Returns the result(s) in host memory, of outputs whose memory held NaN."""
    with turn():
        args = [jax.tree.map(jnp.asarray, a) for a in args]
        # What is freed here is what the output's memory may be: not the right answer.
        jax.block_until_ready(jnp.full((1 << 26,), jnp.nan)).delete()
        return jax.tree.map(np.asarray, run(*args))


def _random(one: Any, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(one.shape, np.float32).astype(one.dtype)


def _random_weight(w: QuantizedTensor, rng: np.random.Generator) -> QuantizedTensor:
    def made(one: Any) -> np.ndarray:
        dtype = np.dtype(one.dtype)
        if dtype.kind == "u":
            return rng.integers(0, np.iinfo(dtype).max, one.shape, dtype, endpoint=True)
        return np.asarray(rng.uniform(0.02, 0.1, one.shape), dtype)

    return jax.tree.map(made, w)


def decoded(w: QuantizedTensor) -> np.ndarray:
    """Decodes numpy arrays to float32 as QuantizedTensor's invariants say."""
    codes = layout.unpack(w.codes, w.layout, w.shape)
    scale = np.repeat(w.absmax_scale, cb.ABSMAX_BLOCK_SIZE)[: w.blocks]
    absmax = cb.dynamic_map()[w.absmax_codes.reshape(-1)] * scale + w.absmax_offset
    values = cb.values(w.codebook)[codes].reshape(-1, w.block_size)
    return (values * absmax[:, None]).reshape(w.shape)


def _check_attention(
    task: dict[str, Any], turn: Callable[[], Any], rng: np.random.Generator
) -> dict[str, Any]:
    """Causal attention with grouped keys, or the largest error of all its gradients."""
    from qlora_jax.nn.attention import causal_attention

    def f(q, k, v, dy):
        y, vjp = jax.vjp(causal_attention, q, k, v)
        return (y,) if task["direction"] == "forward" else vjp(dy)

    seq, heads, dim = task["m"], task["n"], task["k"]
    q = jax.ShapeDtypeStruct((1, seq, heads, dim), task["dtype"])
    k = jax.ShapeDtypeStruct((1, seq, heads // 4, dim), task["dtype"])
    run = jax.jit(f).lower(q, k, k, q).compile()
    args = [_random(one, rng) for one in (q, k, k, q)]
    want = _attention(*args)
    want = want[:1] if task["direction"] == "forward" else want[1:]
    got = [np.asarray(g, np.float64)[0] for g in _run(run, args, turn)]
    finite = all(np.isfinite(g).all() for g in got)
    return _verdict(task, list(zip(got, want, strict=True)), finite)


def _attention(q, k, v, dy) -> list[np.ndarray]:
    """Returns y, dq, dk, dv in float64, (seq, heads, head_dim) each."""
    q, k, v, dy = (np.asarray(a, np.float64)[0].swapaxes(0, 1) for a in (q, k, v, dy))
    group, scale = q.shape[0] // k.shape[0], q.shape[2] ** -0.5
    k, v = (np.repeat(x, group, axis=0) for x in (k, v))
    scores = q @ k.swapaxes(1, 2) * scale
    seen = np.tri(q.shape[1], dtype=bool)
    p = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    p /= p.sum(-1, keepdims=True)
    dp = dy @ v.swapaxes(1, 2)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale

    def summed(x):
        return x.reshape(-1, group, *x.shape[1:]).sum(1)

    dk, dv = summed(ds.swapaxes(1, 2) @ q), summed(p.swapaxes(1, 2) @ dy)
    return [x.swapaxes(0, 1) for x in (p @ v, ds @ k, dk, dv)]


def here(task: dict[str, Any]) -> dict[str, Any]:
    """Runs a check in this process, for itself."""
    return check(task, contextlib.nullcontext)
