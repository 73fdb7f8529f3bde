"""Products of frozen weights and of trainable factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.nn.matmul import factor_matmul, frozen_matmul


def normal(*shape: int, dtype: str = "float32", seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def wide(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_frozen_matmul_is_differentiable_to_its_input_only(dtype):
    x, w, dy = (
        normal(5, 16, dtype=dtype),
        normal(7, 16, seed=1),
        normal(5, 7, dtype=dtype),
    )
    y, pull = jax.vjp(frozen_matmul, x, w)
    dx, dw = pull(dy)
    assert y.dtype == dx.dtype == x.dtype
    rounded = wide(w.astype(dtype))
    tolerance = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.01}[dtype]
    np.testing.assert_allclose(wide(y), wide(x) @ rounded.T, atol=tolerance)
    np.testing.assert_allclose(wide(dx), wide(dy) @ rounded, atol=tolerance)
    np.testing.assert_array_equal(dw, jnp.zeros_like(w))


def test_frozen_matmul_keeps_the_weight_alone_for_backward():
    x, w = normal(64, 16), normal(7, 16)
    kept = jax.eval_shape(lambda x, w: jax.vjp(frozen_matmul, x, w)[1], x, w)
    assert [leaf.shape for leaf in jax.tree.leaves(kept)] == [w.shape]


def test_a_factors_gradient_is_summed_and_kept_in_float32():
    # 4096 rows: a bfloat16 sum would lose all but a few bits.
    x, factor = normal(4096, 8, dtype="bfloat16"), normal(8, 4, seed=1)
    dy = normal(4096, 4, dtype="bfloat16", seed=2)
    y, pull = jax.vjp(factor_matmul, x, factor)
    dx, d_factor = pull(dy)
    assert (y.dtype, dx.dtype, d_factor.dtype) == (
        jnp.bfloat16,
        jnp.bfloat16,
        jnp.float32,
    )
    np.testing.assert_allclose(
        wide(d_factor), wide(x).T @ wide(dy), rtol=1e-4, atol=1e-3
    )
    np.testing.assert_allclose(
        wide(dx), wide(dy) @ wide(factor.astype(jnp.bfloat16)).T, rtol=0.01, atol=0.05
    )
