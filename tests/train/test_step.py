"""The train step: accumulation, masks, dropout, loss scaling, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from qlora_jax.adapters import join, split
from qlora_jax.optim import dynamic_loss_scale, offload
from qlora_jax.train import make_train_step
from qlora_jax.train.step import make_eval_step

LENGTHS = (20, 5, 13, 9, 17, 4, 11, 20)
"""Unequal, so that a mean of means would not be the mean."""
SUM_ORDER = 2e-6


@pytest.fixture(scope="module")
def parts():
    return split(tiny.adapted(tiny.quantized(), dropout=0.2))


@pytest.fixture(scope="module")
def sgd_step(parts):
    """A step whose update is minus the gradient."""
    return make_train_step(parts[0], optax.sgd(1.0))


@pytest.fixture(scope="module")
def batch():
    rows = tiny.batch(LENGTHS)
    return {name: jnp.asarray(x) for name, x in rows.items()}


def take(step, parts, batch, key=None):
    """Returns the metrics and the gradient of one SGD step."""
    _, lora, base = parts
    copy = jax.tree.map(jnp.copy, lora)
    after, _, metrics = step(copy, base, optax.sgd(1.0).init(copy), batch, key)
    grads = jax.tree.map(lambda before, after: before - after, lora, after)
    return {name: float(x) for name, x in metrics.items()}, tiny.arrays(grads)


def test_micro_batches_weighted_by_tokens_equal_one_big_batch(parts, sgd_step, batch):
    micro = {name: x.reshape(4, 2, -1) for name, x in batch.items()}
    counts = micro["weights"][:, :, 1:].sum((1, 2))
    assert len(set(counts.tolist())) > 1
    big, big_grads = take(sgd_step, parts, batch)
    small, small_grads = take(sgd_step, parts, micro)
    assert small["tokens"] == big["tokens"] == counts.sum()
    assert small["loss"] == pytest.approx(big["loss"], rel=SUM_ORDER)
    assert small["grad_norm"] == pytest.approx(big["grad_norm"], rel=1e-4)
    for one, other in zip(small_grads, big_grads, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max(), rtol=0)


def test_loss_and_gradient_norm_are_those_of_plain_autodiff(parts, sgd_step, batch):
    graphdef, lora, base = parts

    def mean_nll(lora):
        log_p = jax.nn.log_softmax(join(graphdef, lora, base)(batch["tokens"]))
        picked = jnp.take_along_axis(
            log_p[:, :-1], batch["tokens"][:, 1:, None], axis=2
        )
        weights = batch["weights"][:, 1:]
        return -jnp.sum(picked[..., 0] * weights) / weights.sum()

    loss, grads = jax.jit(jax.value_and_grad(mean_nll))(lora)
    metrics, stepped = take(sgd_step, parts, batch)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(
        float(optax.tree.norm(grads)), rel=1e-4
    )
    for have, want in zip(stepped, tiny.arrays(grads), strict=True):
        np.testing.assert_allclose(have, want, atol=5e-5 * np.abs(want).max(), rtol=0)


@pytest.mark.slow
def test_checkpointed_layers_give_the_same_loss_and_gradient(parts, sgd_step, batch):
    layered = make_train_step(parts[0], optax.sgd(1.0), checkpoint="layer")
    key = jax.random.key(4)
    plain, grads = take(sgd_step, parts, batch, key)
    again, again_grads = take(layered, parts, batch, key)
    assert again["loss"] == pytest.approx(plain["loss"], rel=SUM_ORDER)
    for one, other in zip(again_grads, grads, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max(), rtol=0)


def test_tokens_of_weight_zero_are_not_learnt(parts, sgd_step, batch):
    weights = batch["weights"].at[:, 10:].set(0)
    tokens = batch["tokens"].at[:, 10:].set(7)  # behind everything that counts
    kept, _ = take(sgd_step, parts, {"tokens": batch["tokens"], "weights": weights})
    changed, _ = take(sgd_step, parts, {"tokens": tokens, "weights": weights})
    assert kept["tokens"] == weights[:, 1:].sum() > 0
    assert changed["loss"] == pytest.approx(kept["loss"], rel=1e-6)


def test_the_first_token_of_a_row_is_ignored(parts, sgd_step, batch):
    weights = batch["weights"].at[:, 0].set(5.0)
    one, _ = take(sgd_step, parts, batch)
    other, _ = take(sgd_step, parts, batch | {"weights": weights})
    assert other == one


def test_weights_weigh(parts, sgd_step, batch):
    plain, _ = take(sgd_step, parts, batch)
    double, _ = take(sgd_step, parts, batch | {"weights": 2 * batch["weights"]})
    assert double["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert double["tokens"] == 2 * plain["tokens"]


def test_a_batch_without_a_token_to_learn_is_no_division_by_zero(
    parts, sgd_step, batch
):
    metrics, grads = take(sgd_step, parts, batch | {"weights": 0 * batch["weights"]})
    assert metrics["loss"] == metrics["tokens"] == metrics["grad_norm"] == 0
    assert not any(np.any(g) for g in grads)


def test_dropout_follows_from_its_key(parts, sgd_step, batch):
    losses = [
        take(sgd_step, parts, batch, jax.random.key(seed))[0]["loss"]
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]
    assert take(sgd_step, parts, batch)[0]["loss"] not in losses


@pytest.mark.slow
def test_the_loss_falls(parts, batch):
    graphdef, lora, base = parts
    lora = jax.tree.map(jnp.copy, lora)
    tx = offload(optax.adamw(2e-2))
    step, state = make_train_step(graphdef, tx), tx.init(lora)
    losses = []
    for _ in range(40):
        donated = lora
        lora, state, metrics = step(lora, base, state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert all(x.is_deleted() for x in jax.tree.leaves(donated))
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(state) if x.ndim}
    assert kinds == {"pinned_host"}


@pytest.mark.slow
def test_float16_trains_with_loss_scaling(batch):
    graphdef, lora, base = split(tiny.adapted(tiny.quantized("float16")))
    tx = dynamic_loss_scale(optax.adamw(2e-2))
    state = tx.init(lora)
    state = state._replace(
        scale=jnp.float32(2.0**40)
    )  # far too high: overflows at first
    step = make_train_step(graphdef, tx)
    rows = []
    for _ in range(60):
        lora, state, metrics = step(lora, base, state, batch)
        rows.append({name: float(x) for name, x in metrics.items()})
    skipped = int(rows[-1]["skipped"])
    assert 0 < skipped < 30
    assert rows[-1]["loss_scale"] == 2.0 ** (40 - skipped)
    assert [row["loss"] for row in rows[:skipped]] == [rows[0]["loss"]] * skipped
    assert rows[0]["loss"] == pytest.approx(4.5, abs=4)  # unscaled
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert all(np.isfinite(x).all() for x in tiny.arrays(lora))


@pytest.mark.slow
def test_a_loss_function_of_ones_own(parts, batch):
    def squares(model, batch, key):
        hidden = model.hidden_states(batch["tokens"], key=key)
        return jnp.sum(batch["weights"][:, 1:] * jnp.sum(hidden[:, 1:] ** 2, -1))

    step = make_train_step(parts[0], optax.sgd(1.0), loss_fn=squares)
    metrics, grads = take(step, parts, batch)
    graphdef, lora, base = parts
    model = join(graphdef, lora, base)
    wanted = squares(model, batch, None) / batch["weights"][:, 1:].sum()
    assert metrics["loss"] == pytest.approx(float(wanted), rel=1e-5)
    # One step of SGD of rate 1 moved by the gradient of that function, no other.
    total = lambda lora: squares(join(graphdef, lora, base), batch, None)  # noqa: E731
    count = batch["weights"][:, 1:].sum()
    plain = jax.tree.map(lambda g: g / count, jax.jit(jax.grad(total))(lora))
    for one, other in zip(grads, tiny.arrays(plain), strict=True):
        largest = np.abs(other).max()
        assert largest > 0
        np.testing.assert_allclose(one, other, atol=1e-4 * largest, rtol=0)


def test_metrics_are_float32_scalars(parts, sgd_step, batch):
    _, lora, base = parts
    copy = jax.tree.map(jnp.copy, lora)
    *_, metrics = sgd_step(copy, base, optax.sgd(1.0).init(copy), batch, None)
    assert set(metrics) == {"loss", "grad_norm", "tokens"}
    assert all(x.shape == () and x.dtype == jnp.float32 for x in metrics.values())


def test_the_eval_step_sums_losses_and_weights(parts, sgd_step, batch):
    graphdef, lora, base = parts
    loss, tokens, metrics = make_eval_step(graphdef)(lora, base, batch)
    assert not metrics
    metrics, _ = take(sgd_step, parts, batch)
    assert float(tokens) == metrics["tokens"]
    assert float(loss / tokens) == pytest.approx(metrics["loss"], rel=SUM_ORDER)
