"""The numerics of gpu/suite.py really run: what is right passes, what is wrong fails."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_cases import case

from pallas_kernels.formats import QuantizedTensor
from pallas_kernels.packed_matmul import IMPLEMENTATIONS
from pallas_kernels.packed_matmul.implementation import Implementation
from scripts.gpu import numerics, report


@pytest.mark.slow
@pytest.mark.parametrize("what", ["xla", "two_pass"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"dtype": "float16"},
        {"codebook": "fp4"},
        {"codebook": "int4", "rank": 16},
        {"m": 512, "n": 512, "exact": True, "check": "bits"},
    ],
)
def test_what_is_right_passes(what, direction, fields):
    row = numerics.here(case(what, direction, **fields))
    assert row["passed"], row


def wrong_by(change) -> Implementation:
    """The 'xla' implementation with a changed result."""
    one = IMPLEMENTATIONS["xla"]
    return Implementation(
        forward=lambda *args: change(one.forward(*args)),
        backward=lambda *args: change(one.backward(*args)),
        refuses=one.refuses,
    )


def lost_block(y):
    return y.at[-1, -16:].set(0)


def scaled(y):
    return (y.astype(jnp.float32) * 1.004).astype(y.dtype)


def unwritten(y):
    return y.at[3, 5].set(jnp.nan)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("change", [lost_block, scaled, unwritten])
def test_what_is_wrong_fails(monkeypatch, direction, change):
    monkeypatch.setitem(numerics.ROUNDINGS, "wrong", 2)
    monkeypatch.setitem(IMPLEMENTATIONS, "wrong", wrong_by(change))
    row = numerics.here(case("wrong", direction, m=200))
    assert row["passed"] is False, row


def test_weights_that_are_near_are_not_exact(monkeypatch):
    def twice_rounded(x, w, addend, choice, device):
        w = w.decode("float16").astype(x.dtype)
        return jnp.dot(x, w.T, preferred_element_type=jnp.float32).astype(x.dtype)

    one = Implementation(forward=twice_rounded, backward=None, refuses=lambda *_: None)
    monkeypatch.setitem(IMPLEMENTATIONS, "near", one)
    row = numerics.here(case("near", m=512, n=512, exact=True, check="bits"))
    assert row["passed"] is False and 0 < row["wrong"] < 512 * 512 // 10


def test_the_oracle_decodes_as_the_reference():
    spec = QuantizedTensor.abstract((64, 512), codebook="fp4")
    w = numerics._random_weight(spec, np.random.default_rng(0))
    want = jax.tree.map(jnp.asarray, w).decode("float32")
    np.testing.assert_array_equal(numerics.decoded(w), want)


def test_a_tolerance_is_that_of_the_roundings():
    two = numerics.tolerance(case("xla"))
    rng = np.random.default_rng(0)
    x = np.exp(rng.uniform(0, 5, 100_000)).astype(np.float32)
    once = (x.astype(jnp.bfloat16).astype(np.float32) - x) / x
    rms = np.sqrt(np.square(once).mean())
    assert two == pytest.approx(numerics.MARGIN * np.sqrt(2) * rms, rel=0.02)


def test_a_numerics_task_that_crashed_is_a_failure():
    row = case("hopper") | {"failed": "no answer in 60 s", "lost": True}
    assert report.failed_numerics([row]) == [row]
    assert report.failed_numerics([row, case("hopper") | {"passed": True}]) == []
