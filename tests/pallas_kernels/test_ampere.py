"""The Ampere kernels, compiled for cards that are not there.

mma.sync and cp.async do not run in Mosaic's interpreter, so compilation is all the proof
there is without a card.
"""

import os
import subprocess
import sys

import aot
import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import tuning
from pallas_kernels.shapes import SHAPES
from pallas_kernels.tuning import Problem

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("Mosaic GPU kernels need jax >= 0.11.2", allow_module_level=True)

if jax.__version_info__ >= (0, 12):
    pytest.skip("refused by name on jax 0.12 (matmul.py)", allow_module_level=True)

from pallas_kernels import ampere  # noqa: E402

CASES = [
    ("a100", "forward", 512, 0),
    ("a100", "backward", 512, 64),
    ("rtx4090", "forward", 64, 64),
    ("rtx3090", "backward", 64, 0),
]


@pytest.mark.aot
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_without_spills(case: tuple[str, str, int, int]):
    """In a process of its own: Mosaic keeps the first architecture it compiles for."""
    if reason := aot.available():
        pytest.skip(f"NOT COMPILED FOR A GPU: {reason}")
    here = os.path.dirname(__file__)
    code = "import sys; sys.path[:0] = sys.argv[1:3]\nimport test_ampere as t\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}t.check(*{case})", here, os.path.dirname(here)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def check(target: str, direction: str, m: int, rank: int) -> None:
    """Compiles one product and looks at what came out."""
    _, n, k = SHAPES["llama3_8b_gate_up"]
    width, other = (k, n) if direction == "forward" else (n, k)
    config = ampere.Config(
        **tuning.ampere_config(Problem(direction, m, n, k, "bfloat16"))
    )

    def product(x, codes, scales, *addend):
        return getattr(ampere, direction)(
            x,
            codes,
            scales,
            addend or None,
            config=config,
            codebook="nf4",
            num_sms=108,
        )

    specs = [
        jax.ShapeDtypeStruct((m, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((n, k // 4), jnp.uint16),
        jax.ShapeDtypeStruct((k // 64, n), jnp.bfloat16),
    ]
    if rank:
        specs += [
            jax.ShapeDtypeStruct((m, rank), jnp.bfloat16),
            jax.ShapeDtypeStruct((other, rank), jnp.bfloat16),
        ]
    (kernel,) = aot.mosaic_kernels(target, product, *specs)
    assert kernel.spills == 0
    assert kernel.registers <= 255
    assert kernel.count("HMMA") > 0  # mma.sync
    assert kernel.count("LDGSTS") > 0  # cp.async
