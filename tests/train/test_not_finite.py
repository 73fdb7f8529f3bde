"""Where a NaN or Inf began is named."""

import numpy as np
import pytest
import tiny
from flax import nnx

from qlora_jax.adapters import split
from qlora_jax.adapters.names import flatten, unflatten
from qlora_jax.config.train import TrainConfig
from qlora_jax.objectives import SFT
from qlora_jax.train.loop import DivergedError, Trainer
from qlora_jax.train.not_finite import first_not_finite

BATCH = tiny.batch([9, 7])


@pytest.fixture(scope="module")
def parts():
    return split(tiny.adapted(tiny.decoder()))


def with_value(state: nnx.State, name: str, value: float) -> nnx.State:
    arrays = dict(flatten(state))
    arrays[name] = arrays[name].at[0, 0].set(value)
    return unflatten(arrays, state, "test")


def in_layer(base: nnx.State, layer: int, value: float) -> nnx.State:
    """Makes a norm of one layer so large that its output overflows, though finite itself."""

    def put(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        x = variable.get_value()
        if "attn_norm" not in path:
            return variable
        return variable.replace(x.at[layer].set(value))

    flat = [(path, put(path, v)) for path, v in nnx.to_flat_state(base)]
    return nnx.from_flat_state(flat)


def test_the_layer_or_parameter_is_named(parts):
    graphdef, lora, base = parts

    def found(before=lora, after=lora, base=base):
        return first_not_finite(graphdef, before, after, base, BATCH, SFT)

    assert found() is None
    assert found(base=in_layer(base, 1, np.nan)) == (
        "the base's layers.attn_norm.weight, before the step"
    )
    assert found(base=in_layer(base, 1, 3e38)) == "the output of layers.1"
    assert found(base=in_layer(base, 0, 3e38)) == "the output of layers.0"
    name = "layers.1.attn.q_proj.lora_b"
    said = found(before=with_value(lora, name, np.inf))
    assert said == "the adapter's layers.attn.q_proj.lora_b, before the step"
    said = found(after=with_value(lora, name, np.inf))
    assert said == f"the adapter's {name}, after the step's update"


def test_a_run_that_diverges_says_where(tmp_path, monkeypatch):
    config = TrainConfig(
        **{"max_steps": 2, "micro_batch": 2, "grad_accum": 1, "check_finite": True},
        compute_dtype="float32",
    )
    model = tiny.adapted(tiny.decoder(), zero=True)
    run = Trainer(model, tiny.rows([9, 7, 5, 8]), config, tmp_path)
    run.base = in_layer(run.base, 1, 3e38)
    with pytest.raises(DivergedError, match="finite is the output of layers.1. Lower"):
        run.fit()
