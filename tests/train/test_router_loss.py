"""The load-balance loss of routers: the same however a step is made, and what has none."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import qlora_jax as qlora
from qlora_jax.errors import ConfigError
from qlora_jax.models.spec import BesideSpec, ExpertsSpec, LayerSpec, MLPSpec
from qlora_jax.nn.moe import load_balance_loss
from qlora_jax.objectives import Objective
from qlora_jax.train import make_train_step
from qlora_jax.train.router_loss import counted

KINDS = (MLPSpec(), ExpertsSpec(), ExpertsSpec(), BesideSpec(own_size=24))


@functools.cache
def parts():
    layers = tuple(LayerSpec(feed_forward=kind) for kind in KINDS)
    shape = dataclasses.replace(
        tiny.CONFIG, layers=layers, num_layers=len(layers), num_experts=4
    )
    return qlora.split(tiny.adapted(tiny.drawn(shape), rank=2, targets="q_proj"))


@functools.cache
def step_of(checkpoint, coefficient):
    return make_train_step(
        parts()[0],
        optax.sgd(1.0),
        checkpoint=checkpoint,
        router_aux_loss=coefficient,
    )


def batch(micro=2):
    ids = tiny.tokens(2, 12)
    weights = jnp.ones(ids.shape, jnp.float32).at[1, 7:].set(0).at[0, :3].set(0)
    made = {"tokens": ids, "weights": weights}
    return {name: x.reshape(micro, -1, 12) for name, x in made.items()}


def taken(rows, checkpoint="none", streamed=False, coefficient=0.5):
    """Returns the metrics and the gradient of one SGD step."""
    _, lora, base = parts()
    base = qlora.stream(base) if streamed else base
    copy = jax.tree.map(jnp.copy, lora)
    step = step_of(checkpoint, coefficient)
    after, _, metrics = step(copy, base, optax.sgd(1.0).init(copy), rows)
    grads = jax.tree.map(lambda before, after: before - after, lora, after)
    return {name: float(x) for name, x in metrics.items()}, tiny.arrays(grads)


@functools.cache
def plain(micro):
    return taken(batch(micro))


def same(got, want):
    for name, value in want[0].items():
        assert got[0][name] == pytest.approx(value, rel=2e-5), name
    for one, other in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max(), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("micro", "checkpoint", "streamed"),
    [(1, "layer", True), (2, "host", True)],
)
def test_it_is_the_same_wherever_layers_rest_and_whatever_is_recomputed(
    micro, checkpoint, streamed
):
    same(taken(batch(micro), checkpoint, streamed), plain(micro))


@pytest.mark.slow
def test_micro_batches_have_loads_of_their_own():
    """The step's is the mean of theirs, each weighted by the tokens that are predicted."""
    metrics, grads = plain(2)
    rows = batch()
    each = [taken({name: x[i] for name, x in rows.items()}) for i in range(2)]
    weights = [metrics["tokens"] for metrics, _ in each]
    for name in ("loss", "router_aux_loss"):
        values = [metrics[name] for metrics, _ in each]
        assert metrics[name] == pytest.approx(np.average(values, weights=weights))
    assert all(metrics["router_aux_loss"] > 1 for metrics, _ in each)
    for got, *ones in zip(grads, *(own for _, own in each), strict=True):
        want = np.average(ones, axis=0, weights=weights)
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max(), rtol=0)


@pytest.mark.slow
def test_the_objectives_loss_is_as_it_was():
    metrics, grads = plain(1)
    without, other = taken(batch(1), coefficient=0.0)
    assert "router_aux_loss" not in without
    more = metrics["loss"] - 0.5 * metrics["router_aux_loss"]
    assert without["loss"] == pytest.approx(more, rel=1e-5)
    first = np.abs(grads[0] - other[0]).max()
    assert first > 0.01 * np.abs(grads[0]).max()


def test_padding_does_not_count():
    rows = batch(1)
    padded = rows | {"tokens": rows["tokens"].at[0, 1, 7:].set(3)}
    same(taken(padded), plain(1))
    weights = jnp.asarray([[0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0]], jnp.float32)
    assert counted(weights).tolist() == [[1, 1, 1, 1, 1, 0], [0] * 6]


def test_it_is_least_where_all_experts_have_as_many():
    even = jnp.asarray([[4.0] * 4, [2.0] * 4])
    assert load_balance_loss(even, jnp.float32(8)) == 2
    one = jnp.asarray([[8.0, 8, 0, 0], [8.0, 0, 0, 0]])
    assert load_balance_loss(one, jnp.float32(8)) == 4
    assert load_balance_loss(0 * even, jnp.float32(0)) == 0


def test_what_has_no_load_is_refused():
    graphdef, lora, base = qlora.split(tiny.adapted(tiny.decoder()))
    step = make_train_step(graphdef, optax.sgd(1.0), router_aux_loss=0.001)
    with pytest.raises(
        ConfigError, match=r"llama has no experts .* router_aux_loss to 0"
    ):
        step(lora, base, optax.sgd(1.0).init(lora), batch(1))

    def twice(model, rows, key, checkpoint):
        x = model.hidden_states(rows["tokens"]) + model.hidden_states(rows["tokens"])
        return jnp.sum(x), {}

    graphdef, lora, base = parts()
    step = make_train_step(
        graphdef,
        optax.sgd(1.0),
        objective=Objective(name="twice", loss=twice),
        router_aux_loss=0.001,
    )
    with pytest.raises(ConfigError, match="twice runs .* 2 times"):
        step(lora, base, optax.sgd(1.0).init(lora), batch(1))
