"""The Hopper kernels: in the interpreter with race detection, and compiled for an H200.

On hardware scripts/gpu_suite.py checks the same products.
"""

import dataclasses
import os
import subprocess
import sys

import aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import reference
from pallas_kernels.shapes import SHAPES
from qlora_jax.quant import QuantConfig, quantize_tensor

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("Mosaic GPU kernels need jax >= 0.11.2", allow_module_level=True)

import jax.experimental.pallas.mosaic_gpu as plgpu  # noqa: E402

from pallas_kernels import hopper  # noqa: E402

# Exact decoders round a weight once, as the oracle does; what is left is the rounding of
# the result (2^-9 at most, 2^-10.3 in the mean) and of the float32 sums.
EXACT_BFLOAT16 = 2.5e-3
EXACT_FLOAT16 = 4e-4
EXACT_FLOAT32_PARTS = 1e-6  # split_k gives unrounded sums

Config = hopper.Config


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
    decoded = np.asarray(reference.dequantize(w, case.dtype), np.float64)
    right = decoded if case.backward else decoded.T
    x = jnp.asarray(rng.standard_normal((case.m, right.shape[0])), case.dtype)
    want = np.asarray(x, np.float64) @ right
    addend = None
    if case.rank:
        u = jnp.asarray(rng.standard_normal((case.m, case.rank)), case.dtype)
        v = jnp.asarray(rng.standard_normal((right.shape[1], case.rank)), case.dtype)
        addend = (u, v)
        want = want + np.asarray(u, np.float64) @ np.asarray(v, np.float64).T
    y = (hopper.backward if case.backward else hopper.forward)(
        x,
        w.codes,
        reference.decode_absmax(w).reshape(case.n, -1).T,
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
    """In a process of its own: five warpgroups need as many threads of XLA's pool."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "import test_hopper as t\n"
        "case = t.Case(64, 256, 512, 64, t.small(block_m=32, x_stages=2,"
        " x_depth=256, warpgroups=4))\n"
        "assert t.check(case) < t.tolerance(case)\n"
    )
    here = os.path.dirname(__file__)
    done = subprocess.run(
        [sys.executable, "-c", code, here, os.path.dirname(here)],
        env=os.environ | {"NPROC": "8", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "RACE" not in done.stdout + done.stderr


# What is shipped: the choices of tuning.py, at the shapes they are for.
TABLE = Config(decoder="table", x_stages=5, weight_stages=2)
WIDE = dataclasses.replace(TABLE, block_m=256, x_stages=3)
BACK = dataclasses.replace(TABLE, weight_stages=4)
COMPILED = {
    "forward 128": (False, 128, 0, TABLE),
    "forward 256 with low rank": (False, 4096, 64, WIDE),
    "forward 128 permute": (
        False,
        1024,
        0,
        dataclasses.replace(TABLE, decoder="permute", x_stages=6),
    ),
    "forward 128 exact": (
        False,
        512,
        0,
        dataclasses.replace(TABLE, decoder="table_exact", x_stages=4),
    ),
    "forward 16 split": (
        False,
        16,
        0,
        dataclasses.replace(TABLE, block_m=16, x_depth=256, x_stages=4, split_k=4),
    ),
    "forward 32 four warpgroups": (
        False,
        32,
        64,
        dataclasses.replace(TABLE, block_m=32, x_depth=256, x_stages=3, warpgroups=4),
    ),
    "backward 128": (True, 512, 0, BACK),
    "backward 128 with low rank": (True, 512, 64, BACK),
    "backward 128 split": (True, 128, 0, dataclasses.replace(BACK, split_k=4)),
    "backward 256": (
        True,
        4096,
        64,
        dataclasses.replace(
            BACK, block_m=256, x_stages=4, weight_stages=2, planes=1, out_stages=1
        ),
    ),
    "backward permute": (
        True,
        1024,
        0,
        dataclasses.replace(BACK, decoder="permute", x_stages=6),
    ),
}
# Instructions a weight in the main loop, all told; the tensor core's share at 128 tokens
# is 8 issue slots a weight.
BUDGET = {"table": 3.7, "permute": 6.1, "table_exact": 4.2}
ONE_PLANE = 2.0  # more, when a warpgroup decodes one plane of a word


@pytest.mark.aot
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_for_an_h200(name: str):
    if reason := aot.available():
        pytest.skip(f"NOT COMPILED FOR A GPU: {reason}")
    backward, m, rank, config = COMPILED[name]
    shape = SHAPES["llama3_8b_gate_up"]
    kernel = compile_case(shape.n, shape.k, m, rank, config, backward)
    assert kernel.spills == 0
    assert kernel.warnings == []  # such as serialized products
    assert kernel.overwritten_operands() == []
    loop = kernel.loop("HGMMA")
    products = sum(i.startswith("HGMMA") for i in loop)
    assert products > 0
    weights = 8 * products  # a thread gives 8 weights to each m64k16 product
    budget = BUDGET[config.decoder] + ONE_PLANE * (config.planes == 1)
    assert len(loop) / weights < budget


def compile_case(
    n: int, k: int, m: int, rank: int, config: Config, backward: bool
) -> aot.Kernel:
    """Compiles a product for the H200; returns its kernel."""

    def product(x, codes, scales, *addend):
        return (hopper.backward if backward else hopper.forward)(
            x,
            codes,
            scales,
            addend or None,
            config=config,
            codebook="nf4",
            num_sms=132,
        )

    scale_dtype = jnp.float32 if config.exact else jnp.bfloat16
    specs = [
        jax.ShapeDtypeStruct((m, n if backward else k), jnp.bfloat16),
        jax.ShapeDtypeStruct((n, k // 4), jnp.uint16),
        jax.ShapeDtypeStruct((k // 64, n), scale_dtype),
    ]
    if rank:
        specs += [
            jax.ShapeDtypeStruct((m, rank), jnp.bfloat16),
            jax.ShapeDtypeStruct((k if backward else n, rank), jnp.bfloat16),
        ]
    (kernel,) = aot.mosaic_kernels("h200", product, *specs)
    return kernel
