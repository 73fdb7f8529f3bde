"""Frozen linears, and `quantize` of our models and of a stranger's."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

from pallas_kernels.formats import QuantizedTensor
from qlora_jax.config.quant import QuantConfig
from qlora_jax.errors import ShapeError
from qlora_jax.nn import FrozenParam, Linear, QuantizedLinear, quantize


def normal(*shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


class Stranger(nnx.Module):
    """Somebody's model, with linears at several depths."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(64, 96, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(96, 96, use_bias=False, rngs=rngs)])
        self.norm = nnx.LayerNorm(96, rngs=rngs)
        self.lm_head = nnx.Linear(96, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.first(x))
        for block in self.blocks:
            x = x + block(x)
        return self.lm_head(self.norm(x))


def values(model: nnx.Module) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


def test_a_frozen_param_is_no_param():
    assert issubclass(FrozenParam, nnx.Variable)
    assert not issubclass(FrozenParam, nnx.Param)
    for linear in (Linear(normal(8, 4), jnp.ones(8)), quantized_linear()):
        assert not jax.tree.leaves(nnx.state(linear, nnx.Param))
        assert jax.tree.leaves(nnx.state(linear, FrozenParam))


def quantized_linear() -> QuantizedLinear:
    return QuantizedLinear(oracle.quantized((24, 64)), jnp.arange(24.0))


def test_linear_multiplies_in_the_dtype_of_its_input():
    linear = Linear(normal(8, 4), jnp.arange(8.0))
    x = normal(2, 3, 4)
    kernel, bias = np.asarray(linear.kernel[...]), np.arange(8)
    np.testing.assert_allclose(linear(x), np.asarray(x) @ kernel.T + bias, rtol=1e-5)
    assert linear(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert (linear.in_features, linear.out_features, linear.stack) == (4, 8, ())
    assert Linear(normal(3, 8, 4)).stack == (3,)


def test_quantized_linear_multiplies_by_the_decoded_kernel():
    linear = quantized_linear()
    x = normal(2, 3, 64)
    dense = oracle.decoded(linear.quantized)
    np.testing.assert_array_equal(linear.weight(), dense)
    assert linear.weight("bfloat16").dtype == jnp.bfloat16
    expected = np.asarray(x) @ dense.T + np.arange(24)
    np.testing.assert_allclose(linear(x), expected, rtol=1e-4, atol=1e-5)
    assert (linear.in_features, linear.out_features, linear.stack) == (64, 24, ())


def test_a_stack_of_quantized_linears_knows_its_size():
    for shape, stack in (((24, 64), (3,)), ((7, 33), (2, 3))):
        q = oracle.quantized(shape)
        q = jax.tree.map(
            lambda leaf, s=stack: jnp.broadcast_to(leaf, (*s, *leaf.shape)), q
        )
        linear = QuantizedLinear(q)
        assert linear.stack == stack
        assert linear.weight().shape == (*stack, *shape)


def test_a_quantized_tensor_survives_split_and_merge_inside_a_module():
    linear = quantized_linear()
    graphdef, state = nnx.split(linear)
    again = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))
    assert isinstance(again.quantized, QuantizedTensor)
    np.testing.assert_array_equal(again.weight(), linear.weight())


def test_quantize_replaces_a_strangers_linears_and_little_changes():
    model = Stranger(nnx.Rngs(0))
    before, x = values(model), normal(5, 64)
    expected = model(x)
    smaller = quantize(model, QuantConfig(double_quant=False))

    for linear in (smaller.first, smaller.blocks[0]):
        assert isinstance(linear, QuantizedLinear)
        assert not jax.tree.leaves(nnx.state(linear, nnx.Param))
    assert smaller.first.quantized.shape == (96, 64)  # Hugging Face orientation
    assert isinstance(smaller.lm_head, nnx.Linear)
    error = np.linalg.norm(smaller(x) - expected) / np.linalg.norm(expected)
    assert 0.001 < error < 0.2

    assert isinstance(model.first, nnx.Linear) and isinstance(
        model.blocks[0], nnx.Linear
    )
    for was, now in zip(before, values(model), strict=True):
        np.testing.assert_array_equal(was, now)
    np.testing.assert_array_equal(model(x), expected)


def test_quantize_takes_a_stack_of_our_linears_layer_by_layer():
    kernel = normal(3, 8, 64)
    stack = quantize(Linear(kernel, jnp.ones((3, 8))), QuantConfig(codebook="int4"))
    assert isinstance(stack, QuantizedLinear) and stack.stack == (3,)
    assert stack.quantized.codebook == "int4" and stack.quantized.shape == (8, 64)
    again = np.asarray(stack.weight())
    for i in range(3):
        alone = quantize(Linear(kernel[i]), QuantConfig(codebook="int4"))
        np.testing.assert_array_equal(again[i], alone.weight())
    np.testing.assert_array_equal(stack.bias[...], jnp.ones((3, 8)))


def test_quantize_keeps_the_dtype_of_the_weight():
    linear = quantize(Linear(normal(8, 64, dtype="bfloat16")))
    assert linear.quantized.dtype == "bfloat16"
    assert linear.weight().dtype == jnp.bfloat16


def test_quantize_names_the_linear_that_has_nan():
    model = Stranger(nnx.Rngs(0))
    kernel = model.blocks[0].kernel
    model.blocks[0].kernel = nnx.Param(kernel[...].at[3, 4].set(jnp.nan))
    with pytest.raises(
        ShapeError, match=r"^blocks\.0: a weight of shape .* NaN or Inf"
    ):
        quantize(model)
    with pytest.raises(ShapeError, match=r"^1: a weight"):
        quantize(Linear(normal(2, 8, 64).at[1, 0, 0].set(jnp.inf)))
