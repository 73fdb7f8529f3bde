"""TrainConfig: every wrong value names its flag; the schedules' ends; steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from qlora_jax.config.train import TrainConfig
from qlora_jax.errors import ConfigError
from qlora_jax.optim import LossScaleState
from qlora_jax.train.optimizer import make_optimizer, make_schedule

NAN = float("nan")


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("max_steps", 0, "--train.max-steps is 0, expected at least 1"),
        ("micro_batch", 0, "--train.micro-batch is 0"),
        ("grad_accum", -2, "--train.grad-accum is -2"),
        ("eval_every", 0, "--train.eval-every is 0"),
        ("save_every", 0, "--train.save-every is 0"),
        ("keep_checkpoints", 0, "--train.keep-checkpoints is 0"),
        ("learning_rate", 0.0, "--train.learning-rate is 0.0, expected > 0"),
        ("learning_rate", NAN, "--train.learning-rate is nan"),
        ("learning_rate", float("inf"), "--train.learning-rate is inf"),
        ("epochs", -1.0, "--train.epochs is -1.0"),
        ("warmup_ratio", 1.0, "--train.warmup-ratio is 1.0, expected 0 <= x < 1"),
        ("beta1", 1.0, "--train.beta1 is 1.0"),
        ("beta2", -0.1, "--train.beta2 is -0.1"),
        ("max_grad_norm", 0.0, "--train.max-grad-norm is 0.0, expected > 0"),
        ("weight_decay", -0.1, "--train.weight-decay is -0.1"),
        ("weight_decay", NAN, "--train.weight-decay is nan"),
        ("router_aux_loss", -1.0, "--train.router-aux-loss is -1.0"),
        ("seed", -1, "--train.seed is -1"),
        ("seed", 2**63, "--train.seed is 9223372036854775808, expected less than"),
        ("save_minutes", 0.0, "--train.save-minutes is 0.0, expected > 0"),
        ("max_skipped", 0, "--train.max-skipped is 0"),
    ],
)
def test_a_wrong_value_names_its_flag(field, value, flag):
    with pytest.raises(ConfigError, match=flag):
        TrainConfig(**{field: value})


def test_all_wrong_values_come_at_once():
    with pytest.raises(ConfigError, match=r"micro-batch.*learning-rate.*beta2"):
        TrainConfig(micro_batch=0, learning_rate=-1.0, beta2=2.0)


def rates(steps: int = 100, **config) -> np.ndarray:
    schedule = make_schedule(TrainConfig(learning_rate=1e-3, **config), steps)
    return np.array([float(schedule(step)) for step in range(steps)])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_rises_to_its_peak_over_the_warm_up(schedule):
    rate = rates(schedule=schedule, warmup_ratio=0.1)
    np.testing.assert_allclose(rate[:10], 1e-4 * np.arange(1, 11), rtol=1e-5)
    assert rate[10] == pytest.approx(1e-3, rel=1e-5)
    assert rate.max() == pytest.approx(1e-3, rel=1e-5)


def test_constant_stays():
    np.testing.assert_allclose(rates(warmup_ratio=0.0), 1e-3, rtol=1e-6)


def test_linear_ends_one_step_above_zero():
    rate = rates(schedule="linear", warmup_ratio=0.1)
    np.testing.assert_allclose(rate[10:], 1e-3 * (1 - np.arange(90) / 90), rtol=1e-4)


def test_cosine_ends_near_zero_and_is_half_in_the_middle():
    rate = rates(schedule="cosine", warmup_ratio=0.0)
    assert rate[0] == pytest.approx(1e-3)
    assert rate[50] == pytest.approx(5e-4, rel=1e-4)
    assert 0 < rate[-1] < 1e-6
    assert np.all(np.diff(rate) < 0)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.9])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_have_a_learning_rate_in_every_step(schedule, warmup_ratio, steps):
    rate = rates(steps, schedule=schedule, warmup_ratio=warmup_ratio)
    assert np.all((rate > 0) & (rate <= 1.0001e-3))


@pytest.mark.parametrize(
    ("config", "rows", "steps"),
    [
        ({"max_steps": 7, "epochs": 5.0}, 1000, 7),
        ({"epochs": 1.0}, 160, 10),
        ({"epochs": 1.0}, 161, 11),  # the last wraps around
        ({"epochs": 2.5}, 160, 25),
        ({"epochs": 0.01}, 16, 1),
    ],
)
def test_steps_from_max_steps_or_epochs(config, rows, steps):
    config = TrainConfig(micro_batch=4, grad_accum=4, **config)
    batches = tiny.rows([3] * rows).batches(
        documents=16, micro_batch=4, seed=0, packing="drawn"
    )
    assert config.steps(batches.steps) == steps


def update_norm(gradient: float, **config) -> float:
    tx = make_optimizer(TrainConfig(warmup_ratio=0.0, learning_rate=1.0, **config), 10)
    params = {"w": np.ones(4, np.float32)}
    state = tx.init(params)
    grads = {"w": np.full(4, gradient, np.float32)}
    if isinstance(state, LossScaleState):
        grads = jax.tree.map(lambda g: g * state.scale, grads)
    return float(optax.tree.norm(tx.update(grads, state, params)[0]))


def test_weight_decay_is_decoupled():
    # Of a zero gradient AdamW's own update is zero; what is left is decay * param.
    assert update_norm(0.0) == 0
    assert update_norm(0.0, weight_decay=0.1) == pytest.approx(0.2)
    assert update_norm(0.0, weight_decay=0.1, compute_dtype="float16") == pytest.approx(
        0.2
    )


def test_gradients_are_clipped_to_their_global_norm():
    def first_moment(**config) -> float:
        tx = make_optimizer(TrainConfig(**config), 10)
        params = {"w": np.ones(4, np.float32)}
        grads = {"w": np.full(4, 5.0, np.float32)}  # of norm 10
        state = tx.update(grads, tx.init(params), params)[1]
        return float(optax.tree.norm(optax.tree.get(state, "mu")))

    assert first_moment(max_grad_norm=0.3) == pytest.approx(0.1 * 0.3, rel=1e-5)
    assert first_moment(max_grad_norm=None) == pytest.approx(0.1 * 10, rel=1e-5)


def test_float16_scales_the_loss_and_offload_rests_on_the_host():
    params = {"w": np.ones(4, np.float32)}
    state = make_optimizer(TrainConfig(compute_dtype="float16", offload=True), 10).init(
        params
    )
    assert isinstance(state, LossScaleState)
    mu = optax.tree.get(state, "mu")["w"]
    assert mu.sharding.memory_kind == "pinned_host"
    assert not isinstance(
        make_optimizer(TrainConfig(), 10).init(params), LossScaleState
    )


def test_moments_rest_in_8_bits_where_asked_for():
    params = {"w": jnp.ones((64, 64)), "small": jnp.ones(4)}
    state = make_optimizer(TrainConfig(optimizer="adamw8bit"), 10).init(params)
    mu = optax.tree.get(state, "mu")
    assert mu["w"].codes.dtype == np.uint8 and mu["small"].dtype == np.float32


def test_what_fits_of_the_state_stays_on_the_device():
    params = {"w": jnp.ones((64, 64)), "small": jnp.ones(4)}
    config = TrainConfig(offload=True, resident_bytes=40)
    mu = optax.tree.get(make_optimizer(config, 10).init(params), "mu")
    kinds = {name: x.sharding.memory_kind for name, x in mu.items()}
    assert kinds["w"] == "pinned_host" != kinds["small"]
