"""Tables of token vectors: quantized ones, and heads made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from pallas_kernels.device import INT8_PIECE_BYTES
from qlora_jax.config.quant import QuantConfig
from qlora_jax.nn import (
    Embedding,
    LoRA,
    LoRAEmbedding,
    QuantizedEmbedding,
    QuantizedLinear,
    TrainedRows,
)
from qlora_jax.nn.packing import dequantize, quantize_rows, quantize_tensor

ROUNDING = {"float32": 1e-6, "bfloat16": 2**-8}
"""The error allowed, relative to a product's largest value: that of sums in another order, or
of one rounding of bfloat16."""
ROWS = jnp.asarray([3, 0, 49, 3, 17], jnp.int32)


@pytest.mark.slow
def test_a_4_bit_table_reads_and_heads_as_its_decoded_self():
    w = jax.random.normal(jax.random.key(0), (50, 128))
    q = quantize_tensor(w, QuantConfig())
    packed, plain = QuantizedEmbedding(q), Embedding(dequantize(q, "float32"))
    tokens = ROWS.reshape(1, 5)
    np.testing.assert_array_equal(packed(tokens), plain(tokens))
    x = jax.random.normal(jax.random.key(1), (2, 3, 128))
    head = packed.head()
    assert isinstance(head, QuantizedLinear)
    np.testing.assert_allclose(head(x), plain.head()(x), rtol=1e-5, atol=1e-4)


def test_trained_rows_stand_in_for_their_tokens_alone():
    model = tiny.adapted(tiny.decoder(), zero=True, tokens=(9, 2), targets="q_proj")
    table, head = model.embed_tokens, model.lm_head
    assert isinstance(table, TrainedRows) and isinstance(head, TrainedRows)
    new = jnp.asarray([[1.0] * 64, [2.0] * 64])
    table.rows.set_value(new)
    tokens = jnp.asarray([[9, 1, 2, 271]], jnp.int32)
    rows = table(tokens)
    np.testing.assert_array_equal(rows[0, 0], new[0])
    np.testing.assert_array_equal(rows[0, 2], new[1])
    np.testing.assert_array_equal(rows[0, 1], table.base(tokens)[0, 1])
    np.testing.assert_array_equal(rows[0, 3], table.base(tokens)[0, 3])


def int8_table() -> tuple[QuantizedEmbedding, np.ndarray]:
    """Returns a table of 50 rows, and its values in float64."""
    q = quantize_rows(jax.random.normal(jax.random.key(0), (50, 24)))
    scale = np.asarray(q.absmax, np.float64)[:, None] / 127
    return QuantizedEmbedding(q), np.asarray(q.codes, np.float64) * scale


def near(said: jax.Array, exact: np.ndarray, of: float) -> bool:
    return (
        np.abs(np.asarray(said, np.float64) - exact).max() <= of * np.abs(exact).max()
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("piece_rows", [50, 16, 7])
def test_an_int8_head_and_its_gradient_are_the_decoded_ones(
    dtype, piece_rows, monkeypatch
):
    # Whole, in pieces with a rest, and with a rest of one row.
    item = jnp.dtype(dtype).itemsize
    monkeypatch.setitem(INT8_PIECE_BYTES, "cpu", piece_rows * 24 * item)
    table, exact = int8_table()
    x = jax.random.normal(jax.random.key(1), (2, 3, 24)).astype(dtype)
    dy = jax.random.normal(jax.random.key(2), (2, 3, 50)).astype(dtype)
    y, vjp = jax.vjp(table.head(), x)
    assert y.dtype == dtype and near(
        y, np.asarray(x, np.float64) @ exact.T, ROUNDING[dtype]
    )
    dx = vjp(dy)[0]
    assert dx.dtype == dtype
    assert near(dx, np.asarray(dy, np.float64) @ exact, 2 * ROUNDING[dtype])


def test_an_int8_heads_gradient_is_the_finite_difference():
    table, _ = int8_table()
    head = table.head()
    x, t = (jax.random.normal(jax.random.key(i), (3, 24)) for i in (1, 2))

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.tanh(head(x)))

    said = jnp.vdot(jax.grad(loss)(x), t)
    wanted = (loss(x + 1e-2 * t) - loss(x - 1e-2 * t)) / 2e-2
    np.testing.assert_allclose(said, wanted, rtol=1e-2)


def test_int8_rows_are_read_and_adapted_as_dense_ones():
    table, exact = int8_table()
    tokens = ROWS.reshape(1, 5)
    assert near(table(tokens), exact[np.asarray(tokens)], 1e-6)
    dense = Embedding(jnp.asarray(exact, jnp.float32))
    options = {"rank": 2, "alpha": 4.0, "rslora": False, "key": jax.random.key(3)}
    pair = [LoRAEmbedding(one, **options) for one in (table, dense)]
    heads = [
        LoRA(one.head(), rank=2, alpha=4.0, dropout=0.0, dora=True, key=options["key"])
        for one in (table, dense)
    ]
    x = jax.random.normal(jax.random.key(4), (3, 24))
    for one in (*pair, *heads):
        one.lora_a.set_value(jnp.ones_like(one.lora_a[...]))
        one.lora_b.set_value(jnp.full_like(one.lora_b[...], 0.1))
    assert near(pair[0](tokens), np.asarray(pair[1](tokens)), 1e-6)
    assert near(heads[0](x), np.asarray(heads[1](x)), 1e-5)
