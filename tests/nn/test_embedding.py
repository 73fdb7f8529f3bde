"""Tables of token vectors: 4-bit ones, and heads made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from pallas_kernels.reference import dequantize_rows
from qlora_jax.nn import Embedding, QuantizedEmbedding, QuantizedLinear, TrainedRows
from qlora_jax.quant import QuantConfig, dequantize, quantize_tensor

ROWS = jnp.asarray([3, 0, 49, 3, 17], jnp.int32)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    ("k", "block_size", "codebook"),
    [
        (512, 64, "nf4"),
        (256, 128, "int4"),
        (192, 64, "nf4"),
        (96, 64, "fp4"),
        (7, 32, "nf4"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_decoded_as_the_whole_is(k, block_size, codebook, double_quant, dtype):
    w = jax.random.normal(jax.random.key(0), (50, k))
    config = QuantConfig(
        codebook=codebook, block_size=block_size, double_quant=double_quant
    )
    q = quantize_tensor(w, config)
    wanted = np.asarray(dequantize(q, dtype).astype(jnp.float32))[np.asarray(ROWS)]
    said = jax.jit(dequantize_rows, static_argnums=2)(q, ROWS, dtype)
    assert said.dtype == dtype
    np.testing.assert_array_equal(np.asarray(said.astype(jnp.float32)), wanted)


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
