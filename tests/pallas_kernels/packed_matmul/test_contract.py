"""One contract for every implementation of nf4_matmul, in every layout and dtype.

The oracle is numpy float64 on the weight decoded as the implementation says. Where there is
no GPU the fused kernels run in the interpreter, chosen and padded as for a card, with race
detection and what is not written as NaN.
"""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from pallas_kernels import device, nf4_matmul
from pallas_kernels.formats import QuantizedTensor
from pallas_kernels.packed_matmul import IMPLEMENTATIONS, choice, choose, two_pass, xla
from pallas_kernels.packed_matmul.mosaic import MOSAIC_JAX
from pallas_kernels.shapes import SHAPES as MODEL_SHAPES

EVERYWHERE = ("two_pass", "xla")
FUSED = ("hopper", "decode", "ampere")

M = 5
SHAPES = {"planar256": (24, 512), "planar64": (24, 192), "flat": (21, 72)}

# Sums are float32: their error is within this part of the sum of magnitudes.
SUM_ERROR = 2e-6
# One rounding of the result to the compute dtype.
ROUNDING = {"float32": 2e-7, "bfloat16": 2**-8, "float16": 2**-11}
# Three roundings of a weight where it is not decoded exactly: codebook, absmax, product.
FAST_WEIGHT = {"bfloat16": 3 * 2**-8, "float16": 3 * 2**-11}


def activations(rows: int, width: int, dtype: str = "float32") -> jax.Array:
    x = np.random.default_rng(1).normal(size=(rows, width))
    return jnp.asarray(x, dtype)


def forward_and_dx(name, x, w, dy, *, exact):
    y, pull = jax.vjp(lambda x: nf4_matmul(x, w, name, exact=exact), x)
    return y, pull(dy)[0]


def check(actual, x, w) -> None:
    """Compares with x @ w in float64, w being (k, n)."""
    x, w = (np.asarray(a, np.float64) for a in (x, w))
    expected, magnitude = x @ w, np.abs(x) @ np.abs(w)
    bound = SUM_ERROR * magnitude + ROUNDING[actual.dtype.name] * np.abs(expected)
    error = np.abs(np.asarray(actual, np.float64) - expected)
    assert (error <= bound).all(), f"off by {(error / bound).max():.1f} times the bound"


def chosen(direction: str, rows: int, w: QuantizedTensor, dtype, name, exact) -> str:
    """The implementation that runs a direction when `name` is asked for."""
    if direction == "backward" and IMPLEMENTATIONS[name].backward is None:
        name = None
    return choose(direction, rows, w, dtype, name=name, exact=exact).implementation


def weight(name: str, w: QuantizedTensor, dtype, exact: bool) -> np.ndarray:
    """What an implementation multiplies with."""
    if exact or name in EVERYWHERE:
        return oracle.decoded(w).astype(dtype)
    if name == "decode":
        return oracle.decoded(w, dtype)
    return oracle.decoded(w, dtype, dtype)


