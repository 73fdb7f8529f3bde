"""adamw_8bit: bitsandbytes' numbers, optax's structure, and all that a run does with it."""

import base64
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from optax import ScaleByAdamState

from pallas_kernels.formats.absmax4.codebook import dynamic_map
from qlora_jax.adapters import split
from qlora_jax.errors import ConfigError
from qlora_jax.optim import dynamic_loss_scale, offload
from qlora_jax.optim.eight_bit import (
    BlockwiseMoment,
    adamw_8bit,
    dequantize_moment,
)
from qlora_jax.train import make_train_step
from qlora_jax.train.checkpoints import RunCheckpoints
from qlora_jax.train.state import TrainState

LAST_BITS = 3e-7
"""Relative: where XLA fuses multiply and add, and numpy does not."""
CORRECTION = 2e-5
"""Relative, of a step: float32 b2**t, as optax has it, moves 1 - b2**t by 3e-5 at t = 1."""
GROWN = 1e-5
"""Absolute: last bits after three steps whose gradients follow the parameters 37-fold."""
CONVERGED = 1e-3
"""Relative, of a final loss: what 8-bit moments may cost against float32 ones."""

# Three steps of bitsandbytes 0.50.2's AdamW8bit(lr=2**-6, betas=(0.9, 0.999), eps=1e-8,
# weight_decay=0.01, min_8bit_size=0) on CPU, for `start` and `gradient`, its states quantized
# by its own quantize_blockwise of backends/default. (That of backends/cpu looks x up in 65536
# even steps of [-1, 1], which the map's lower decades fall between: 2 % of the first moment's
# codes and 17 % of the second's differ.)
BNB_CODES = {
    "mu": (
        "G1Foqz5Xt6xbNmlqpJPCwKFYvVBXbrFkkrvFSlGfkTxqyFhrw4lToqZOO4vpkWilb29WQVW5Z9eP"
        "baTCUWK/r7hpLadoOaqgP1CsNXDqoGzBwEy/v0fBb85alDtZWVpEsTpvTpqPwVilSqlAvmanpmjE"
        "wmFbpqDBa/9clVy9okG/oTyRM1qYS8V0RLFBOorJW4O2r4+TvrE/n8hOkJG6UlyfRDWXzlprskFZ"
        "qKKpO5c9X5RDP59YP7CvatJoaj+gU2m6VbBvIUmWtEGgv0hMxJEtXZVYVUq+uG2ubj+mdbTFVlS9"
        "UMSZ2JdtT8OgQWNYWm7MpI9UUFhOVrNEaiiieMg8YruzvMif/62OwVdUvWBKwZnhS2I1NlFKpj7G"
        "mwxQaMU6pz4/SmGS11+K"
    ),
    "nu": (
        "0DYOJWMhRSskfwlBGwh8aSEkRz5BCa8fCEiDNzQUB3wJujMKdxc2HSFBVwG3NQ4fFRQrRy9VDbQw"
        "ByJkKRFNQEsNtSkOgzcgTjM1eQPEMglqXDJOTkhzB/8ZCGknKyJFQncI3SUHXyEgQidOSAugIw57"
        "axMhIR9RB/8ZCyJKKE5NH14LxR4PO4MDSjxPgAi0MwVJQh8JTEJFEHQ0Bx9PKiEbSYMLmxgOP04x"
        "KCAxdAylJgxVYR0kTD80B+4eDFUVJQ5GNSgGmTULPk8iT0NCcArBLQwgKjZKQgw/B7YjBUeCMzBJ"
        "QGAKjQ4IQIEaShcnOwesJAUoOiA6JEZACb4hB3RdIUIuRF0NxiAEWiohQxU8Qgv/NA51gCM2IU1r"
        "D9ozDmBxL0dBPBgHox8E"
    ),
}
BNB_ABSMAX = {
    "mu": [0.00669043651, 0.0049652704],
    "nu": [1.8414961e-06, 1.81396888e-06],
}
BNB_PARAMS = [
    -0.93419379,
    -0.891336203,
    -0.738886237,
    -0.643675029,
    -0.468444973,
    -0.348167658,
    -0.313676506,
    -0.119466983,
    0.00217518304,
    0.116467215,
    0.213288128,
    0.273374021,
    0.461925954,
    0.578802586,
    0.687798738,
    0.761991024,
    0.909369648,
    -0.928081036,
    -0.832394779,
    -0.693162918,
]  # every 15th


dequantize = jax.jit(dequantize_moment, static_argnums=(1, 2))


def start() -> np.ndarray:
    return ((np.arange(300) % 251 - 125) / 128).astype(np.float32).reshape(12, 25)


