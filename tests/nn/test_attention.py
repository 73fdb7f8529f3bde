"""Attention by blocks of queries, against a softmax of all scores at once."""

import re

import aot
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from pallas_kernels.device import SCORE_BYTES, Device
from qlora_jax.errors import ConfigError
from qlora_jax.nn import attention as module
from qlora_jax.nn import blocked
from qlora_jax.nn.attention import attention, causal_attention, choose_attention

BATCH, SEQ, HEADS, KV_HEADS, HEAD_DIM = 2, 37, 4, 2, 8
VALUE_DIM = 6
"""A head's values have so many features where they have fewer than its queries, as in latent
attention."""


def inputs(seq: int = SEQ, dtype: str = "float32") -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    shapes = [(HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM), (KV_HEADS, VALUE_DIM)]
    return tuple(jnp.asarray(rng.normal(size=(BATCH, seq, *s)), dtype) for s in shapes)


def positions(padding: int = 0) -> jax.Array:
    """Positions of rows of which the second has padding on the left."""
    rows = [np.arange(SEQ), np.maximum(np.arange(SEQ) - padding, -1)]
    return jnp.asarray(np.stack(rows), jnp.int32)


@pytest.fixture(params=[None, 1], ids=["one block", "three blocks"])
def blocks(request, monkeypatch):
    """Queries in one block, or in blocks of 13 of which the last is partial."""
    if request.param:
        monkeypatch.setitem(SCORE_BYTES, "cpu", request.param)


@pytest.mark.parametrize(("window", "padding"), [(None, 0), (5, 0), (None, 6), (4, 3)])
def test_it_is_the_softmax_over_seen_keys(blocks, window, padding):
    q, k, v = inputs()
    at = positions(padding)
    y = jax.jit(lambda *args: attention(*args, window=window))(q, k, v, at, at)
    arrays = map(np.asarray, (q, k, v, at, at))
    with np.errstate(invalid="ignore"):  # rows of padding see no key
        expected = oracle.attended(*arrays, window)
    real = np.asarray(at) >= 0
    np.testing.assert_allclose(np.asarray(y)[real], expected[real], atol=2e-6)
    assert np.isfinite(y).all()


def plain(q, k, v, sinks=None):
    """Computes the same in jax, for autodiff."""
    k, v = (jnp.repeat(x, HEADS // KV_HEADS, axis=2) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / HEAD_DIM**0.5
    causal = jnp.tril(jnp.ones((SEQ, SEQ), bool))
    scores = jnp.where(causal, scores, -jnp.inf)
    if sinks is not None:  # as one more key, whose value is nothing
        own = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, own], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]]
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.mark.parametrize("sinks", [False, True])
def test_its_gradients_are_those_of_the_plain_form(blocks, sinks):
    arrays, at = inputs(), positions()
    if sinks:
        arrays = (*arrays, jnp.linspace(-2.0, 3.0, HEADS))
    shape = (BATCH, SEQ, HEADS, VALUE_DIM)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)

    @jax.jit
    def both(*arrays):
        def own(q, k, v, sinks=None):
            return attention(q, k, v, at, at, sinks=sinks)

        (y, ours), (z, theirs) = jax.vjp(own, *arrays), jax.vjp(plain, *arrays)
        return (y, *ours(dy)), (z, *theirs(dy))

    for ours, theirs in zip(*both(*arrays), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_short_dtypes_round_operands_and_keep_float32_sums():
    short = inputs(dtype="bfloat16")
    at = positions()
    y, pull = jax.vjp(lambda *a: attention(*a, at, at), *short)
    assert y.dtype == jnp.bfloat16
    assert all(d.dtype == jnp.bfloat16 for d in pull(y))
    exact = oracle.attended(
        *(np.asarray(x, np.float64) for x in short), *2 * [np.asarray(at)]
    )
    # Weights and result are rounded to 8 bits each, of values up to about 3.
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, atol=0.02)


