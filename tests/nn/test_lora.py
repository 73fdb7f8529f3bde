"""The LoRA module: y = base(x) + scale * (drop(x) @ a) @ b."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

from qlora_jax.nn import Linear, LoRA, QuantizedLinear

RANK = 4


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def lora(base=None, dropout: float = 0.0, zero: bool = False) -> LoRA:
    base = base or Linear(normal(24, 64), jnp.arange(24.0))
    made = LoRA(base, rank=RANK, alpha=2.0, dropout=dropout, key=jax.random.key(0))
    if not zero:
        made.lora_b = nnx.LoRAParam(normal(*made.lora_b.shape, seed=1))
    return made


def quantized_base() -> QuantizedLinear:
    return QuantizedLinear(oracle.quantized((24, 64)))


@pytest.mark.parametrize("quantized", [False, True])
def test_a_new_adapter_changes_nothing(quantized):
    base = quantized_base() if quantized else None
    layer = lora(base, zero=True)
    x = normal(2, 3, 64)
    np.testing.assert_array_equal(layer(x), layer.base(x))


def test_it_starts_as_peft_does():
    layer = LoRA(
        Linear(normal(3, 24, 64)),
        rank=8,
        alpha=16.0,
        dropout=0.0,
        key=jax.random.key(1),
    )
    a, b = layer.lora_a[...], layer.lora_b[...]
    assert (a.shape, b.shape) == ((3, 64, 8), (3, 8, 24))
    assert a.dtype == b.dtype == jnp.float32
    assert not b.any()
    # kaiming_uniform with a=sqrt(5) is uniform in +-1/sqrt(in).
    bound = 1 / math.sqrt(64)
    assert 0.98 * bound < jnp.abs(a).max() <= bound
    np.testing.assert_allclose(a.std(), bound / math.sqrt(3), rtol=0.05)
    assert layer.scale == 2


@pytest.mark.parametrize("quantized", [False, True])
def test_the_update_is_added_in_the_dtype_of_the_input(quantized):
    layer = lora(quantized_base() if quantized else None)
    x = normal(2, 3, 64)
    update = (
        np.asarray(x) @ np.asarray(layer.lora_a[...]) @ np.asarray(layer.lora_b[...])
    )
    expected = np.asarray(layer.base(x)) + 2.0 / RANK * update
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert layer(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_only_its_factors_are_params():
    state = nnx.to_flat_state(nnx.state(lora(quantized_base()), nnx.Param))
    assert [path for path, _ in state] == [("lora_a",), ("lora_b",)]
    assert all(isinstance(variable, nnx.LoRAParam) for _, variable in state)


def test_dropout_acts_on_the_adapters_input_and_only_with_a_key():
    layer = lora(dropout=0.5)
    x = normal(4, 64)
    np.testing.assert_array_equal(layer(x), lora()(x))
    key = jax.random.key(3)
    np.testing.assert_array_equal(layer(x, key=key), layer(x, key=key))
    assert (layer(x, key=key) != layer(x, key=jax.random.key(4))).any()
    # What is left is x with entries dropped and the others doubled.
    keep = jax.random.bernoulli(key, 0.5, x.shape)
    update = jnp.where(keep, 2 * x, 0) @ layer.lora_a[...] @ layer.lora_b[...]
    expected = layer.base(x) + 2.0 / RANK * update
    np.testing.assert_allclose(layer(x, key=key), expected, rtol=1e-4, atol=1e-4)


def test_dropout_keeps_the_mean():
    layer = lora(dropout=0.25)
    x = normal(1, 64)
    keys = jax.random.split(jax.random.key(0), 4096)
    mean = jax.jit(jax.vmap(lambda key: layer(x, key=key)))(keys).mean(0)
    np.testing.assert_allclose(mean, layer(x), atol=0.15)


def test_its_gradient_is_that_of_the_dense_sum():
    layer, x, dy = lora(quantized_base()), normal(5, 64), normal(5, 24, seed=2)
    graphdef, factors, base = nnx.split(layer, nnx.LoRAParam, ...)

    @jax.jit
    def gradients(factors, x):
        y = lambda factors, x: (nnx.merge(graphdef, factors, base)(x) * dy).sum()  # noqa: E731
        return jax.grad(y, (0, 1))(factors, x)

    d_factors, dx = gradients(factors, x)
    a, b, x, dy = (
        np.asarray(v, np.float64)
        for v in (factors.lora_a[...], factors.lora_b[...], x, dy)
    )
    scale, dense = 2.0 / RANK, oracle.decoded(layer.base.quantized)
    close = {"rtol": 1e-3, "atol": 1e-4}
    np.testing.assert_allclose(d_factors.lora_a[...], scale * x.T @ dy @ b.T, **close)
    np.testing.assert_allclose(d_factors.lora_b[...], scale * (x @ a).T @ dy, **close)
    np.testing.assert_allclose(dx, dy @ (dense + scale * (a @ b).T), **close)