def gradient(step: int) -> np.ndarray:
    """Integers times powers of two over 11 octaves: exact in any order of operations."""
    i = np.arange(300, dtype=np.int64)
    mantissa = (7 * i * i + 131 * i * (2 * step + 1) + 977 * step) % 4093 - 2046
    exponent = -(16 + (i * (step + 3)) % 11).astype(np.int32)
    return np.ldexp(mantissa.astype(np.float32), exponent).reshape(12, 25)


def test_nothing_wider_than_the_parameter_is_made():
    x = jnp.zeros((256, 64))
    tx = adamw_8bit(1e-3)
    jaxpr = jax.make_jaxpr(tx.update)(x, tx.init(x), x).jaxpr
    made = [v.aval for equation in jaxpr.eqns for v in equation.outvars]
    assert max(v.size for v in made if hasattr(v, "size")) <= 2**16


def test_of_a_stack_one_layer_at_a_time_is_float32():
    params = jnp.zeros((16, 256, 64))
    tx = adamw_8bit(1e-3)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = tx.update(jnp.sin(params), state, params)
        return params + updates, state

    memory = step.lower(params, tx.init(params)).compile().memory_analysis()
    # 2.3 times: gradients, updates, what a layer takes. All layers at once take 5.
    assert memory.temp_size_in_bytes < 3 * params.nbytes


def test_three_steps_are_those_of_bitsandbytes():
    tx = adamw_8bit(2.0**-6, weight_decay=0.01, smallest=0)
    params = jnp.asarray(start())
    state = tx.init(params)
    for step in range(3):
        updates, state = jax.jit(tx.update)(jnp.asarray(gradient(step)), state, params)
        params += updates
    adam = state[0]
    assert isinstance(adam, ScaleByAdamState)
    for name, moment in {"mu": adam.mu, "nu": adam.nu}.items():
        theirs = np.frombuffer(base64.b64decode(BNB_CODES[name]), np.uint8)
        np.testing.assert_array_equal(np.asarray(moment.codes).ravel(), theirs)
        np.testing.assert_allclose(moment.absmax, BNB_ABSMAX[name], rtol=LAST_BITS)
    moved = np.abs(np.asarray(params) - start()).max()
    np.testing.assert_allclose(
        np.asarray(params).ravel()[::15], BNB_PARAMS, rtol=0, atol=CORRECTION * moved
    )


def oracle(p, grads, schedule, b1, b2, eps, decay, smallest, block=256):
    """Steps one matrix as bitsandbytes does, in numpy; returns it and both moments."""
    p = p.astype(np.float64)
    m, v = np.zeros((2, *p.shape), np.float32)
    for step, g in enumerate(grads, 1):
        m = (np.float32(b1) * m + np.float32(1 - b1) * g).astype(np.float32)
        v = (np.float32(b2) * v + np.float32(1 - b2) * g * g).astype(np.float32)
        # Applied from the float32 moments, before they are rounded.
        root = np.sqrt(v.astype(np.float64) / (1 - b2**step))
        rate = schedule(step - 1)
        p = p * (1 - rate * decay) - rate * m / (1 - b1**step) / (root + eps)
        if p.size >= smallest:
            m, v = (
                rounded(m, dynamic_map(), block),
                rounded(v, dynamic_map(False), block),
            )
    return p, m, v


def rounded(x, values, block):
    flat = x.ravel().copy()
    middles = (values[1:] + values[:-1]) / np.float32(2)
    for first in range(0, x.size, block):
        piece = flat[first : first + block]
        absmax = np.abs(piece).max()
        codes = np.searchsorted(middles, piece * (np.float32(1) / absmax))
        flat[first : first + block] = values[codes] * absmax
    return flat.reshape(x.shape)


SMALLEST = 100  # between those of `stacked`


@pytest.fixture(scope="module")
def stacked() -> dict[str, jax.Array]:
    """Leaves as an adapter has them, the last too small for 8 bits."""
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 40, 16), "table": (70, 9), "c": (3, 20)}
    return {
        k: jnp.asarray(rng.standard_normal(s, np.float32)) for k, s in shapes.items()
    }


@pytest.fixture(scope="module")
def plain(stacked):
    """Parameters and state after three steps."""
    return run(adamw_8bit(1e-2, smallest=SMALLEST), stacked)


def gradients(params, step):
    return jax.tree.map(lambda p: jnp.sin(37 * p + step) ** 5, params)


def run(tx, params, steps=3, grads=gradients):
    state = tx.init(params)

    @jax.jit
    def update(params, state, step):
        updates, state = tx.update(grads(params, step), state, params)
        return optax.apply_updates(params, updates), state

    for step in range(steps):
        params, state = update(params, state, step)
    return params, state


