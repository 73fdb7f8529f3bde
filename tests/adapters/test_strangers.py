"""Models that are not ours: what quantize takes of them, what it leaves, and the way back."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from qlora_jax.adapters import Adapter, LoRAConfig, attach, merge
from qlora_jax.adapters.attach import join, split
from qlora_jax.adapters.merge import unmerge
from qlora_jax.adapters.merge_report import merge_report
from qlora_jax.config.quant import QuantConfig
from qlora_jax.errors import CheckpointError, ConfigError
from qlora_jax.nn import LoRA, QuantizedLinear, quantize
from qlora_jax.nn.quantizing import check_module
from qlora_jax.sources.save import save_model
from qlora_jax.train.step import make_eval_step, make_train_step

KEY = jax.random.key(0)
FEW = QuantConfig(double_quant=False)


def x(*shape: int, dtype: str = "float32") -> jax.Array:
    return jax.random.normal(jax.random.key(7), shape).astype(dtype)


class Stack(nnx.Module):
    """Three layers that nnx.vmap made, applied by nnx.scan."""

    def __init__(self, size: int = 64, bias: bool = True):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def layers(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(64, size, use_bias=bias, rngs=rngs)

        self.layers = layers(nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def apply(x, layer):
            return jnp.tanh(layer(x))

        return apply(x, self.layers)


def test_a_stack_is_quantized_layer_by_layer_and_trains():
    model = Stack()
    model.layers.bias.set_value(x(3, 64))
    packed = quantize(model, FEW)
    assert isinstance(packed.layers, QuantizedLinear) and packed.layers.stack == (3,)
    for i in range(3):
        alone = nnx.Linear(64, 64, rngs=nnx.Rngs(1))
        alone.kernel.set_value(model.layers.kernel[...][i])
        np.testing.assert_array_equal(
            packed.layers.weight()[i], quantize(alone, FEW).weight()
        )
    np.testing.assert_allclose(packed(x(2, 64)), model(x(2, 64)), atol=0.5, rtol=0)
    adapted = attach(packed, LoRAConfig(rank=2, targets="layers"), key=KEY)
    np.testing.assert_array_equal(adapted(x(2, 64)), packed(x(2, 64)))
    graphdef, lora, base = split(adapted)
    grads = jax.grad(lambda lora: join(graphdef, lora, base)(x(2, 64)).sum())(lora)
    assert grads["layers"]["lora_b"][...].shape == (3, 2, 64)
    assert np.abs(grads["layers"]["lora_b"][...]).min(axis=(1, 2)).max() > 0


def test_a_stack_on_another_axis_is_left_and_named(caplog):
    class Odd(nnx.Module):
        def __init__(self):
            @nnx.split_rngs(splits=3)
            @nnx.vmap(in_axes=0, out_axes=1)
            def layers(rngs: nnx.Rngs) -> nnx.Linear:
                return nnx.Linear(64, 32, use_bias=False, rngs=rngs)

            self.layers = layers(nnx.Rngs(0))
            self.one = nnx.Linear(64, 32, rngs=nnx.Rngs(1))

    packed = quantize(Odd(), FEW)
    assert packed.layers.kernel[...].shape == (64, 3, 32)
    assert "dense" in caplog.text and "layers (Linear)" in caplog.text


class Mixed(nnx.Module):
    """What has matrices besides nnx.Linear."""

    def __init__(self, rngs: nnx.Rngs):
        self.one = nnx.Linear(64, 32, rngs=rngs)
        self.general = nnx.LinearGeneral(64, (4, 8), rngs=rngs)
        self.einsum = nnx.Einsum("ab,bc->ac", (64, 32), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 32, decode=False, rngs=rngs)
        self.lora = nnx.LoRALinear(64, 32, lora_rank=2, rngs=rngs)
        self.own = nnx.Linear(64, 32, dot_general=lambda *a, **k: 0, rngs=rngs)
        self.embed = nnx.Embed(10, 64, rngs=rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.lm_head = nnx.Linear(32, 10, rngs=rngs)


def test_what_stays_dense_is_named_in_one_warning(caplog):
    packed = quantize(Mixed(nnx.Rngs(0)), FEW)
    assert isinstance(packed.one, QuantizedLinear)
    (record,) = caplog.records
    said = record.getMessage()
    for name in (
        *(
            "general (LinearGeneral)",
            "einsum (Einsum)",
            "attention.query (LinearGeneral)",
        ),
        *("attention.out (LinearGeneral)", "lora (LoRALinear)", "own (Linear)"),
    ):
        assert name in said
    for name in ("embed", "norm", "lm_head", "one (", "base_module"):
        assert name not in said


class Dense(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(32)(x)


def test_linen_modules_are_refused_with_the_way_out():
    # quantize and attach begin with it; in these tests their types are checked before.
    with pytest.raises(ConfigError, match="Dense is a flax.linen module.*nnx.Linear"):
        check_module(Dense())
    with pytest.raises(ConfigError, match="dict is no flax.nnx.Module"):
        check_module({})
    bridged = nnx.bridge.ToNNX(Dense(), rngs=nnx.Rngs(0)).lazy_init(x(2, 64))
    with pytest.raises(
        ConfigError, match=r"\(ToNNX\).*Dense layers as flax.nnx.Linear"
    ):
        quantize(bridged)
    with pytest.raises(
        ConfigError, match="LayerNorm has no flax.nnx.Linear .*no matri"
    ):
        quantize(nnx.LayerNorm(8, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
@pytest.mark.parametrize("given", ["bfloat16", "float32"])
def test_a_linear_computes_in_the_dtype_that_it_did(dtype, given):
    linear = nnx.Linear(64, 32, dtype=dtype, rngs=nnx.Rngs(0))
    wanted = linear(x(2, 64, dtype=given))
    for model in (
        packed := quantize(linear, FEW),
        adapted := attach(One(packed), LoRAConfig(rank=2), key=KEY),
    ):
        y = model(x(2, 64, dtype=given))
        assert y.dtype == wanted.dtype
        assert np.abs(np.asarray(y - wanted, np.float32)).max() < 0.5
    merged = merge(adapted, dtype="bfloat16").linear
    assert merged.param_dtype == merged.kernel[...].dtype == jnp.bfloat16
    assert merged.dtype == linear.dtype


class One(nnx.Module):
    def __init__(self, linear: nnx.Module):
        self.linear = linear

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(x)


def moved(model: nnx.Module, targets: str = "all-linear") -> Any:
    adapter = Adapter.of(attach(model, LoRAConfig(rank=2, targets=targets), key=KEY))
    lora = jax.tree.map(lambda a: a + 0.05, adapter.lora)
    return Adapter(lora, adapter.config)


def test_merge_gives_a_strangers_module_back():
    model = Stack(bias=False)
    model.other = nnx.Linear(64, 8, kernel_metadata={"mark": 3}, rngs=nnx.Rngs(2))
    packed = quantize(model, FEW)
    adapter = moved(packed, "layers")
    merged = merge(adapter.on(packed), dtype="float32")
    assert type(merged.layers) is type(merged.other) is nnx.Linear
    assert nnx.state(merged, nnx.Param).keys() == nnx.state(model, nnx.Param).keys()
    assert jax.tree.structure(nnx.split(merged)[1]) == jax.tree.structure(
        nnx.split(model)[1]
    )
    np.testing.assert_allclose(
        merged(x(2, 64)), adapter.on(packed)(x(2, 64)), atol=1e-5, rtol=0
    )
    decoded = np.swapaxes(np.asarray(packed.other.weight()), -1, -2)
    np.testing.assert_array_equal(merged.other.kernel[...], decoded)
    assert merged.other.kernel.get_metadata()["mark"] == 3
    assert max(merge_report(adapter.on(packed), merged).relative.values()) < 1e-6
    back = unmerge(merged, adapter, dtype="float32")
    assert type(back.layers) is nnx.Linear
    np.testing.assert_allclose(
        back.layers.kernel[...].mT, packed.layers.weight(), atol=1e-6, rtol=0
    )
    again = merge(adapter.on(packed), requantize=FEW)
    assert isinstance(again.layers, QuantizedLinear)
    assert type(merge(moved(again).on(again), dtype="float32").other) is nnx.Linear


def test_saving_a_strangers_module_says_what_can_be_done(tmp_path):
    with pytest.raises(CheckpointError, match="of Stack save nnx.state.* with Orbax"):
        save_model(Stack(), tmp_path / "a")
    assert not (tmp_path / "a").exists()


class Noisy(nnx.Module):
    """Dropout and statistics of batches, as in training."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(64, 64, rngs=rngs)
        self.blocks = nnx.List([nnx.Dropout(0.5, rngs=rngs)])
        self.norm = nnx.BatchNorm(64, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.blocks[0](self.linear(x)))


