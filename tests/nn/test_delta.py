"""The gated delta rule and the state space in chunks against themselves token by token, in
numpy and float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.nn.delta import CHUNK, TOGETHER, Convolution, gated_delta_rule
from qlora_jax.nn.state_space import state_space

RTOL = 2e-5
"""The error allowed, relative to the largest value: the chunks compute in float32 and add in
another order. It was 3e-6 at most when this was written."""

rule: Any = jax.jit(gated_delta_rule)
RULES: dict[str, Any] = {"delta": rule, "space": jax.jit(state_space)}


@pytest.fixture(params=RULES)
def both(request) -> tuple[Any, Any]:
    """Either rule in chunks, and token by token."""
    return RULES[request.param], functools.partial(one_by_one, name=request.param)


def drawn(seq: int, seed: int = 0, heads: int = 4) -> Any:
    """Returns q, k, v, log_decay and rate of two key heads, with fast and slow decays."""
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, 2, seq, 2, 16))
    v = rng.standard_normal((2, seq, heads, 16))
    decay = -np.exp(rng.uniform(-6, 3, (2, seq, heads)))
    return [q, k, v, decay, rng.uniform(0, 1, (2, seq, heads))]


def one_by_one(q, k, v, decay, rate, positions, state=None, name="delta"):
    """Returns what a rule says, one token after another."""
    if name == "delta":
        q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
        q = q * q.shape[-1] ** -0.5
    q, k = (np.repeat(x, v.shape[2] // k.shape[2], 2) for x in (q, k))
    batch, seq, heads, values = v.shape
    s = np.zeros((batch, heads, k.shape[-1], values)) if state is None else state.copy()
    y = np.zeros(v.shape)
    for b, t in np.ndindex(batch, seq):
        if positions[b, t] < 0:
            continue
        if positions[b, t] == 0:
            s[b] = 0
        s[b] *= np.exp(decay[b, t])[:, None, None]
        new = v[b, t]
        if name == "delta":
            new = new - np.einsum("hkv,hk->hv", s[b], k[b, t])
        s[b] += k[b, t][..., None] * (rate[b, t][:, None] * new)[:, None]
        y[b, t] = np.einsum("hkv,hk->hv", s[b], q[b, t])
    return y, s


def close(got, want) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=RTOL * np.abs(want).max())


def single(arrays) -> list[jax.Array]:
    return [jnp.asarray(x, jnp.float32) for x in arrays]


# One token, less than a chunk, some chunks and a rest, more than one group of chunks.
@pytest.mark.parametrize("seq", [1, 5, 3 * CHUNK + 7, CHUNK * (TOGETHER + 2) + 1])
def test_chunks_are_the_rule_token_by_token(both, seq):
    rule, steps = both
    positions = np.tile(np.arange(seq), (2, 1))
    inputs = drawn(seq)
    got = rule(*single(inputs), positions)
    for a, b in zip(got, steps(*inputs, positions=positions), strict=True):
        close(a, b)


def test_keys_that_are_all_the_same_lose_nothing():
    """Each token then takes back all that the one before has written: powers of the matrix,
    by which it could be inverted too, have entries of 1e18."""
    q, k, v, decay, rate = drawn(CHUNK)
    k[:], decay[:], rate[:] = k[:1, :1], 0, 1
    positions = np.tile(np.arange(CHUNK), (2, 1))
    inputs = [q, k, v, decay, rate]
    got, state = rule(*single(inputs), positions)
    want, last = one_by_one(*inputs, positions=positions)
    close(got, want)
    close(state, last)


def test_no_solver_of_lapack_is_called():
    """jaxlib's waits for threads of its own pool, for ever where all of them wait."""
    positions = np.tile(np.arange(9), (2, 1))
    text = rule.lower(*single(drawn(9)), positions).as_text()
    assert "lapack" not in text and "trsm" not in text