def check_contract(
    name: str,
    w: QuantizedTensor,
    dtype: str = "float32",
    rows: int = M,
    *,
    exact: bool = False,
    rank: int = 0,
) -> None:
    """Checks both directions; with a rank, a low-rank product in the same pass.

    That pass rounds the result once, which holds for the fused kernels alone.
    """
    n, k = w.shape
    x, dy = activations(rows, k, dtype), activations(rows, n, dtype)
    forward, backward = (
        weight(chosen(d, rows, w, x.dtype, name, exact), w, x.dtype, exact)
        for d in ("forward", "backward")
    )
    if not rank:
        run = functools.partial(forward_and_dx, name, exact=exact)
        y, dx = jax.jit(run)(x, w, dy)
        assert (y.shape, dx.shape) == ((rows, n), (rows, k))
        assert y.dtype == dx.dtype == x.dtype
        check(y, x, forward.T)
        check(dx, dy, backward)
        return
    u = activations(rows, rank, dtype)
    for direction, a, dense in (("forward", x, forward.T), ("backward", dy, backward)):
        v = activations(dense.shape[1], rank, dtype)
        run = functools.partial(choice.run, direction, name=name, exact=exact)
        y = jax.jit(lambda *args, run=run: run(*args))(a, w, (u, v))
        a, dense = (np.asarray(array, np.float64) for array in (a, dense))
        low_rank = np.asarray(u, np.float64), np.asarray(v, np.float64).T
        check(
            y,
            np.concatenate([a, low_rank[0]], 1),
            np.concatenate([dense, low_rank[1]]),
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_product_and_gradient_are_those_of_the_decoded_weight(name, shape, dtype):
    check_contract(name, oracle.quantized(shape), dtype)


@pytest.mark.parametrize(
    ("shape", "codebook"), [((24, 512), "fp4"), ((24, 192), "int4"), ((21, 72), "fp4")]
)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_other_codebooks_and_a_plain_absmax_work(name, shape, codebook):
    w = oracle.quantized(shape, codebook=codebook, double_quant=False)
    check_contract(name, w)


@pytest.mark.parametrize(
    ("shape", "block_size"),
    [((8, 1024), 512), ((8, 384), 128), ((8, 128), 32), ((8, 96), 4096)],
)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_one_row_and_other_block_sizes_work(name, shape, block_size):
    w = oracle.quantized(shape, block_size=block_size)
    check_contract(name, w, "bfloat16", rows=1)


@dataclasses.dataclass(frozen=True)
class Fused:
    """A product of a fused kernel in the interpreter; `fields` of its Config are changed."""

    name: str
    m: int
    n: int
    k: int
    dtype: str
    exact: bool = False
    rank: int = 0
    block_size: int = 64
    codebook: str = "nf4"
    double_quant: bool = True
    fields: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return " ".join(str(v) for v in dataclasses.astuple(self) if v is not False)

    def check(
        self, monkeypatch: pytest.MonkeyPatch, *, detect_races: bool = True
    ) -> None:
        import interpreted

        fields = dict(self.fields)
        if self.name == "decode":
            # More warpgroups need more threads than XLA's pool has on two cores.
            fields["team"] = 1
        interpreted.install(monkeypatch, self.name, detect_races, **fields)
        w = oracle.quantized(
            (self.n, self.k),
            block_size=self.block_size,
            codebook=self.codebook,
            double_quant=self.double_quant,
        )
        check_contract(
            self.name, w, self.dtype, self.m, exact=self.exact, rank=self.rank
        )


def scaled_down(name: str) -> list[Fused]:
    """A model's shapes by 1/32, rounded up to the kernels' units; tokens by turns."""
    shapes = {
        (-(-s.n // 32 // 128) * 128, -(-s.k // 32 // 256) * 256)
        for s in MODEL_SHAPES.values()
    }
    tokens = (1, 8, 20) if name == "decode" else (1, 33, 100)
    return [
        Fused(
            name,
            tokens[i % 3],
            n,
            k,
            ("bfloat16", "float16")[i % 2],
            exact=name == "hopper" and i % 4 == 3,
        )
        for i, (n, k) in enumerate(sorted(shapes))
    ]


def odd(name: str, seed: int) -> Fused:
    """A product that nothing is even in."""
    rng = np.random.default_rng(seed)
    split = name != "decode" and bool(seed % 2)
    unit, block_size = (16 if name == "decode" else 128), int(2 ** rng.integers(6, 9))
    return Fused(
        name,
        int(rng.integers(1, 33 if name == "decode" else 130)),
        unit * int(rng.integers(1, 20 if name == "decode" else 4)),
        # Backward cuts n in pieces of 64, which are even in number; forward k.
        256 * (2 if split else int(rng.integers(1, 5))),
        str(rng.choice(["bfloat16", "float16"])),
        exact=name == "hopper" and bool(rng.integers(2)),
        rank=0 if name == "decode" else int(rng.integers(1, 100)),
        block_size=block_size,
        codebook=str(rng.choice(["nf4", "fp4", "int4"])),
        double_quant=bool(rng.integers(2)),
        fields=(("split_k", 2),) if split else (),
    )


INTERPRETED = [
    pytest.param(case, id=str(case), marks=[pytest.mark.slow] if i % 4 else [])
    for name in FUSED
    for i, case in enumerate(
        [*(odd(name, seed) for seed in range(5)), *scaled_down(name)]
    )
]
RAGGED = [
    Fused("hopper", 20, 200, 512, "bfloat16", rank=7),
    Fused("hopper", 70, 136, 256, "float16", block_size=128),
    Fused("hopper", 9, 328, 512, "bfloat16", exact=True, fields=(("split_k", 2),)),
]


@pytest.mark.skipif(jax.__version_info__ < MOSAIC_JAX, reason="needs jax >= 0.11.2")
@pytest.mark.parametrize("case", INTERPRETED)
def test_fused_kernels_keep_the_contract(case: Fused, monkeypatch, capfd):
    case.check(monkeypatch)
    said = capfd.readouterr()
    assert "RACE" not in said.out + said.err


@pytest.mark.skipif(jax.__version_info__ < MOSAIC_JAX, reason="needs jax >= 0.11.2")
@pytest.mark.parametrize("case", RAGGED, ids=str)
def test_rows_that_no_tile_divides_are_computed_twice(case: Fused, monkeypatch):
    # Two tiles write the same values to the same rows of the result, which is a race to
    # the detector; else the program is that of a weight that tiles divide.
    case.check(monkeypatch, detect_races=False)


@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("dtype", FAST_WEIGHT)
def test_weights_of_the_fast_decoders_are_off_by_three_roundings(codebook, dtype):
    w = oracle.quantized((64, 1024), codebook=codebook, double_quant=False)
    exact, dtype = oracle.decoded(w).astype(np.float64), jnp.dtype(dtype)
    for fast in (oracle.decoded(w, dtype), oracle.decoded(w, dtype, dtype)):
        error = np.abs(fast.astype(np.float64) - exact)
        assert (error <= FAST_WEIGHT[dtype.name] * np.abs(exact)).all()
        assert error.max() > 0


@pytest.fixture
def tiles(monkeypatch):
    """Makes the 'xla' implementation tile small weights; gives the sizes it used."""
    sizes = []
    whole = xla._map_tiles

    def seen(tile, count, unit_bytes):
        def recorded(start, size):
            sizes.append(size)
            return tile(start, size)

        return whole(recorded, count, unit_bytes)

    monkeypatch.setattr(xla, "_map_tiles", seen)
    monkeypatch.setitem(device.XLA_WHOLE_BYTES, "cpu", 0)
    return sizes


@pytest.mark.parametrize(
    ("shape", "block_size", "dtype"),
    [
        ((24, 512), 64, "float32"),
        ((24, 512), 64, "bfloat16"),
        ((24, 1024), 512, "float32"),
        ((24, 192), 64, "float32"),
        ((24, 192), 64, "float16"),
        ((24, 384), 128, "float32"),
    ],
)
def test_one_tile_multiplied_plane_by_plane_makes_the_product(
    tiles, shape, block_size, dtype
):
    check_contract("xla", oracle.quantized(shape, block_size=block_size), dtype)
    assert tiles[0] == shape[0]


@pytest.mark.parametrize(
    ("shape", "block_size"), [((27, 768), 64), ((27, 2048), 512), ((27, 320), 64)]
)
def test_tiles_with_a_remainder_make_the_whole_product(
    tiles, monkeypatch, shape, block_size
):
    # 5 rows of w fill a forward tile. In backward a tile is one unit of columns.
    monkeypatch.setitem(device.XLA_TILE_BYTES, "cpu", 5 * shape[1] * 4)
    check_contract("xla", oracle.quantized(shape, block_size=block_size))
    assert {5, 2, 1} <= set(tiles)


def test_columns_are_tiled_with_a_remainder(tiles, monkeypatch):
    # 11 units of 256 columns: tiles of 3, 3, 3 and a rest of 2.
    monkeypatch.setitem(device.XLA_TILE_BYTES, "cpu", 3 * 256 * 4 * 4)
    check_contract("xla", oracle.quantized((4, 11 * 256)))
    assert {3, 2} <= set(tiles)


@pytest.mark.parametrize("shape", [(96, 256), (100, 192)], ids=["even", "with a rest"])
def test_two_pass_takes_a_large_weight_in_pieces(shape, monkeypatch):
    n, k = shape
    monkeypatch.setitem(device.TWO_PASS_WHOLE_BYTES, "cpu", 1024)
    monkeypatch.setitem(device.TWO_PASS_PIECE_BYTES, "cpu", 32 * k * 4)
    w = oracle.quantized(shape)
    check_contract("two_pass", w)
    check_contract("two_pass", w, "bfloat16")
    program = str(jax.make_jaxpr(two_pass.matmul)(activations(M, k), w))
    assert f"f32[{n},{k}]" not in program


def test_leading_axes_of_x_are_kept():
    w = oracle.quantized((21, 72))
    x = activations(6, 72)
    y = jax.jit(nf4_matmul)(x.reshape(2, 3, 72), w)
    assert y.shape == (2, 3, 21)
    check(y.reshape(6, 21), x, oracle.decoded(w).T)
    assert jax.eval_shape(nf4_matmul, x[0], w).shape == (21,)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_residuals_are_the_packed_weight_alone(shape):
    def residuals(x, w):
        return jax.vjp(lambda x: nf4_matmul(x, w), x)[1]

    w = oracle.quantized(shape)
    kept = jax.tree.leaves(jax.eval_shape(residuals, activations(M, shape[1]), w))
    assert kept
    floats = [leaf for leaf in kept if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert all(leaf.size < w.blocks for leaf in floats)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in kept) <= w.nbytes


def test_the_weight_gets_no_gradient():
    w = oracle.quantized(SHAPES["planar64"], double_quant=False)
    x = activations(M, w.shape[1])

    def loss(x, absmax):
        return nf4_matmul(x, dataclasses.replace(w, absmax=absmax)).sum()

    dx, d_absmax = jax.jit(jax.grad(loss, (0, 1)))(x, w.absmax)
    assert jnp.abs(dx).max() > 0
    np.testing.assert_array_equal(d_absmax, jnp.zeros_like(w.absmax))


@pytest.mark.parametrize("shape", [SHAPES["planar256"], SHAPES["flat"]])
def test_it_runs_under_vmap_and_scan_over_stacked_weights(shape):
    both = [oracle.quantized(shape, seed=seed) for seed in (0, 1)]
    dense = [oracle.decoded(w) for w in both]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *both)
    x = activations(M, shape[1])

    mapped = jax.jit(jax.vmap(nf4_matmul, (None, 0)))(x, stack)
    for y, w in zip(mapped, dense, strict=True):
        check(y, x, w.T)

    def scanned(x, stack):
        return jax.lax.scan(lambda c, w: (c, nf4_matmul(x, w)), 0, stack)[1].sum()

    dx = jax.jit(jax.grad(scanned))(x, stack)
    check(dx, np.ones((M, 2 * shape[0])), np.concatenate(dense))


def test_x_of_the_wrong_width_is_refused():
    with pytest.raises(ValueError, match=r"x has shape \(2, 64\).*k=192"):
        nf4_matmul(jnp.ones((2, 64)), oracle.quantized((24, 192)))


def test_x_of_an_unfit_dtype_is_refused():
    x = jnp.ones((2, 192), jnp.float8_e4m3fn)
    with pytest.raises(ValueError, match="x is float8_e4m3fn, expected bfloat16"):
        nf4_matmul(x, oracle.quantized((24, 192)))


def test_a_weight_that_is_no_matrix_is_refused():
    w = dataclasses.replace(oracle.quantized((24, 192)), shape=(2, 12, 192))
    with pytest.raises(ValueError, match=r"takes a matrix \(n, k\).*\(2, 12, 192\)"):
        nf4_matmul(jnp.ones((2, 192)), w)


def test_an_unknown_implementation_is_refused_with_those_known():
    with pytest.raises(ValueError, match="'fast' is not known here; known: .*xla"):
        nf4_matmul(jnp.ones((2, 192)), oracle.quantized((24, 192)), "fast")


@pytest.fixture
def refusing(monkeypatch):
    """Puts an implementation that cannot run here in front."""
    xla = IMPLEMENTATIONS["xla"]
    picky = dataclasses.replace(xla, refuses=lambda *args: "needs 17 GPUs")
    monkeypatch.setattr(choice, "IMPLEMENTATIONS", {"picky": picky, "xla": xla})


def test_a_named_implementation_that_cannot_run_raises_with_the_reason(refusing):
    with pytest.raises(ValueError, match="'picky' cannot run: needs 17 GPUs"):
        nf4_matmul(jnp.ones((2, 192)), oracle.quantized((24, 192)), "picky")


def test_the_free_choice_passes_over_it_and_says_so_once(refusing, caplog):
    choice._log_choice.cache_clear()
    w = oracle.quantized((24, 192))
    with caplog.at_level(logging.INFO, choice.logger.name):
        for _ in range(2):
            taken = choose("forward", M, w, jnp.dtype("float32"))
            assert taken.implementation == "xla"
    said = [r.message for r in caplog.records if r.name == choice.logger.name]
    assert len(said) == 1
    assert "'xla'" in said[0] and "picky: needs 17 GPUs" in said[0]