def squares(model: Any, batch: Any, key: Any) -> jax.Array:
    return jnp.sum(model(jnp.ones((2, 64)) * batch["weights"].sum()) ** 2)


def test_modules_that_change_as_they_run_are_refused_with_the_way_out():
    model = attach(quantize(Noisy(nnx.Rngs(0)), FEW), LoRAConfig(rank=2), key=KEY)
    batch = {"tokens": jnp.ones((2, 4), jnp.int32), "weights": jnp.ones((2, 4))}
    tx = optax.sgd(0.1)
    graphdef, lora, base = split(model)
    for step in (
        lambda: make_train_step(graphdef, tx, loss_fn=squares)(
            lora, base, tx.init(lora), batch
        ),
        lambda: make_eval_step(graphdef, squares)(lora, base, batch),
    ):
        with pytest.raises(ConfigError) as error:
            step()
        said = str(error.value)
        assert "blocks.0 (Dropout)" in said and "norm (BatchNorm)" in said
        assert "model.eval()" in said
    model.eval()
    graphdef, lora, base = split(model)
    step = make_train_step(graphdef, tx, loss_fn=squares)
    lora, _, metrics = step(lora, base, tx.init(lora), batch)
    assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    assert any(isinstance(node, LoRA) for _, node in nnx.iter_graph(model))


def test_no_warning_of_what_is_a_linear(caplog):
    with caplog.at_level(logging.WARNING):
        quantize(Stack(), FEW)
    assert not caplog.records
