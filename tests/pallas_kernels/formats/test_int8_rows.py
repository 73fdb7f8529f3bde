"""Int8 rows against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.formats import Int8Rows

HALF_STEP = 0.5 * (1 + 1e-5)
"""The error allowed in units of a row's scale: what rounding to the nearest code may cost, and
float32's own part."""


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
    q = Int8Rows.quantize(w)
    assert isinstance(q, Int8Rows) and q.dtype == dtype and q.codes.dtype == jnp.int8
    exact = np.asarray(w, np.float64)
    absmax = np.abs(exact).max(1)
    np.testing.assert_array_equal(q.absmax, absmax)
    step = absmax[:, None] / 127
    wrong = np.abs(np.asarray(q.codes) * step - exact)
    assert (wrong <= HALF_STEP * step).all()
    largest = np.abs(np.asarray(q.codes, np.int32)).max(1)
    np.testing.assert_array_equal(largest, np.where(absmax == 0, 0, 127))


def test_what_was_decoded_is_quantized_to_the_same_codes():
    q = Int8Rows.quantize(table("float32"))
    np.testing.assert_array_equal(Int8Rows.quantize(q.decode()).codes, q.codes)
