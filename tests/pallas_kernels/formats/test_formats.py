"""What every format promises, each held to it by the same tests."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from format_cases import CASES, FLOAT8, Case

from pallas_kernels import formats
from pallas_kernels.formats import FORMATS, FormatError, PackedWeight
from pallas_kernels.matmul import product_of

NAME = "model.layers.0.mlp.up_proj.weight"
ROUNDING = {"float32": 2**-21, "bfloat16": 2**-7}
"""The relative error allowed in a decoded value: that of float32 arithmetic with two roundings,
and of one rounding to the dtype."""


@pytest.fixture(params=CASES)
def case(request, monkeypatch) -> Case:
    for name, form in FLOAT8.items():
        monkeypatch.setitem(FORMATS, name, form)
    return CASES[request.param]


def same(a: PackedWeight, b: PackedWeight) -> bool:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in leaves)


def stacked(weights: list[PackedWeight], lead: tuple[int, ...]) -> PackedWeight:
    join = lambda *leaves: jnp.stack(leaves).reshape(*lead, *leaves[0].shape)  # noqa: E731
    return jax.tree.map(join, *weights)


def test_every_format_has_a_case():
    assert {case.form for case in CASES.values()} == {*FORMATS, *FLOAT8}


def test_a_weight_comes_back_as_near_as_the_format_allows(case):
    w = case.dense()
    q = case.packed()
    assert (q.shape, q.stack, q.dtype) == (case.shape, (), "float32")
    back = q.decode()
    assert back.shape == w.shape and back.dtype == jnp.float32
    assert np.linalg.norm(back - w) < case.error * np.linalg.norm(w)
    assert np.abs(back).max() <= q.largest() * (1 + 1e-6)


def test_arrays_that_are_cut_with_the_rows_have_one_axis_as_long(case):
    q = case.packed()
    both = stacked([q, q], (2,))
    named = q.axes("rows")
    assert both.axes("rows") == named  # without the stack's
    arrays = {name: x for name in q.ARRAYS if (x := getattr(q, name)) is not None}
    assert list(named) == list(arrays)  # in the order of the pytree's leaves
    for name, axes in named.items():
        assert len(axes) == arrays[name].ndim
        assert axes.count("rows") <= 1
        if "rows" in axes:
            assert arrays[name].shape[axes.index("rows")] == q.shape[0]


def test_decoding_means_what_numpy_says(case):
    q, exact = case.packed(), case.decoded(case.packed())
    wide, short = q.decode("float32"), q.decode("bfloat16")
    if exact.dtype == np.float32:  # an oracle of its bits
        np.testing.assert_array_equal(wide, exact)
    np.testing.assert_allclose(wide, exact, rtol=ROUNDING["float32"])
    # Rounded once: as float32 is.
    np.testing.assert_array_equal(short, np.asarray(wide).astype(short.dtype))


def test_it_stands_for_the_dtype_it_was_quantized_from(case):
    q = case.packed(dtype="bfloat16")
    assert q.dtype == "bfloat16" and q.decode().dtype == jnp.bfloat16
    again = q.requantize(case.dense(seed=1))
    assert again.dtype == "bfloat16"
    assert jax.tree.structure(again) == jax.tree.structure(q)
    assert same(dataclasses.replace(again, dtype="float32"), case.packed(seed=1))


def test_a_stack_is_indexed_and_decoded_weight_by_weight(case):
    one = [case.packed(seed) for seed in range(4)]
    stack = stacked(one, (2, 2))
    assert (stack.shape, stack.stack) == (case.shape, (2, 2))
    assert same(stack[1, 0], one[2]) and same(stack[1][1], one[3])
    assert stack[0].stack == (2,) and same(one[0][()], one[0])
    assert [w.stack for w in stack] == [(2,), (2,)]
    decoded = np.stack([w.decode() for w in one]).reshape(2, 2, *case.shape)
    np.testing.assert_array_equal(stack.decode(), decoded)
    assert stack.largest() == max(w.largest() for w in one)
    assert stack.nbytes == 4 * one[0].nbytes and stack.bits == one[0].bits
    for wrong in (2, (0, 2), (0, 0, 0)):
        with pytest.raises(IndexError, match=r"into a stack of \(2, 2\)"):
            stack[wrong]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_decoded_as_the_whole_is(case, dtype):
    q, rows = case.packed(), jnp.asarray([1, 0, case.shape[0] - 1, 1], jnp.int32)
    said = jax.jit(type(q).decode_rows, static_argnums=2)(q, rows, dtype)
    assert said.dtype == dtype
    np.testing.assert_array_equal(said, q.decode(dtype)[rows])


def test_what_is_stored_is_the_same_weight(case):
    q = dataclasses.replace(case.packed(), dtype="bfloat16")
    entries = q.storage(NAME)
    assert all(isinstance(array, np.ndarray) for array in entries.values())
    assert same(type(q).from_storage(entries, NAME, "bfloat16"), q)
    # A file that has other weights too.
    keys = {*entries, "model.norm.weight"}
    assert formats.stored_format(keys, NAME) is type(q)
    assert formats.stored_format(keys, "model.norm.weight") is None
    assert {formats.weight_of(key) for key in entries} == {NAME}
    moved = {formats.renamed(key, "a.weight"): x for key, x in entries.items()}
    assert moved.keys() == q.storage("a.weight").keys()


@pytest.mark.parametrize(
    "case", [name for name in CASES if CASES[name].form in FORMATS], indirect=True
)
def test_a_missing_entry_is_named(case):
    q = case.packed()
    for gone in {NAME, q.part(NAME, q.MARK)} & q.storage(NAME).keys():
        entries = q.storage(NAME)
        del entries[gone]
        with pytest.raises(FormatError, match=f"{gone} is missing"):
            type(q).from_storage(entries, NAME, "float32")


def test_its_shapes_are_known_without_it(case):
    q = dataclasses.replace(case.packed(), dtype="bfloat16")
    spec = lambda leaf: jax.ShapeDtypeStruct((4, *leaf.shape), leaf.dtype)  # noqa: E731
    planned = type(q).abstract(q.shape, (4,), dtype="bfloat16", **q.settings)
    assert planned == jax.tree.map(spec, q) and planned.stack == (4,)


def test_transformations_go_through_it(case):
    q = case.packed()
    leaves, treedef = jax.tree.flatten_with_path(q)
    names = [jax.tree_util.keystr(path).removeprefix(".") for path, _ in leaves]
    assert names == [name for name in q.ARRAYS if getattr(q, name) is not None]
    assert len(jax.tree.leaves(jax.tree.map(lambda leaf: None, q))) == 0
    assert jax.tree.map(lambda leaf: leaf.ndim > 0, q).codes is True
    assert jax.eval_shape(lambda q: q, q).stack == ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        q.codes = None


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(case, wrong):
    w = case.dense().at[1, 2].set(wrong)
    with pytest.raises(FormatError, match=r"of shape \(\d+, \d+\) has NaN or Inf"):
        case.type.quantize(w, **case.settings)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_its_product_is_that_of_its_values(case, dtype):
    q, (n, k) = case.packed(), case.shape
    rng = np.random.default_rng(1)
    x, dy = (jnp.asarray(rng.normal(size=(2, 3, size)), dtype) for size in (k, n))
    product = product_of(q)

    @jax.jit
    def both(x, dy):
        y, pull = jax.vjp(lambda x: product.plain(x, q, None), x)
        return y, pull(dy)[0]

    y, dx = both(x, dy)
    assert y.dtype == dx.dtype == dtype
    dense = case.decoded(q).astype(np.float64)
    for said, a, b in ((y, x, dense.T), (dx, dy, dense)):
        exact = np.asarray(a, np.float64) @ b
        wrong = np.abs(np.asarray(said, np.float64) - exact).max()
        # Each weight is rounded to the dtype, and the result once more.
        assert wrong < 2 * ROUNDING[dtype] * np.abs(exact).max()


def test_backward_keeps_it_packed(case):
    q, x = case.packed(), jnp.ones((2, case.shape[1]))
    kept = jax.eval_shape(
        lambda x, q: jax.vjp(lambda x: product_of(q).plain(x, q, None), x)[1], x, q
    )
    packed = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(q)]
    assert {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(kept)} == {*packed}