def same(one, other, **tolerance):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(tiny.arrays(one), tiny.arrays(other), strict=True):
        np.testing.assert_allclose(x, y, **({"rtol": 0} | tolerance))


def test_a_step_follows_bitsandbytes_definition(stacked):
    schedule = optax.linear_schedule(1e-2, 1e-3, 5)
    settings = {"b1": 0.8, "b2": 0.99, "eps": 1e-6}
    decays = {"a": True, "table": False, "c": True}
    tx = adamw_8bit(
        schedule, **settings, weight_decay=0.1, mask=decays, smallest=SMALLEST
    )
    fixed = [
        {k: np.sin(37 * np.asarray(x) + i) ** 5 for k, x in stacked.items()}
        for i in range(5)
    ]
    params, state = run(
        tx,
        stacked,
        5,
        lambda _, step: jax.tree.map(lambda *x: jnp.asarray(np.stack(x))[step], *fixed),
    )
    adam = state[0]
    for name, param in params.items():
        matrices = stacked[name].shape[:-2] if param.ndim > 2 else ()
        for i in np.ndindex(matrices):
            expected, m, v = oracle(
                np.asarray(stacked[name])[i],
                [g[name][i] for g in fixed],
                lambda step: float(schedule(step)),
                **settings,
                decay=0.1 * decays[name],
                smallest=SMALLEST,
            )
            moved = np.abs(expected - np.asarray(stacked[name])[i]).max()
            np.testing.assert_allclose(
                np.asarray(param)[i], expected, rtol=0, atol=CORRECTION * moved
            )
            for moment, other, signed in ((adam.mu, m, True), (adam.nu, v, False)):
                mine = moment[name]
                if isinstance(mine, BlockwiseMoment):
                    mine = dequantize(mine, signed, 256)
                far = (
                    np.abs(np.asarray(mine)[i] - other)
                    > LAST_BITS * np.abs(other).max()
                )
                # One on a midpoint but for the last bit may take either value.
                assert far.mean() <= 1e-3


def test_the_tree_is_that_of_adamw_and_small_ones_have_its_numbers(stacked):
    ours = adamw_8bit(1e-2, weight_decay=0.1, smallest=10**6)
    theirs = run(optax.adamw(1e-2, weight_decay=0.1), stacked)
    same(run(ours, stacked), theirs, atol=GROWN)
    adam = adamw_8bit(1e-2, smallest=SMALLEST).init(stacked)[0]
    for moments in (adam.mu, adam.nu):
        small = {k for k, x in moments.items() if not isinstance(x, BlockwiseMoment)}
        assert small == {"c"}
        assert all(
            moments[k].codes.shape == stacked[k].shape for k in stacked.keys() - small
        )


def test_the_first_step_is_adamw_since_it_is_applied_before_rounding(stacked):
    ours, theirs = (
        run(tx, stacked, 1)[0]
        for tx in (adamw_8bit(1e-2, smallest=0), optax.adamw(1e-2))
    )
    same(ours, theirs, atol=LAST_BITS)


def test_the_state_takes_two_bytes_a_parameter_and_a_bit():
    params = {"lora_a": jnp.zeros((4, 512, 16)), "lora_b": jnp.zeros((4, 16, 1024))}
    count = sum(x.size for x in params.values())
    sizes = [
        sum(x.nbytes for x in jax.tree.leaves(tx.init(params)) if x.ndim)
        for tx in (adamw_8bit(1e-3), optax.adamw(1e-3))
    ]
    assert sizes == [count * (2 + 2 * 4 / 256), count * 8]


def test_it_runs_in_a_scan_and_donates(stacked, plain):
    tx = adamw_8bit(1e-2, smallest=SMALLEST)

    def body(carry, step):
        params, state = carry
        updates, state = tx.update(gradients(params, step), state, params)
        return (optax.apply_updates(params, updates), state), None

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def scanned(params, state):
        return jax.lax.scan(body, (params, state), jnp.arange(3))[0]

    given = jax.tree.map(jnp.copy, stacked), tx.init(stacked)
    same(scanned(*given)[0], plain[0], atol=GROWN)
    assert all(x.is_deleted() for x in jax.tree.leaves(given))


def test_offload_moves_its_arrays_and_changes_no_number(stacked, plain):
    paged = run(offload(adamw_8bit(1e-2, smallest=SMALLEST)), stacked)
    same(paged, plain, atol=0)
    for x in jax.tree.leaves(paged[1]):
        assert (x.sharding.memory_kind == "pinned_host") == bool(x.ndim)


