"""What gpu/suite.py times is the product or step it says, and how times are added up."""

import contextlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from scripts.gpu import bitsandbytes, products, step


@pytest.mark.slow
@pytest.mark.parametrize(
    "task",
    [
        {"section": "sweep", "what": "dense", "direction": "forward"},
        {"section": "sweep", "what": "dense", "direction": "backward"},
        {"section": "sweep", "what": "two_pass", "direction": "forward"},
        {"section": "sweep", "what": "xla", "direction": "backward"},
        {"section": "lora", "what": "ours"},
        {"section": "lora", "what": "two_pass and separate"},
    ],
)
def test_a_timed_product_is_the_product(task):
    task |= {"m": 4, "n": 128, "k": 256}
    built, data = products.build(task), products.Data()
    args = [data(one) for one in built.fixed]
    (w,) = (jax.tree.map(data, one) for one in built.rotated)
    got = built.run(*args, w)
    dense = w if task["what"] == "dense" else w.decode("bfloat16")
    x, *rest = (np.asarray(a, np.float64) for a in args)
    dense = np.asarray(dense, np.float64)
    if task["section"] == "lora":
        dy, a, b = rest
        y, dx, da, db = got
        pairs = [
            (y, x @ dense.T + 2 * x @ a @ b),
            (dx, dy @ dense + 2 * dy @ b.T @ a.T),
        ]
        pairs += [(da, 2 * x.T @ dy @ b.T), (db, 2 * (x @ a).T @ dy)]
    else:
        pairs = [(got, x @ (dense.T if task["direction"] == "forward" else dense))]
    for y, want in pairs:
        error = np.linalg.norm(np.asarray(y, np.float64) - want) / np.linalg.norm(want)
        assert error < 0.01


def test_a_statistic_is_the_median_of_all_calls_and_keeps_the_repeats():
    kernels = [1.0, 2.0] * 3  # two kernels in each of three calls
    assert products.per_call(kernels, 3) == [3.0, 3.0, 3.0]
    with pytest.raises(RuntimeError, match="6 kernels in 4 calls"):
        products.per_call(kernels, 4)
    kept = products.statistic([[3.0, 1.0, 2.0], [7.0, 5.0, 6.0]])
    assert kept["us"] in (3.0, 5.0) and kept["us_repeats"] == [2.0, 6.0]
    assert (kept["us_10"], kept["us_90"]) == (1.0, 7.0)


def test_bitsandbytes_kernels_are_ordered_and_copies_left_out():
    def event(name, kind, start, us):
        time_range = SimpleNamespace(start=start, elapsed_us=lambda: us)
        return SimpleNamespace(name=name, device_type=kind, time_range=time_range)

    events = [
        event("gemm", "cuda", 30, 4.0),
        event("Memset (Device)", "cuda", 20, 9.0),
        event("cudaLaunchKernel", "cpu", 5, 8.0),
        event("dequantize", "cuda", 10, 3.0),
    ]
    assert bitsandbytes.kernel_times(events, "cuda") == [3.0, 4.0]


@pytest.mark.parametrize(
    ("task", "wanted"),
    [
        ({"what": "ours", "batch": 4}, {"micro_batch": 4, "checkpoint": "layer"}),
        ({"what": "8b streamed"}, {"micro_batch": 1, "stream": True}),
    ],
)
def test_the_step_that_is_timed_is_that_of_an_8b_model(monkeypatch, task, wanted):
    setups = []
    monkeypatch.setattr(
        step, "measured", lambda setup, turn: setups.append(setup) or {}
    )
    section = "step" if "batch" in task else "memory"
    step.our_step({**task, "section": section, "seq": 2048}, contextlib.nullcontext)
    (setup,) = setups
    assert setup.config.num_layers == 32 and setup.config.hidden_size == 4096
    assert setup.lora.rank == 16 and setup.max_tokens == 2048
    assert {name: getattr(setup, name) for name in wanted} == wanted
