"""Distillation: the model is to have a teacher's probabilities, of which rows have the largest.

For each token, rows have the k tokens that the teacher has most probable there, with their
log-probabilities (`teacher_ids`, `teacher_logprobs`: (tokens, k)). All other tokens count as
one, which has what is left to 1 of the teacher's probabilities, and of the model's. The loss is
the Kullback-Leibler divergence KL(teacher || model) of these k + 1 probabilities. With k the
whole vocabulary it is that of TRL's GKDTrainer with beta 0.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.config.objective import ObjectiveConfig
from qlora_jax.data.fields import TEACHER_IDS, TEACHER_LOGPROBS
from qlora_jax.objectives.base import Batch, Metrics, Objective, of_hidden_states
from qlora_jax.objectives.logprobs import cross_entropy, next_tokens, top_logprobs

_NOTHING = 1e-6
"""A part of 1 that float32 probabilities leave, and that is no more, may be rounding alone."""


def make(config: ObjectiveConfig) -> Objective:
    """Returns the objective."""

    def loss(head: Any, hidden: Array, batch: Batch) -> tuple[Array, Metrics]:
        labels, weights = next_tokens(batch)
        ids, wanted = (
            jnp.roll(batch[name], -1, axis=1)
            for name in (TEACHER_IDS, TEACHER_LOGPROBS)
        )
        logps = top_logprobs(head, hidden, ids, config.temperature)
        kl = jnp.sum(weights * _divergence(wanted, logps))
        metrics: dict[str, Any] = {"kl": kl}
        total = kl
        if config.sft_weight:
            nll = cross_entropy(head, hidden, labels, weights)
            total, metrics["nll"] = kl + config.sft_weight * nll, nll
        return total, metrics

    return of_hidden_states(
        "distill",
        loss,
        needs=(TEACHER_IDS, TEACHER_LOGPROBS),
        packs=True,
        rows="teacher",
    )


def _divergence(
    wanted: Float[Array, "*tokens k"], logps: Float[Array, "*tokens k"]
) -> Float[Array, "*tokens"]:
    """Returns KL(wanted || logps) of each token; what is left to 1 counts as one more."""
    p = jnp.exp(wanted)
    among = jnp.sum(p * (wanted - logps), axis=-1)
    left, ours = (1 - jnp.sum(jnp.exp(x), axis=-1) for x in (wanted, logps))
    some = left > _NOTHING
    left, ours = jnp.where(some, left, 1), jnp.where(some, ours, 1)
    rest = left * (jnp.log(left) - jnp.log(jnp.maximum(ours, _NOTHING)))
    return among + rest