def test_a_step_that_is_not_finite_leaves_the_moments_as_they_were(stacked):
    tx = offload(dynamic_loss_scale(adamw_8bit(1e-2, smallest=SMALLEST)))
    update = jax.jit(tx.update)
    _, state = update(stacked, tx.init(stacked), stacked)
    bad = stacked | {"a": stacked["a"].at[0, 1, 2].set(jnp.nan)}
    updates, after = update(bad, state, stacked)
    assert not any(np.any(x) for x in tiny.arrays(updates))
    same(after.inner, state.inner, atol=0)
    assert int(after.skipped) == 1


def test_a_run_trains_saves_and_resumes_exactly(tmp_path):
    """The real step, two micro-batches a time; a loss of its own saves compiling a model."""
    model = tiny.adapted(tiny.decoder(), rank=8, targets="q_proj,down_proj")
    graphdef, lora, base = split(model)
    inner = offload(adamw_8bit(1e-2, weight_decay=0.01, smallest=SMALLEST))
    tx = optax.chain(optax.clip_by_global_norm(0.3), inner)

    def loss_fn(model, batch, key):
        adapter = jax.tree.leaves(nnx.state(model, nnx.LoRAParam))
        return jnp.sum(batch["weights"]) * sum(
            jnp.mean((x - 0.1) ** 2) for x in adapter
        )

    step = make_train_step(graphdef, tx, loss_fn=loss_fn)
    rows = tiny.batch((12, 7, 9, 12))
    batch = {name: jnp.asarray(x).reshape(2, 2, -1) for name, x in rows.items()}
    fresh = jax.tree.map(jnp.copy, lora)
    state = tx.init(lora)
    dtypes = {x.dtype.name for x in jax.tree.leaves(state)}
    assert dtypes == {"uint8", "float32", "int32"}
    checkpoints = RunCheckpoints(tmp_path / "checkpoints", keep=1)
    position = {"seed": 0, "objective": "loss_fn"}
    losses = []
    for i in range(6):
        if i == 3:
            checkpoints.save(TrainState(3, lora, state), position)
        lora, state, metrics = step(lora, base, state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0]
    restored = checkpoints.restore(TrainState(0, fresh, tx.init(fresh)), position)
    checkpoints.close()
    assert restored.step == 3
    again, resumed = restored.lora, restored.opt_state
    for loss in losses[3:]:
        again, resumed, metrics = step(again, base, resumed, batch)
        assert float(metrics["loss"]) == loss
    same((again, resumed), (lora, state), atol=0)


def test_a_regression_ends_where_float32_moments_end():
    """A low-rank regression to noisy targets, of inputs of scales from 1 to 1/100."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (512, 64)) * jnp.logspace(0, -2, 64)
    y = x @ jax.random.normal(keys[1], (64, 64)) / 8
    y += 0.1 * jax.random.normal(keys[2], y.shape)
    params = {
        "a": jax.random.normal(keys[3], (64, 16)) / 8,
        "b": jnp.zeros((16, 64)),
        "bias": jnp.zeros(64),
    }

    def loss(p):
        return jnp.mean((x @ p["a"] @ p["b"] + p["bias"] - y) ** 2)

    def trained(tx):
        def body(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        began = (params, tx.init(params))
        losses = jax.lax.scan(body, began, None, length=300)[1]
        return float(losses[0]), float(losses[-1])

    schedule = optax.cosine_decay_schedule(1e-2, 300)
    theirs = trained(optax.adamw(schedule))
    ours = trained(adamw_8bit(schedule, smallest=1024))
    assert theirs[1] < 0.4 * theirs[0]
    assert ours[1] == pytest.approx(theirs[1], rel=CONVERGED)


def test_a_second_moment_far_below_its_blocks_largest_is_lost():
    """The definition's limit, as the module says: gradients below 4e-4 of the largest."""
    grads = jnp.full((1, 256), 1e-3).at[0, :2].set(jnp.array([3e-4, 5e-4]) * 1e-3)
    grads = grads.at[0, 2].set(-1e-3)
    tx = adamw_8bit(1e-3, smallest=0)
    _, state = jax.jit(tx.update)(grads, tx.init(grads), grads)
    second = dequantize(state[0].nu, False, 256)
    assert float(second[0, 0]) == 0 < float(second[0, 1])
    first = dequantize(state[0].mu, True, 256)
    assert (np.asarray(first[0, :2]) > 0).all()
    # The signed map has 1 and no -1.
    assert float(first[0, 2]) == pytest.approx(-1e-4 * 0.99296875)


@pytest.mark.parametrize("setting", [{"block_size": 0}, {"smallest": -1}])
def test_sizes_that_mean_nothing_are_refused(setting):
    shown = {"block_size": 256, "smallest": 4096} | setting
    message = "block_size is {block_size} and smallest {smallest}, expected".format(
        **shown
    )
    with pytest.raises(ConfigError, match=message):
        adamw_8bit(1e-3, **setting)
