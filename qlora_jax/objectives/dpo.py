"""DPO: chosen answers become more probable than rejected ones, against a reference.

The reference is the base without its adapter. Source: arXiv 2305.18290; ipo 2310.12036, hinge
2305.10425, robust 2403.00409. Losses and their names are those of TRL's DPOTrainer.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qlora_jax.config.objective import ObjectiveConfig
from qlora_jax.config.train import Checkpoint
from qlora_jax.data.fields import REFERENCE
from qlora_jax.objectives.answers import (
    Answers,
    answers_of,
    chosen,
    count_pairs,
    of_pairs,
    pairs_a_token,
    present,
    reference_logps,
    rejected,
    smoothed,
    with_sft,
)
from qlora_jax.objectives.base import Batch, Metrics, Objective


def make(config: ObjectiveConfig) -> Objective:
    """Returns the objective."""

    def loss(
        model: Any, batch: Batch, key: Array | None, checkpoint: Checkpoint
    ) -> tuple[Array, Metrics]:
        hidden = model.hidden_states(batch["tokens"], key=key, checkpoint=checkpoint)
        answers = answers_of(model.head, hidden, batch)
        ratios = answers.logps - reference_logps(model, batch)
        there = present(chosen(batch["weights"]))
        total = jnp.sum(there * _of_pair(config, ratios, answers))
        metrics = dict(of_pairs(config.strength * ratios, answers, there))
        total += with_sft(config, answers, batch, metrics)
        return total, metrics

    return Objective(
        name="dpo",
        loss=loss,
        needs=(REFERENCE,) if config.precompute_reference else (),
        normalizer=count_pairs,
        rows="pairs",
        whole=pairs_a_token if config.sft_weight else None,
    )


def _of_pair(config: ObjectiveConfig, ratios: Array, answers: Answers) -> Array:
    """Returns the loss of each pair; `ratios` are of rows, in log-probability."""
    beta, smoothing = config.strength, config.label_smoothing
    if config.loss in ("ipo", "sigmoid_norm"):
        ratios = ratios / jnp.maximum(answers.tokens, 1)
    margin = chosen(ratios) - rejected(ratios)
    if config.loss == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    if config.loss == "hinge":
        return jax.nn.relu(1 - beta * margin)
    if config.loss == "robust":
        right, wrong = (smoothed(x, 0.0) for x in (beta * margin, -beta * margin))
        return ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
    return smoothed(beta * margin, smoothing)
