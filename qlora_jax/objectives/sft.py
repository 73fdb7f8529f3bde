"""Supervised fine-tuning: the cross-entropy of each token given those before it."""

from typing import Any

from jaxtyping import Array, Float

from qlora_jax.config.objective import ObjectiveConfig
from qlora_jax.objectives.base import Batch, Objective, of_hidden_states
from qlora_jax.objectives.logprobs import cross_entropy, next_tokens


def token_loss(
    head: Any,
    hidden: Float[Array, "batch seq hidden"],
    batch: Batch,
    label_smoothing: float = 0.0,
) -> Float[Array, ""]:
    """Returns the weighted sum of -log p(next token), float32, of what a head makes."""
    return cross_entropy(
        head, hidden, *next_tokens(batch), label_smoothing=label_smoothing
    )


def make(config: ObjectiveConfig) -> Objective:
    """Returns the objective; with label_smoothing, so much of each token's probability is
    expected of all tokens alike."""

    def loss(head: Any, hidden: Array, batch: Batch) -> tuple[Array, dict]:
        return token_loss(head, hidden, batch, config.label_smoothing), {}

    return of_hidden_states("sft", loss, packs=True)


SFT = make(ObjectiveConfig())
"""What `qlora train` minimizes unless it is told otherwise."""
