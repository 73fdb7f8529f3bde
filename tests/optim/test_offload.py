"""offload: where the state rests, and that no number changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from qlora_jax.errors import QLoRAError
from qlora_jax.optim import dynamic_loss_scale, offload


@pytest.fixture
def params() -> dict[str, jax.Array]:
    return {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(5)}


def gradients(params, step: int):
    return jax.tree.map(lambda p: jnp.sin(p + step), params)


def kinds(state) -> set[str]:
    return {x.sharding.memory_kind for x in jax.tree.leaves(state) if x.ndim}


def run(tx: optax.GradientTransformation, params, steps: int = 3):
    state = tx.init(params)

    @jax.jit
    def update(params, state, step):
        updates, state = tx.update(gradients(params, step), state, params)
        return optax.apply_updates(params, updates), state

    for step in range(steps):
        params, state = update(params, state, step)
    return params, state


def test_the_numbers_are_those_of_the_inner_optimizer(params):
    inner = optax.chain(optax.clip_by_global_norm(0.3), optax.adamw(1e-2))
    plain, paged = run(inner, params), run(offload(inner), params)
    for one, other in zip(tiny.arrays(plain), tiny.arrays(paged), strict=True):
        np.testing.assert_array_equal(one, other)
    assert jax.tree.structure(plain[1]) == jax.tree.structure(paged[1])


def test_the_state_rests_on_the_host_and_updates_do_not(params):
    tx = offload(optax.adamw(1e-2))
    state = tx.init(params)
    assert kinds(state) == {"pinned_host"}
    updates, state = tx.update(gradients(params, 0), state, params)
    assert kinds(state) == {"pinned_host"}
    assert "pinned_host" not in kinds(updates)


def test_the_state_rests_on_the_host_after_a_jitted_update(params):
    updated, state = run(offload(optax.adamw(1e-2)), params)
    assert kinds(state) == {"pinned_host"}
    assert "pinned_host" not in kinds(updated)


def test_step_counts_stay_on_the_device(params):
    state = offload(optax.adamw(1e-2)).init(params)
    scalars = [x for x in jax.tree.leaves(state) if not x.ndim]
    assert scalars
    assert all(x.sharding.memory_kind != "pinned_host" for x in scalars)


def test_device_switches_it_off(params):
    state = offload(optax.adamw(1e-2), memory_kind="device").init(params)
    assert "pinned_host" not in kinds(state)


def test_it_goes_around_loss_scaling(params):
    tx = offload(dynamic_loss_scale(optax.adamw(1e-2)))
    _, state = run(tx, params)
    assert kinds(state.inner) == {"pinned_host"}
    assert int(state.good_steps) == 3


@pytest.mark.parametrize("kind", ["unpinned_host", "disk"])
def test_another_memory_kind_is_refused(kind):
    message = f"memory_kind is '{kind}', expected one of pinned_host, device"
    with pytest.raises(ValueError, match=message) as caught:
        offload(optax.sgd(1.0), memory_kind=kind)
    assert isinstance(caught.value, QLoRAError)