def test_queries_may_be_fewer_than_keys():
    q, k, v = inputs()
    at = positions()
    whole = attention(q, k, v, at, at)
    last = attention(q[:, -1:], k, v, at[:, -1:], at)
    np.testing.assert_allclose(last, whole[:, -1:], atol=2e-6)


def test_nothing_of_all_scores_is_kept_or_made(monkeypatch):
    monkeypatch.setitem(SCORE_BYTES, "cpu", 1)
    seq = 256
    arrays = inputs(seq)
    at = jnp.broadcast_to(jnp.arange(seq, dtype=jnp.int32), (BATCH, seq))

    def gradients(*arrays):
        y, pull = jax.vjp(lambda *a: attention(*a, at, at), *arrays)
        return pull(y)

    text = str(jax.make_jaxpr(gradients)(*arrays))
    assert f"f32[{BATCH},{KV_HEADS},{2 * seq},{seq}]" not in text
    assert f"f32[{BATCH},{KV_HEADS},{2 * 16},{seq}]" in text

    kept = jax.eval_shape(
        lambda *a: jax.vjp(lambda *a: attention(*a, at, at), *a)[1], *arrays
    )
    floats = [x for x in jax.tree.leaves(kept) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert sum(x.size for x in floats) <= 2 * sum(x.size for x in arrays)


def documents(*lengths: int) -> jax.Array:
    """Returns how many tokens of its own document are before each token, of two rows."""
    rows = [
        np.concatenate([np.arange(n) for n in lengths[i:] + lengths[:i]])
        for i in (0, 1)
    ]
    return jnp.asarray(np.stack(rows), jnp.int32)


PACKED = documents(5, 20, 1, 11)
assert PACKED.shape == (BATCH, SEQ)


@pytest.fixture(params=[8, 16], ids=["5 blocks", "3 blocks"])
def cut(request, monkeypatch):
    """Blocks of whole sequences; the last of several is partial."""
    monkeypatch.setattr(blocked, "BLOCK", request.param)


WHOLE = {
    "causal": {},
    "window": {"window": 5},
    "documents": {"documents": PACKED},
    "documents and window": {"documents": PACKED, "window": 3},
    "softcap": {"softcap": 2.0, "documents": PACKED},
    "scale": {"scale": 0.1},
    "sinks": {
        "sinks": jnp.linspace(-2.0, 3.0, HEADS),
        "documents": PACKED,
        "window": 9,
    },
}


@pytest.mark.parametrize("case", WHOLE)
def test_whole_sequences_attend_as_their_positions_say(cut, case):
    options, at = dict(WHOLE[case]), positions()
    sinks, reach = options.pop("sinks", None), options.pop("documents", None)
    arrays = inputs() if sinks is None else (*inputs(), sinks)
    shape = (BATCH, SEQ, HEADS, VALUE_DIM)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)

    def whole(q, k, v, sinks=None):
        return causal_attention(q, k, v, sinks=sinks, documents=reach, **options)

    def placed(q, k, v, sinks=None):
        return attention(q, k, v, at, at, sinks=sinks, reach=reach, **options)

    @jax.jit
    def both(*arrays):
        (y, ours), (z, theirs) = jax.vjp(whole, *arrays), jax.vjp(placed, *arrays)
        return (y, *ours(dy)), (z, *theirs(dy))

    for ours, theirs in zip(*both(*arrays), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_on_a_cpu_blocks_that_nothing_sees_are_not_multiplied(monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK", 16)
    scores, met = blocked._scores, []

    def counted(q, k, i, j, reach, scoring):
        jax.debug.callback(lambda i, j: met.append((int(i), int(j))), i, j)
        return scores(q, k, i, j, reach, scoring)

    monkeypatch.setattr(blocked, "_scores", counted)
    q, k, v = inputs(64)
    own = jnp.tile(jnp.concatenate([jnp.arange(40), jnp.arange(24)]), (BATCH, 1))

    def turns(**options):
        met.clear()

        def total(q):
            return jnp.sum(causal_attention(q, k, v, **options))

        jax.block_until_ready(jax.jit(jax.grad(total))(q))
        jax.effects_barrier()
        assert sorted(met)[::2] == sorted(met)[1::2]  # once forward, and once backward
        return sorted(met)[::2]

    assert turns() == [(i, j) for i in range(4) for j in range(i + 1)]
    assert turns(window=16) == [
        (0, 0),
        *((i, i + d) for i in (1, 2, 3) for d in (-1, 0)),
    ]
    # The third block has the end of the first document, the fourth nothing of it.
    packed = turns(documents=own)
    assert packed == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 2), (3, 3)]


