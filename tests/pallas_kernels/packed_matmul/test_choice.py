"""What runs where: the heuristics where no table speaks, and named refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import oracle
import pytest

from pallas_kernels.device import Device
from pallas_kernels.packed_matmul import choose, decode, hopper
from pallas_kernels.packed_matmul.mosaic import MOSAIC_JAX
from pallas_kernels.tuning import Problem

H200 = Device("gpu", "NVIDIA H200", (9, 0), 132)
A100 = Device("gpu", "NVIDIA A100-SXM4-80GB", (8, 0), 108)
CPU = Device("cpu")
BF16 = jnp.dtype(jnp.bfloat16)

needs_mosaic = pytest.mark.skipif(
    jax.__version_info__ < MOSAIC_JAX, reason="needs jax >= 0.11.2"
)


@pytest.fixture(scope="module")
def llama():
    return dataclasses.replace(oracle.quantized((64, 256)), shape=(4096, 4096))


@needs_mosaic
@pytest.mark.parametrize(
    ("direction", "m", "expected"),
    [
        ("forward", 1, "decode"),
        ("forward", 8, "decode"),
        ("forward", 16, "decode"),
        ("forward", 32, "hopper"),
        ("forward", 4096, "hopper"),
        ("backward", 1, "hopper"),
        ("backward", 2048, "hopper"),
    ],
)
def test_an_h200_takes_the_fused_kernels(llama, direction, m, expected):
    assert choose(direction, m, llama, BF16, device=H200).implementation == expected


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("m", [1, 100, 2048])
@pytest.mark.parametrize(("n", "k"), [(5120, 13824), (640, 2560), (128, 256)])
@pytest.mark.parametrize("exact", [False, True])
def test_a_miss_is_answered_by_the_model(direction, m, n, k, exact):
    problem = Problem(direction, m, n, k, "bfloat16")
    for fields in hopper.config.fitting(problem, exact):
        steps = k // 256 if direction == "forward" else n // 64
        assert steps % fields["split_k"] == 0
        assert hopper.config.cost(problem, 132, fields) > 0
    best = hopper.config.configure(problem, H200, exact)
    assert best["decoder"] == ("table_exact" if exact else "table")
    # A tile of far more tokens than there are is waste.
    assert best["block_m"] < 2 * max(m, 64)


@pytest.mark.parametrize("m", [1, 8, 9, 16, 17, 32])
@pytest.mark.parametrize(("n", "k"), [(14336, 4096), (28672, 8192), (1024, 4096)])
def test_decode_by_name_fits_shared_memory(m, n, k):
    fields = decode.config.configure(Problem("forward", m, n, k, "bfloat16"), H200)
    team, batch = fields.get("team", 4), fields["batch"]
    table, sums = 256 * 64 * 4, batch * team * -(-m // 8) * 64 * 8 * 4
    assert batch >= 1 and table + sums + 1024 <= 227 << 10
    if m <= 8:  # as it was measured
        assert fields == {"hold_x": True, "batch": min(14, -(-n // 16 // 132))}


def test_many_tokens_get_large_tiles_and_few_tiles_are_split():
    configure = hopper.config.configure
    wide = configure(Problem("forward", 8192, 14336, 4096, "bfloat16"), H200)
    assert (wide["block_m"], wide["split_k"]) == (256, 1)
    few = configure(Problem("forward", 16, 1024, 8192, "bfloat16"), H200)
    assert few["split_k"] > 1


REFUSALS = [
    ("hopper", CPU, BF16, {}, 4, "needs an NVIDIA GPU, this is cpu"),
    ("hopper", A100, BF16, {}, 4, r"needs an sm_90 GPU .* A100.*sm_80"),
    (
        "hopper",
        H200,
        jnp.dtype("float32"),
        {},
        4,
        "multiplies in 16 bits, x is float32",
    ),
    (
        "hopper",
        H200,
        BF16,
        {"k": 192},
        4,
        "planar256.*k=192, block_size=64 is planar64",
    ),
    ("hopper", H200, BF16, {"n": 96}, 4, "multiples of 8 from 128 on, this is 96"),
    ("hopper", H200, BF16, {"n": 132}, 4, "multiples of 8 from 128 on, this is 132"),
    ("decode", H200, BF16, {}, 33, "takes up to 32 tokens, these are 33"),
    ("decode", A100, BF16, {}, 4, "needs an sm_90 GPU"),
    ("ampere", H200, BF16, {}, 4, "needs an sm_80, 86 or 89 GPU"),
]


@needs_mosaic
@pytest.mark.parametrize(("name", "device", "dtype", "shape", "m", "reason"), REFUSALS)
def test_a_named_kernel_that_cannot_run_says_why(name, device, dtype, shape, m, reason):
    w = oracle.quantized((shape.get("n", 128), shape.get("k", 256)))
    with pytest.raises(ValueError, match=f"'{name}' cannot run: .*{reason}"):
        choose("forward", m, w, dtype, device=device, name=name)


@needs_mosaic
def test_kernels_that_no_card_has_proved_run_by_name_alone(llama):
    assert choose("forward", 64, llama, BF16, device=A100).implementation == "two_pass"
    named = choose("forward", 64, llama, BF16, device=A100, name="ampere")
    assert dict(named.config)["block_m"] == 64


@needs_mosaic
def test_exact_weights_pass_over_the_decode_kernel(llama):
    assert choose("forward", 1, llama, BF16, device=H200, exact=True).config
    with pytest.raises(ValueError, match="exact weights were asked for"):
        choose("forward", 1, llama, BF16, device=H200, name="decode", exact=True)


@pytest.mark.skipif(jax.__version_info__ >= MOSAIC_JAX, reason="for older jax")
def test_older_jax_is_named(llama):
    with pytest.raises(ValueError, match=r"needs jax >= 0\.11\.2, this is 0\."):
        choose("forward", 64, llama, BF16, device=H200, name="hopper")
    assert choose("forward", 64, llama, BF16, device=H200).implementation == "two_pass"


def test_where_nothing_is_fused_xla_runs(llama):
    assert choose("forward", 64, llama, BF16, device=CPU).implementation == "xla"
    assert choose("backward", 64, llama, BF16, device=A100).implementation == "two_pass"
