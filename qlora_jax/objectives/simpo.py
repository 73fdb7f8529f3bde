"""SimPO: the chosen answer's log-probability a token exceeds the rejected one's by a margin.

There is no reference. Source: arXiv 2405.14734; TRL's CPOTrainer with loss_type simpo.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from qlora_jax.config.objective import ObjectiveConfig
from qlora_jax.objectives.answers import (
    answers_of,
    chosen,
    count_pairs,
    of_pairs,
    pairs_a_token,
    present,
    rejected,
    smoothed,
    with_sft,
)
from qlora_jax.objectives.base import Batch, Metrics, Objective, of_hidden_states


def make(config: ObjectiveConfig) -> Objective:
    """Returns the objective."""
    beta = config.strength

    def loss(head: Any, hidden: Array, batch: Batch) -> tuple[Array, Metrics]:
        answers = answers_of(head, hidden, batch)
        rewards = beta * answers.means
        margin = chosen(rewards) - rejected(rewards) - config.gamma
        there = present(chosen(batch["weights"]))
        total = jnp.sum(there * smoothed(margin, config.label_smoothing))
        # As TRL's, log-probabilities are those of a token.
        means = answers._replace(logps=answers.means)
        metrics = dict(of_pairs(rewards, means, there))
        total += with_sft(config, answers, batch, metrics)
        return total, metrics

    return of_hidden_states(
        "simpo",
        loss,
        normalizer=count_pairs,
        rows="pairs",
        whole=pairs_a_token if config.sft_weight else None,
    )
