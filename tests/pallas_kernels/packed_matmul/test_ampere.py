"""The Ampere kernels' products; test_compiled.py compiles them for cards not there.

Mosaic's interpreter knows neither mma.sync nor cp.async. The products run in it with
stand-ins for both, which proves tiling, planes, scales and the order of the buffers; that
each wait is long enough, compilation and stand-ins cannot show.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.nn.packing import quantize_tensor

if jax.__version_info__ < (0, 11, 2):
    pytest.skip("Mosaic GPU kernels need jax >= 0.11.2", allow_module_level=True)

import jax.experimental.pallas.mosaic_gpu as plgpu  # noqa: E402

from pallas_kernels.packed_matmul.ampere import backward, forward, pipeline  # noqa: E402
from pallas_kernels.packed_matmul.ampere.config import Config  # noqa: E402

EXACT_BFLOAT16 = 2.5e-3
EXACT_FLOAT32_PARTS = 1e-6
"""The error allowed is that of test_hopper.py: the rounding of the result, and of float32
sums."""

PRODUCTS = [  # direction, m, n, k, rank, fields of Config
    ("forward", 64, 256, 512, 0, {"rows": 128}),
    ("forward", 64, 128, 512, 64, {"rows": 64, "block_m": 32, "minor": "n"}),
    ("forward", 16, 128, 1024, 128, {"block_m": 16, "depth": 64, "split_k": 2}),
    ("backward", 64, 256, 512, 0, {"rows": 128, "weight_stages": 3}),
    ("backward", 64, 128, 512, 64, {"rows": 256, "weight_stages": 3}),
    ("backward", 64, 256, 256, 64, {"rows": 128, "weight_stages": 3, "split_k": 2}),
]


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_products_with_stand_ins(case, monkeypatch: pytest.MonkeyPatch):
    direction, m, n, k, rank, fields = case

    def copy(source, target):
        target[...] = source[...]

    def mma(sums, a, b):
        return sums + jnp.dot(a, b, preferred_element_type=jnp.float32)

    monkeypatch.setattr(pipeline, "copy", copy)
    monkeypatch.setattr(pipeline, "wait", lambda left=0: None)
    monkeypatch.setattr(plgpu, "mma", mma)
    rng = np.random.default_rng()
    w = quantize_tensor(jnp.asarray(rng.standard_normal((n, k)) * 0.02, jnp.float32))
    decoded = np.asarray(w.decode_one("bfloat16"), np.float64)
    right = decoded.T if direction == "forward" else decoded
    x = jnp.asarray(rng.standard_normal((m, right.shape[0])), jnp.bfloat16)
    want, addend = np.asarray(x, np.float64) @ right, None
    if rank:
        u = jnp.asarray(rng.standard_normal((m, rank)), jnp.bfloat16)
        v = jnp.asarray(rng.standard_normal((right.shape[1], rank)), jnp.bfloat16)
        addend = (u, v)
        want += np.asarray(u, np.float64) @ np.asarray(v, np.float64).T
    product = forward.forward if direction == "forward" else backward.backward
    got = product(
        x,
        w.codes,
        w.decode_absmax().reshape(n, -1).T,
        addend,
        config=Config(decoder="select", **fields),
        codebook="nf4",
        num_sms=2,
        interpret=plgpu.InterpretGPUParams(uninitialized_memory="nan"),
    )
    got = np.asarray(got, np.float64)
    tolerance = EXACT_BFLOAT16
    if "split_k" in fields:
        got, tolerance = got.sum(0).T, EXACT_FLOAT32_PARTS
    assert np.linalg.norm(got - want) < tolerance * np.linalg.norm(want)