def test_documents_of_one_row_do_not_see_each_other(both):
    """They begin inside of a chunk, at its first and last tokens; padding is passed by."""
    rule, steps = both
    seq = 4 * CHUNK
    starts = [0, 3, CHUNK - 1, CHUNK, 2 * CHUNK + 9, 3 * CHUNK - 1]
    positions = np.tile(np.arange(seq), (2, 1))
    for start in starts:
        positions[0, start:] = np.arange(seq - start)
    positions[1, :70] = -1
    positions[1, 70:] = np.arange(seq - 70)
    inputs = drawn(seq)
    got, state = rule(*single(inputs), positions)
    want, last = steps(*inputs, positions=positions)
    close(got[0], want[0])
    close(got[1, 70:], want[1, 70:])
    close(state, last)
    # Nothing of the documents before reaches the last one, whatever they hold.
    changed = [x.copy() for x in inputs]
    for x in changed[:3]:
        x[0, : starts[-1]] *= -2
    again, _ = rule(*single(changed), positions)
    np.testing.assert_array_equal(again[0, starts[-1] :], got[0, starts[-1] :])


def test_a_state_goes_on_where_it_was_left(both):
    rule, _ = both
    seq = 2 * CHUNK + 9
    inputs, positions = drawn(seq), np.tile(np.arange(seq), (2, 1))
    whole, last = rule(*single(inputs), positions)
    state, parts = None, []
    for part in (slice(0, CHUNK + 5), slice(CHUNK + 5, seq - 1), slice(seq - 1, seq)):
        xs = single(x[:, part] for x in inputs)
        y, state = rule(*xs, positions[:, part], state)
        parts.append(y)
    close(np.concatenate(parts, 1), whole)
    close(state, last)


def test_gradients_are_those_of_the_rule(both):
    """Against differences of the float64 rule along drawn directions, over several groups."""
    rule, steps = both
    seq = CHUNK * (TOGETHER + 1) + 3
    positions = np.tile(np.arange(seq), (2, 1))
    positions[0, 100:] = np.arange(seq - 100)
    inputs, rng = drawn(seq), np.random.default_rng(1)
    inputs[3] = np.maximum(inputs[3], -3)
    weight = rng.standard_normal(inputs[2].shape)

    def loss(*xs):
        y, _ = rule(*xs, positions)
        return jnp.sum(y * weight)

    grads = jax.jit(jax.grad(loss, argnums=range(5)))(*single(inputs))
    for i, grad in enumerate(grads):
        along = rng.standard_normal(inputs[i].shape)
        sides = []
        for step in (1e-5, -1e-5):
            moved = [x + step * along if i == j else x for j, x in enumerate(inputs)]
            sides.append((steps(*moved, positions=positions)[0] * weight).sum())
        want = (sides[0] - sides[1]) / 2e-5
        size = np.linalg.norm(grad) * np.linalg.norm(along) / np.sqrt(along.size)
        assert abs((np.asarray(grad) * along).sum() - want) <= 1e-3 * size


def test_memory_is_linear_in_the_number_of_tokens(both):
    """A state for each group of chunks and one group's work: not one for each token."""
    rule, _ = both

    def held(seq):
        def loss(*xs):
            positions = jnp.broadcast_to(jnp.arange(seq), (2, seq))
            return jnp.sum(rule(*xs, positions)[0])

        xs = single(drawn(seq))
        compiled = jax.jit(jax.grad(loss, argnums=range(5))).lower(*xs).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    tokens = CHUNK * TOGETHER
    state = 4 * 2 * 4 * 16 * 16
    assert held(4 * tokens) - held(2 * tokens) < 2 * tokens * state / 4


def test_a_convolution_reaches_over_no_beginning():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 20, 5)), rng.standard_normal((5, 1, 4))
    positions = np.tile(np.arange(20), (2, 1))
    positions[0, 7:] = np.arange(13)
    positions[1, :3] = -1
    positions[1, 3:] = np.arange(17)
    bias = rng.standard_normal(5)
    want = np.zeros(x.shape) + bias
    for b, t, back in np.ndindex(2, 20, 4):
        if positions[b, t] >= back:
            want[b, t] += x[b, t - back] * w[:, 0, 3 - back]
    conv = Convolution(*single([w, bias]))
    (x,), positions = single([x]), jnp.asarray(positions)
    got, _ = conv(x, positions)
    close(got[0], want[0])
    close(got[1, 3:], want[1, 3:])
    first, left = conv(x[:, :9], positions[:, :9])
    second, _ = conv(x[:, 9:], positions[:, 9:], left)
    np.testing.assert_array_equal(np.concatenate([first, second], 1), got)
