"""Norms, against numpy."""

import jax.numpy as jnp
import numpy as np

from qlora_jax.nn.norm import BareNorm, LayerNorm, RMSNorm
from qlora_jax.nn.variables import FrozenParam


def test_it_divides_by_the_root_mean_square_and_scales():
    x = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32) * 5
    weight = np.linspace(0.5, 2, 16, dtype=np.float32)
    expected = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-3) * weight
    norm = RMSNorm(jnp.asarray(weight), 1e-3)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5)


def test_layer_norm_takes_the_mean_away_before_it():
    x = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32) * 5 + 2
    weight = np.linspace(0.5, 2, 16, dtype=np.float32)
    expected = x - x.mean(-1, keepdims=True)
    expected /= np.sqrt(x.var(-1, keepdims=True) + 1e-3)
    norm = LayerNorm(jnp.asarray(weight), 1e-3)
    for one in (norm, norm.holding(norm.stored)):
        np.testing.assert_allclose(one(jnp.asarray(x)), expected * weight, rtol=1e-5)
    assert norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_without_a_weight_it_is_as_with_ones():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16)), jnp.bfloat16)
    expected = RMSNorm(jnp.ones(16), 1e-3)(x)
    np.testing.assert_array_equal(BareNorm(1e-3)(x), expected)


def test_statistics_are_float32_and_the_dtype_is_kept():
    x = jnp.full((2, 512), 1.0078125, jnp.bfloat16)  # a bfloat16 sum of 512 would stick
    y = RMSNorm(jnp.ones(512, jnp.bfloat16), 0.0)(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y, np.float32), 1)


def test_its_weight_is_frozen():
    assert isinstance(RMSNorm(jnp.ones(4), 1e-6).weight, FrozenParam)
