"""dynamic_loss_scale: unscales, skips what is not finite, backs off and grows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from qlora_jax.optim import dynamic_loss_scale, loss_scale

PARAMS = {"a": jnp.array([1.0, -2.0, 3.0]), "b": jnp.ones((2, 2))}


def scaled(state, value: float = 0.5):
    return jax.tree.map(lambda p: jnp.full_like(p, value) * state.scale, PARAMS)


def broken(state):
    grads = scaled(state)
    return grads | {"b": grads["b"].at[0, 1].set(jnp.inf)}


def test_gradients_are_divided_by_the_scale():
    tx = dynamic_loss_scale(optax.sgd(1.0))
    state = tx.init(PARAMS)
    assert float(state.scale) == 2.0**15
    updates, state = tx.update(scaled(state), state, PARAMS)
    for update in tiny.arrays(updates):
        np.testing.assert_array_equal(update, np.full_like(update, -0.5))
    assert (int(state.good_steps), int(state.skipped)) == (1, 0)


@pytest.mark.parametrize("bad", [jnp.inf, -jnp.inf, jnp.nan])
def test_a_step_that_is_not_finite_changes_nothing_and_halves_the_scale(bad):
    tx = dynamic_loss_scale(optax.adamw(1e-2))
    state = tx.init(PARAMS)
    _, state = tx.update(scaled(state), state, PARAMS)
    grads = scaled(state)
    grads = grads | {"b": grads["b"].at[1, 0].set(bad)}
    updates, after = tx.update(grads, state, PARAMS)
    assert not any(np.any(update) for update in tiny.arrays(updates))
    for one, other in zip(
        tiny.arrays(state.inner), tiny.arrays(after.inner), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert float(after.scale) == 2.0**14
    assert (int(after.good_steps), int(after.skipped)) == (0, 1)


def test_the_scale_doubles_after_an_interval_of_good_steps(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    tx = dynamic_loss_scale(optax.sgd(1e-3))
    state = tx.init(PARAMS)
    scales = []
    for step in range(8):
        grads = broken(state) if step == 4 else scaled(state)
        _, state = tx.update(grads, state, PARAMS)
        scales.append(float(state.scale) / 2.0**15)
    #         grows at 3 |  bad at 5 starts the count anew  | grows at 8
    assert scales == [1, 1, 2, 2, 1, 1, 1, 2]
    assert (int(state.good_steps), int(state.skipped)) == (0, 1)


def test_the_scale_never_falls_below_one():
    tx = dynamic_loss_scale(optax.sgd(1.0))
    state = tx.init(PARAMS)._replace(scale=jnp.float32(1.5))
    for _ in range(3):
        _, state = tx.update(broken(state), state, PARAMS)
    assert float(state.scale) == 1.0
    assert int(state.skipped) == 3


def test_it_runs_inside_jit_with_the_state_donated():
    tx = dynamic_loss_scale(optax.adamw(1e-2))
    update = jax.jit(
        lambda grads, state: tx.update(grads, state, PARAMS), donate_argnums=1
    )
    state = tx.init(PARAMS)
    for grads in (scaled(state), broken(state)):
        updates, state = update(grads, state)
    assert not any(np.any(update) for update in tiny.arrays(updates))
    assert int(state.skipped) == 1
