"""Int8 rows against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.errors import ShapeError
from qlora_jax.quant import Int8Rows, dequantize, dequantize_rows, quantize_rows

HALF_STEP = 0.5 * (1 + 1e-5)
"""Of a row's scale: what rounding to the nearest code may cost, and float32's own part."""


def table(dtype: str) -> jax.Array:
    w = (
        np.random.default_rng(0).standard_normal((40, 24))
        * np.logspace(-6, 3, 40)[:, None]
    )
    w[7] = 0
    return jnp.asarray(w, jnp.float32).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_each_row_is_rounded_to_the_nearest_of_its_255_values(dtype):
    w = table(dtype)
    q = quantize_rows(w)
    assert isinstance(q, Int8Rows) and q.dtype == dtype and q.codes.dtype == jnp.int8
    exact = np.asarray(w, np.float64)
    absmax = np.abs(exact).max(1)
    np.testing.assert_array_equal(q.absmax, absmax)
    step = absmax[:, None] / 127
    wrong = np.abs(np.asarray(q.codes) * step - exact)
    assert (wrong <= HALF_STEP * step).all()
    largest = np.abs(np.asarray(q.codes, np.int32)).max(1)
    np.testing.assert_array_equal(largest, np.where(absmax == 0, 0, 127))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_value_is_its_code_times_the_rows_absmax_over_127(dtype):
    q = quantize_rows(table("float32"))
    scale = np.asarray(q.absmax, np.float64) / 127
    exact = np.asarray(q.codes) * scale[:, None]
    said = dequantize(q, dtype)
    assert said.dtype == dtype
    rounding = {"float32": 2**-22, "bfloat16": 2**-8}[dtype]
    np.testing.assert_allclose(np.asarray(said, np.float64), exact, rtol=rounding)
    rows = jnp.asarray([3, 39, 3, 7])
    np.testing.assert_array_equal(dequantize_rows(q, rows, dtype), said[rows])
    # What was decoded is quantized to the same codes again.
    if dtype == "float32":
        again = quantize_rows(said)
        np.testing.assert_array_equal(again.codes, q.codes)


def test_a_table_that_is_not_finite_is_refused():
    w = table("float32")
    for wrong in (np.nan, np.inf):
        with pytest.raises(ShapeError, match=r"shape \(40, 24\) has NaN or Inf"):
            quantize_rows(w.at[3, 2].set(wrong))


def test_it_is_a_pytree_that_shapes_go_through():
    q = jax.eval_shape(quantize_rows, jax.ShapeDtypeStruct((5, 3), jnp.bfloat16))
    assert q.shape == (5, 3) and q.absmax.shape == (5,) and q.dtype == "bfloat16"
