"""The Hopper kernels in the interpreter, with race detection.

test_compiled.py compiles them for an H200. On hardware scripts/gpu/suite.py checks the same
products.
"""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.config.quant import QuantConfig
from qlora_jax.nn.packing import quantize_tensor

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("Mosaic GPU kernels need jax >= 0.11.2", allow_module_level=True)

import jax.experimental.pallas.mosaic_gpu as plgpu  # noqa: E402

from pallas_kernels.packed_matmul.hopper import backward, forward  # noqa: E402
from pallas_kernels.packed_matmul.hopper.config import Config  # noqa: E402

# Exact decoders round a weight once, as the oracle does; what is left is the rounding of
# the result (2^-9 at most, 2^-10.3 in the mean) and of the float32 sums.
EXACT_BFLOAT16 = 2.5e-3
EXACT_FLOAT16 = 4e-4
EXACT_FLOAT32_PARTS = 1e-6  # split_k gives unrounded sums


@dataclasses.dataclass(frozen=True)
class Case:
    m: int
    n: int
    k: int
    rank: int
    config: Config
    backward: bool = False
    dtype: str = "bfloat16"


def small(**fields) -> Config:
    return Config(decoder="select", weight_stages=2, **fields)


FORWARD = [
    Case(128, 256, 512, 0, small(block_m=64, x_stages=4)),
    Case(128, 256, 512, 64, small(block_m=64, x_stages=3, minor="n", width=2)),
    Case(64, 128, 1024, 128, small(block_m=64, x_stages=5, split_k=2)),
    Case(64, 256, 512, 64, small(block_m=32, x_stages=2, x_depth=256)),
    Case(16, 128, 256, 0, small(block_m=8, x_stages=4), dtype="float16"),
]
DEEP = Config(decoder="select", weight_stages=5, block_m=64, x_stages=3)
BACKWARD = [
    Case(128, 256, 512, 0, DEEP, backward=True),
    Case(128, 192, 512, 64, DEEP, backward=True),
    Case(64, 256, 256, 64, dataclasses.replace(DEEP, split_k=2), backward=True),
    Case(64, 320, 256, 0, DEEP, backward=True, dtype="float16"),
]


def check(case: Case) -> float:
    """Runs a case on fresh inputs; returns its relative error to float64."""
    rng = np.random.default_rng()
    dense = jnp.asarray(rng.standard_normal((case.n, case.k)) * 0.02, jnp.float32)
    w = quantize_tensor(dense, QuantConfig())
    decoded = np.asarray(w.decode_one(case.dtype), np.float64)
    right = decoded if case.backward else decoded.T
    x = jnp.asarray(rng.standard_normal((case.m, right.shape[0])), case.dtype)
    want = np.asarray(x, np.float64) @ right
    addend = None
    if case.rank:
        u = jnp.asarray(rng.standard_normal((case.m, case.rank)), case.dtype)
        v = jnp.asarray(rng.standard_normal((right.shape[1], case.rank)), case.dtype)
        addend = (u, v)
        want = want + np.asarray(u, np.float64) @ np.asarray(v, np.float64).T
    y = (backward.backward if case.backward else forward.forward)(
        x,
        w.codes,
        w.decode_absmax().reshape(case.n, -1).T,
        addend,
        config=case.config,
        codebook="nf4",
        num_sms=2,
        interpret=plgpu.InterpretGPUParams(
            detect_races=True, uninitialized_memory="nan"
        ),
    )
    got = np.asarray(y, np.float64)
    if case.config.split_k > 1:
        got = got.sum(0).T
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def tolerance(case: Case) -> float:
    if case.config.split_k > 1:
        return EXACT_FLOAT32_PARTS
    return EXACT_BFLOAT16 if case.dtype == "bfloat16" else EXACT_FLOAT16


@pytest.mark.parametrize("case", FORWARD + BACKWARD, ids=str)
def test_products_without_races(case: Case, capfd: pytest.CaptureFixture):
    assert check(case) < tolerance(case)
    out = capfd.readouterr()
    assert "RACE" not in out.out + out.err


def test_four_warpgroups_in_the_interpreter():
    """Runs in a process of its own: five warpgroups need as many threads of XLA's pool."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "import test_hopper as t\n"
        "case = t.Case(64, 256, 512, 64, t.small(block_m=32, x_stages=2,"
        " x_depth=256, warpgroups=4))\n"
        "assert t.check(case) < t.tolerance(case)\n"
    )
    here = os.path.dirname(__file__)
    tests = os.path.dirname(os.path.dirname(here))
    done = subprocess.run(
        [sys.executable, "-c", code, here, tests],
        env=os.environ | {"NPROC": "8", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "RACE" not in done.stdout + done.stderr
