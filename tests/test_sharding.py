"""A model spread over a mesh of CPU devices computes what it does on one."""

import os
import subprocess
import sys

import jax
import pytest
import tiny
from flax import nnx
from jax.sharding import AxisType, Mesh

from qlora_jax.errors import ConfigError
from qlora_jax.sharding import named_axes, shard

SUMS = 1e-5
"""Rows that are cut are summed in another order, in float32."""

ON_FOUR_DEVICES = """
import jax, jax.numpy as jnp, numpy as np, optax, sys, tiny
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import qlora_jax as qlora
from qlora_jax.sharding import RULES

assert len(jax.devices()) == 4
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
tokens = tiny.tokens(4, 16)
batch = {"tokens": tokens, "weights": jnp.ones(tokens.shape, jnp.float32)}
results = []
for rules in (None, RULES | {"out": ("data", "model")}):
    model = tiny.adapted(tiny.quantized())
    if rules is not None:
        model = qlora.shard(model, mesh, rules)
        codes = model.layers.mlp.up_proj.base.quantized.codes
        assert codes.addressable_shards[0].data.shape[1] == codes.shape[1] // 4
        batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    graphdef, lora, base = qlora.split(model)
    tx = optax.sgd(0.1)
    step = qlora.make_train_step(graphdef, tx)
    state = tx.init(lora)
    for _ in range(2):
        lora, state, metrics = step(lora, base, state, batch)
    if rules is not None:
        a = model.layers.mlp.up_proj.lora_b[...].sharding
        assert not a.is_fully_replicated
    results.append([float(metrics["loss"]), *map(np.asarray, jax.tree.leaves(lora))])
for other in results[1:]:
    for mine, theirs in zip(results[0], other, strict=True):
        np.testing.assert_allclose(mine, theirs, 0, float(sys.argv[1]))
print("equal")
"""


def test_two_steps_on_four_devices_are_those_on_one(tmp_path):
    script = tmp_path / "four.py"
    script.write_text(ON_FOUR_DEVICES)
    tests = os.path.dirname(__file__)
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([tests, os.path.dirname(tests)]),
    }
    done = subprocess.run(
        [sys.executable, str(script), str(SUMS)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "equal", done.stderr


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