def test_the_choice_of_attention_says_why(monkeypatch):
    shape = (1, 64, 4, 64)
    name, why = choose_attention(shape, 2, jnp.dtype("bfloat16"))
    assert name == "xla" and "needs an NVIDIA GPU, this is cpu" in why
    with pytest.raises(ConfigError, match="'cudnn' cannot run: cudnn needs an NVIDIA"):
        choose_attention(shape, 2, jnp.dtype("bfloat16"), implementation="cudnn")
    monkeypatch.setenv(module.VARIABLE, "flash")
    with pytest.raises(ConfigError, match="attention 'flash'.*expected xla or cudnn"):
        choose_attention(shape, 2, jnp.dtype("bfloat16"))
    monkeypatch.setenv(module.VARIABLE, "xla")
    assert choose_attention(shape, 2, jnp.dtype("bfloat16")) == ("xla", "asked for")


def test_values_of_another_size_are_none_for_cudnn(monkeypatch):
    h200 = Device("gpu", "NVIDIA H200", (9, 0), 132)
    monkeypatch.setattr(module, "current_device", lambda: h200)
    shape = (1, 64, 4, 192)
    name, why = choose_attention(shape, 4, jnp.dtype("bfloat16"), value_dim=128)
    assert name == "xla" and "as wide as queries, here 128 and 192" in why


@pytest.mark.aot
@pytest.mark.parametrize(
    ("dtype", "head_dim", "window", "fused"),
    [
        ("bfloat16", 64, None, True),
        ("float16", 128, 128, True),
        ("bfloat16", 12, None, False),
        ("float32", 64, None, False),
    ],
)
def test_on_a_gpu_it_is_cudnn_where_that_can_run(dtype, head_dim, window, fused):
    # CUDA's compiler and cuDNN are there where .ci/run installed them (two stacks run this).
    if reason := aot.available() or aot.without_cudnn():
        pytest.skip(f"NOT COMPILED FOR A GPU: {reason}")

    def total(q, k, v):
        return jnp.sum(causal_attention(q, k, v, window=window).astype(jnp.float32))

    q = jax.ShapeDtypeStruct((2, 512, 4, head_dim), dtype)
    k = jax.ShapeDtypeStruct((2, 512, 2, head_dim), dtype)
    program = aot.compile_for("h200", jax.grad(total, argnums=(0, 1, 2)), q, k, k)
    calls = re.findall(r"__cudnn\$(\w+)", program.as_text())
    assert set(calls) == ({"fmhaSoftmax", "fmhaSoftmaxBackward"} if fused else set())


@pytest.mark.aot
def test_on_a_gpu_documents_of_long_rows_have_no_array_of_length_by_length():
    # CUDA's compiler is there where .ci/run installed it (two of its stacks run this).
    if reason := aot.available():
        pytest.skip(f"NOT COMPILED FOR A GPU: {reason}")
    length, heads = 8192, 8

    def total(q, k, v, documents):
        y = causal_attention(q, k, v, documents=documents)
        return jnp.sum(y.astype(jnp.float32))

    q = jax.ShapeDtypeStruct((1, length, heads, 128), "bfloat16")
    k = jax.ShapeDtypeStruct((1, length, 2, 128), "bfloat16")
    documents = jax.ShapeDtypeStruct((1, length), "int32")
    gradient = jax.grad(total, argnums=(0, 1, 2))
    program = aot.compile_for("h200", gradient, q, k, k, documents)
    assert not re.findall(rf"\[[\d,]*{length},{length}\]", program.as_text())
    whole = 4 * heads * length * length
    assert program.memory_analysis().temp_size_in_bytes < whole / 5
