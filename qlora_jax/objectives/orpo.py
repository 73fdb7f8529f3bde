"""ORPO: the cross-entropy of chosen answers, and the odds that they are given and not the
rejected ones.

There is no reference. Source: arXiv 2403.07691; TRL's ORPOTrainer, whose cross-entropy counts
the prompt too, as this one does with --data.train-on-prompt.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qlora_jax.config.objective import ObjectiveConfig
from qlora_jax.objectives.answers import (
    PAIRS_A_TOKEN,
    Answers,
    chosen,
    count_pairs,
    learnt,
    of_pairs,
    pairs_a_token,
    present,
    rejected,
)
from qlora_jax.objectives.base import Batch, Metrics, Objective, of_hidden_states
from qlora_jax.objectives.logprobs import next_tokens, token_logprobs

_PER_TOKEN = functools.partial(pairs_a_token, prompts=True)


def make(config: ObjectiveConfig) -> Objective:
    """Returns the objective."""
    beta = config.strength

    def loss(head: Any, hidden: Array, batch: Batch) -> tuple[Array, Metrics]:
        labels, weights = next_tokens(batch)
        logps = token_logprobs(head, hidden, labels)
        answers = Answers(jnp.sum(weights * logps, axis=1), jnp.sum(weights, axis=1))
        there = present(chosen(batch["weights"]))
        # What fills a batch has no odds.
        means = jnp.where(jnp.repeat(there, 2) > 0, answers.means, -1.0)
        odds = means - _log1mexp(means)
        ratio = jax.nn.log_sigmoid(chosen(odds) - rejected(odds))
        _, counted = next_tokens({**batch, "weights": learnt(batch)})
        nll = -jnp.sum(chosen(counted * logps))
        total = nll * _PER_TOKEN(batch)[PAIRS_A_TOKEN] - beta * jnp.sum(there * ratio)
        return total, {
            **of_pairs(beta * means, answers._replace(logps=means), there),
            "log_odds_chosen": jnp.sum(there * (chosen(odds) - rejected(odds))),
            "nll": (nll, jnp.sum(chosen(counted))),
        }

    return of_hidden_states(
        "orpo", loss, normalizer=count_pairs, rows="pairs", whole=_PER_TOKEN
    )


def _log1mexp(x: Array) -> Array:
    """Returns log(1 - exp(x)) of x < 0, accurate near 0 and far from it."""
    x = jnp.minimum(x, -1e-7)  # a probability of 1 has no finite odds
    near = x > -0.6931472
    return jnp.where(
        near,
        jnp.log(-jnp.expm1(jnp.where(near, x, -0.5))),
        jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))),
    )
