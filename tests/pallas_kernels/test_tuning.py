"""What runs where: tables, the model behind them, named refusals; LoRA in the pass."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.test_util import check_grads

from pallas_kernels import reference, tuning
from pallas_kernels.device import Device
from pallas_kernels.packed_matmul import choose, decode, hopper, nf4_lora_matmul
from pallas_kernels.packed_matmul.mosaic import MOSAIC_JAX
from pallas_kernels.tuning import Problem

H200 = Device("gpu", "NVIDIA H200", (9, 0), 132)
A100 = Device("gpu", "NVIDIA A100-SXM4-80GB", (8, 0), 108)
CPU = Device("cpu")
BF16 = jnp.dtype(jnp.bfloat16)

needs_mosaic = pytest.mark.skipif(
    jax.__version_info__ < MOSAIC_JAX, reason="needs jax >= 0.11.2"
)


def shape_of(n: int, k: int, **fields):
    """A weight of shapes alone."""
    return jax.eval_shape(lambda: oracle.quantized((n, k), **fields))


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


@needs_mosaic
def test_the_table_is_used_and_says_so(llama):
    choice = choose("forward", 300, llama, BF16, device=H200)
    entry = json.loads(table_file().read_text())["entries"][
        "forward m<=512 n=4096 k=4096 bfloat16"
    ]
    assert dict(choice.config) == entry["config"]
    assert choice.why == (
        "measured on NVIDIA H200: forward m<=512 n=4096 k=4096 bfloat16"
    )


@needs_mosaic
def test_an_entry_taken_over_from_other_tokens_does_not_say_measured(llama):
    wide = dataclasses.replace(llama, shape=(14336, 4096))
    for m, said in ((1, "measured on"), (2, "taken over from m=1 on")):
        why = choose("forward", m, wide, BF16, device=H200).why
        assert why.startswith(f"{said} NVIDIA H200: forward m<={m} "), why


def test_every_entry_of_the_table_was_recorded_so():
    results = table_file().parents[2] / "scripts" / "results"
    for key, entry in json.loads(table_file().read_text())["entries"].items():
        direction, _, n, k, _ = key.split()
        lines = (results / entry["source"]).read_text().splitlines()[1:]
        assert any(
            row.get("us") == entry["us"]
            and row["config"] == entry["config"]
            and (row["m"], f"n={row['n']}", f"k={row['k']}") == (entry["m"], n, k)
            and row.get("direction", "forward") == direction
            for row in map(json.loads, lines)
        ), key


def table_file():
    import pathlib

    return pathlib.Path(tuning.__file__).parent / "tuned" / "nvidia_h200.json"


@needs_mosaic
def test_every_entry_of_the_table_can_run():
    for key, entry in json.loads(table_file().read_text())["entries"].items():
        direction, m, n, k, dtype = key.split()
        problem = Problem(direction, int(m[3:]), int(n[2:]), int(k[2:]), dtype)
        assert problem.key == key
        module = {"hopper": hopper, "decode": decode}[entry["implementation"]]
        config = module.config.Config(**entry["config"])
        steps = problem.k // 256 if direction == "forward" else problem.n // 64
        if entry["implementation"] == "hopper":
            assert steps % config.split_k == 0
            # Low rank takes as many word tiles at once as a tile has planes.
            if direction == "backward":
                assert config.weight_stages >= config.warpgroups * config.planes


@needs_mosaic
def test_a_users_folder_comes_first(llama, tmp_path, monkeypatch):
    entry = {"implementation": "two_pass", "config": {}, "us": 1.0}
    path = tmp_path / tuning.table_name("NVIDIA H200")
    path.write_text(
        json.dumps({"entries": {"forward m<=512 n=4096 k=4096 bfloat16": entry}})
    )
    monkeypatch.setenv("QLORA_JAX_TUNED", str(tmp_path))
    choice = choose("forward", 512, llama, BF16, device=H200)
    assert choice.implementation == "two_pass"
    monkeypatch.delenv("QLORA_JAX_TUNED")
    assert choose("forward", 512, llama, BF16, device=H200).implementation == "hopper"


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


# --- nf4_lora_matmul ----------------------------------------------------------------------

SCALE = 2.0


def factors(w, rank: int, dtype: str = "float32"):
    rng = np.random.default_rng(3)
    a = jnp.asarray(rng.normal(size=(w.shape[1], rank)) * 0.1, dtype)
    b = jnp.asarray(rng.normal(size=(rank, w.shape[0])) * 0.1, dtype)
    x = jnp.asarray(rng.normal(size=(5, w.shape[1])), "float32")
    return x, a, b


def plainly(w, x, a, b):
    dense = reference.dequantize(w, x.dtype)
    return x @ dense.T + SCALE * (x @ a) @ b


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, "two_pass", "xla"])
@pytest.mark.parametrize("shape", [(24, 512), (24, 192), (21, 72)])
def test_the_adapter_and_its_gradients_are_those_of_the_dense_formula(shape, name):
    w = oracle.quantized(shape)
    x, a, b = factors(w, 4)

    def fused(x, a, b):
        return nf4_lora_matmul(x, w, a, b, SCALE, name)

    y, pull = jax.vjp(jax.jit(fused), x, a, b)
    want, pull_plain = jax.vjp(functools.partial(plainly, w), x, a, b)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
    dy = jnp.asarray(np.random.default_rng(4).normal(size=y.shape), "float32")
    for got, expected in zip(pull(dy), pull_plain(dy), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_the_gradients_are_those_of_finite_differences():
    w = oracle.quantized((8, 256))
    x, a, b = factors(w, 2)

    def product(*args):  # which check_grads calls with numpy arrays too
        x, a, b = map(jnp.asarray, args)
        return nf4_lora_matmul(x, w, a, b, SCALE)

    check_grads(
        product,
        (x, a, b),
        order=1,
        modes=("rev",),
        eps=1e-2,
        atol=2e-2,
        rtol=2e-2,
    )


def test_factors_keep_their_dtype_beside_a_short_compute_dtype():
    w = oracle.quantized((24, 512))
    x, a, b = factors(w, 4)
    x = x.astype(BF16)
    y, pull = jax.vjp(lambda x, a, b: nf4_lora_matmul(x, w, a, b, SCALE), x, a, b)
    dx, da, db = pull(y)
    assert (y.dtype, dx.dtype) == (BF16, BF16)
    assert (da.dtype, db.dtype) == ("float32", "float32")


def test_factors_that_do_not_fit_are_refused():
    w = oracle.quantized((24, 192))
    x, a, b = factors(w, 4)
    with pytest.raises(ValueError, match=r"takes \(192, rank\) and \(rank, 24\)"):
        nf4_lora_matmul(x, w, a, b[:, :20], SCALE)
