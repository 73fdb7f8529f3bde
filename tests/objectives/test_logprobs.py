"""Chunked cross-entropy and log-probabilities against plain ones, value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.device import LOGITS_BYTES
from qlora_jax.nn import Linear, LoRA
from qlora_jax.objectives import cross_entropy, token_logprobs

BATCH, SEQ, HIDDEN, VOCAB = 3, 7, 32, 50
SUM_ORDER = 1e-5
"""Relative, float32: sums over chunks and over all tokens differ in order."""


def problem(dtype: str = "float32"):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (BATCH, SEQ, HIDDEN)).astype(dtype)
    labels = jax.random.randint(keys[1], (BATCH, SEQ), 0, VOCAB, jnp.int32)
    weights = jax.random.uniform(keys[2], (BATCH, SEQ)) * (labels % 3 > 0)
    head = Linear((0.3 * jax.random.normal(keys[3], (VOCAB, HIDDEN))).astype(dtype))
    return head, hidden, labels, weights


def with_lora(head: Linear) -> LoRA:
    lora = LoRA(head, rank=4, alpha=8.0, dropout=0.0, key=jax.random.key(1))
    drawn = 0.1 * jax.random.normal(jax.random.key(2), lora.lora_b[...].shape)
    lora.lora_b = nnx.LoRAParam(drawn)
    return lora


def plain(head, hidden, labels, weights):
    log_p = jax.nn.log_softmax(head(hidden).astype(jnp.float32))
    picked = jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
    return -jnp.sum(weights * picked)


def by_token(head, hidden, labels, weights):
    """A loss that is no weighted sum: each token's cotangent follows from its value."""
    logp = token_logprobs(head, hidden, labels)
    return jnp.sum(weights * (1 - jnp.exp(logp)) * logp)


def plain_by_token(head, hidden, labels, weights):
    log_p = jax.nn.log_softmax(head(hidden).astype(jnp.float32))
    logp = jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (1 - jnp.exp(logp)) * logp)


BOTH = pytest.mark.parametrize(
    ("chunked", "whole"),
    [(cross_entropy, plain), (by_token, plain_by_token)],
    ids=["cross_entropy", "token_logprobs"],
)


def value_and_grads(function, head, hidden, labels, weights):
    graphdef, lora, rest = nnx.split(head, nnx.LoRAParam, ...)

    def of(lora, hidden):
        # Scaled, so that the cotangent is not 1.
        return 0.37 * function(nnx.merge(graphdef, lora, rest), hidden, labels, weights)

    value, (d_lora, d_hidden) = jax.jit(jax.value_and_grad(of, argnums=(0, 1)))(
        lora, hidden
    )
    return float(value), [np.asarray(x) for x in (*jax.tree.leaves(d_lora), d_hidden)]


@pytest.fixture(params=[1, 2, 5, 21], ids="{} chunks".format)
def chunks(request, monkeypatch) -> int:
    # Tokens (21) do not divide evenly into 2 or 5 chunks: the last is padded.
    size = -(-BATCH * SEQ // request.param)
    monkeypatch.setitem(LOGITS_BYTES, "cpu", 4 * VOCAB * size)
    return request.param


@BOTH
@pytest.mark.parametrize("lora", [False, True], ids=["plain head", "lora on the head"])
def test_value_and_gradients_are_those_of_log_softmax(chunks, lora, chunked, whole):
    head, *rest = problem()
    head = with_lora(head) if lora else head
    value, grads = value_and_grads(chunked, head, *rest)
    wanted, wanted_grads = value_and_grads(whole, head, *rest)
    assert value == pytest.approx(wanted, rel=SUM_ORDER)
    assert len(grads) == (3 if lora else 1)
    for have, want in zip(grads, wanted_grads, strict=True):
        atol = SUM_ORDER * np.abs(want).max()
        np.testing.assert_allclose(have, want, atol=atol, rtol=SUM_ORDER)


@pytest.mark.parametrize("loss", [cross_entropy, by_token])
def test_the_logits_of_one_chunk_are_all_that_is_alive(monkeypatch, loss):
    monkeypatch.setitem(LOGITS_BYTES, "cpu", 4 * VOCAB * 5)
    head, hidden, labels, weights = problem()
    jaxpr = str(
        jax.make_jaxpr(jax.grad(loss, argnums=1))(head, hidden, labels, weights)
    )
    assert f"f32[5,{VOCAB}]" in jaxpr
    assert f"f32[{BATCH},{SEQ},{VOCAB}]" not in jaxpr
    assert f"f32[{BATCH * SEQ},{VOCAB}]" not in jaxpr


@BOTH
def test_bfloat16_hidden_states_keep_a_float32_sum(chunked, whole):
    head, hidden, labels, weights = problem("bfloat16")
    value, (d_hidden,) = value_and_grads(chunked, head, hidden, labels, weights)
    wanted, (d_wanted,) = value_and_grads(whole, head, hidden, labels, weights)
    assert d_hidden.dtype == jnp.bfloat16
    assert value == pytest.approx(wanted, rel=SUM_ORDER)
    # Two roundings to bfloat16 (of d_logits and of the result), 2**-8 each.
    atol = 2**-6 * np.abs(d_wanted.astype(np.float32)).max()
    np.testing.assert_allclose(
        d_hidden.astype(np.float32), d_wanted.astype(np.float32), atol=atol, rtol=0
    )


def test_positions_of_weight_zero_have_no_part(chunks):
    head, hidden, labels, weights = problem()
    weights = weights.at[:, -2:].set(0)
    value = float(cross_entropy(head, hidden, labels, weights))
    changed = hidden.at[:, -2:].add(100.0), labels.at[:, -2:].set(0)
    assert float(cross_entropy(head, *changed, weights)) == pytest.approx(
        value, rel=1e-6
    )
