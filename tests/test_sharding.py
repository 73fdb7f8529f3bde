"""A model spread over a mesh of CPU devices computes what it does on one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import qlora_jax as qlora
from qlora_jax.errors import ConfigError
from qlora_jax.sharding import RULES, named_axes, shard

SUMS = 1e-5
"""Rows that are cut are summed in another order, in float32."""

AUTO = (AxisType.Auto, AxisType.Auto)


def stepped(model, batch):
    """Returns the loss of the second step and the adapter after it."""
    graphdef, lora, base = qlora.split(model)
    tx = optax.sgd(0.1)
    step = qlora.make_train_step(graphdef, tx)
    lora = jax.tree.map(jnp.copy, lora)  # which the step donates
    state = tx.init(lora)
    for _ in range(2):
        lora, state, metrics = step(lora, base, state, batch)
    return [metrics["loss"], *jax.tree.leaves(lora)]


def test_two_steps_on_four_devices_are_those_on_one():
    tokens = tiny.tokens(4, 16)
    batch = {"tokens": tokens, "weights": jnp.ones(tokens.shape, jnp.float32)}
    model = tiny.adapted(tiny.quantized())
    alone = stepped(model, batch)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=AUTO)
    spread = qlora.shard(model, mesh, RULES | {"out": ("data", "model")})
    codes = spread.layers.mlp.up_proj.base.quantized.codes
    assert codes.addressable_shards[0].data.shape[1] == codes.shape[1] // 4
    assert not spread.layers.mlp.up_proj.lora_b[...].sharding.is_fully_replicated
    rows = NamedSharding(mesh, PartitionSpec("data"))
    together = stepped(spread, jax.device_put(batch, rows))
    for mine, theirs in zip(together, alone, strict=True):
        assert len(mine.sharding.device_set) == 4
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=SUMS)


def test_every_variable_of_a_model_has_axes_of_its_arrays():
    model = tiny.adapted(tiny.quantized(), dora=True, targets="all-linear")
    named = dict(named_axes(model))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        arrays = jax.tree.leaves(variable.get_value())
        found = list(named.pop(path).values())
        assert [len(axes) for axes in found] == [x.ndim for x in arrays], path
    assert not named


def test_a_mesh_without_an_axis_is_refused():
    mesh = Mesh(jax.devices()[:1], ("data",))
    with pytest.raises(ConfigError, match=r"no axis model.*it has data"):
        shard(tiny.quantized(), mesh)


def test_a_mesh_that_xla_may_not_cut_along_is_refused():
    mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ConfigError, match="Auto"):
        shard(tiny.quantized(), mesh)
