"""offload: where the state rests, and that no number changes."""

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from qlora_jax.errors import QLoRAError
from qlora_jax.optim import dynamic_loss_scale, offload

HOST = "pinned_host"
LAST_BITS = 3e-6
"""Relative to an array's largest, over three steps: where XLA fuses multiply and add."""


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


def test_a_transform_that_looks_across_arrays_comes_whole_and_equal(params):
    inner = optax.chain(optax.clip_by_global_norm(0.3), optax.adamw(1e-2))
    plain, paged = run(inner, params), run(offload(inner), params)
    for one, other in zip(tiny.arrays(plain), tiny.arrays(paged), strict=True):
        np.testing.assert_array_equal(one, other)
    assert jax.tree.structure(plain[1]) == jax.tree.structure(paged[1])


@pytest.fixture
def stacked() -> dict[str, jax.Array]:
    """Leaves as an adapter has them: of all layers, of one linear, of many tokens."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((6, 8, 4), (6, 4, 16), (20,), (300, 4))
    return {
        str(shape): jax.random.normal(key, shape)
        for key, shape in zip(keys, shapes, strict=True)
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "inner",
    [
        optax.adamw(optax.cosine_decay_schedule(1e-2, 10), weight_decay=0.1),
        optax.lion(1e-3),
        optax.sgd(1e-2, momentum=0.9),
        optax.adafactor(1e-2),  # looks along axes: comes whole
    ],
    ids=["adamw", "lion", "sgd", "adafactor"],
)
@pytest.mark.parametrize("resident_bytes", [0, 1000, 10**9])
def test_no_number_changes_whatever_stays_on_the_device(inner, resident_bytes, stacked):
    clip = optax.clip_by_global_norm(0.3)
    plain, here, paged = (
        run(optax.chain(clip, tx), stacked)
        for tx in (
            inner,
            offload(inner, "device"),
            offload(inner, resident_bytes=resident_bytes),
        )
    )
    for one, other, third in zip(*map(tiny.arrays, (plain, here, paged)), strict=True):
        np.testing.assert_array_equal(other, third)
        size = LAST_BITS * np.abs(one).max()
        np.testing.assert_allclose(third, one, rtol=0, atol=size)
    assert jax.tree.structure(plain[1]) == jax.tree.structure(paged[1])
    host = [x for x in jax.tree.leaves(paged[1]) if x.sharding.memory_kind == HOST]
    total = sum(x.nbytes for x in jax.tree.leaves(paged[1]) if x.ndim)
    assert total - resident_bytes <= sum(x.nbytes for x in host) <= total
    assert bool(host) == (total > resident_bytes)


def brought(tx: optax.GradientTransformation, params) -> set[tuple[int, ...]]:
    """Shapes that an update puts on the device."""
    found: set[tuple[int, ...]] = set()

    def walk(jaxpr) -> None:
        for equation in jaxpr.eqns:
            for inside in equation.params.values():
                if isinstance(inside, jax.extend.core.ClosedJaxpr):
                    walk(inside.jaxpr)
            if equation.primitive.name == "device_put":
                if "Device" in str(equation.params["devices"]):
                    found.update(v.aval.shape for v in equation.outvars)

    walk(jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr)
    return found


def test_only_slices_of_the_state_come_to_the_device(stacked, caplog):
    chained = optax.chain(optax.clip_by_global_norm(0.3), offload(optax.adamw(1e-2)))
    assert brought(chained, stacked) == {(1, 8, 4), (1, 4, 16), (1,), (3, 4)}
    within = offload(optax.chain(optax.clip_by_global_norm(0.3), optax.adamw(1e-2)))
    with caplog.at_level("INFO"):
        assert brought(within, stacked) == {x.shape for x in stacked.values()}
    assert "reduce_sum across an array, so its whole state comes" in caplog.text


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
