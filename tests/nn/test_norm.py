"""RMSNorm, against numpy."""

import jax.numpy as jnp
import numpy as np

from qlora_jax.nn.norm import RMSNorm
from qlora_jax.nn.variables import FrozenParam


def test_it_divides_by_the_root_mean_square_and_scales():
    x = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32) * 5
    weight = np.linspace(0.5, 2, 16, dtype=np.float32)
    expected = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-3) * weight
    norm = RMSNorm(jnp.asarray(weight), 1e-3)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5)


def test_statistics_are_float32_and_the_dtype_is_kept():
    x = jnp.full((2, 512), 1.0078125, jnp.bfloat16)  # a bfloat16 sum of 512 would stick
    y = RMSNorm(jnp.ones(512, jnp.bfloat16), 0.0)(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y, np.float32), 1)


def test_its_weight_is_frozen():
    assert isinstance(RMSNorm(jnp.ones(4), 1e-6).weight, FrozenParam)
