"""Supervised fine-tuning: the cross-entropy of each token given those before it."""

from typing import Any

from jaxtyping import Array, Float

from qlora_jax.objectives.base import Batch, of_hidden_states
from qlora_jax.objectives.logprobs import cross_entropy, next_tokens


def token_loss(
    head: Any, hidden: Float[Array, "batch seq hidden"], batch: Batch
) -> Float[Array, ""]:
    """Returns the weighted sum of -log p(next token), float32, of what a head makes."""
    return cross_entropy(head, hidden, *next_tokens(batch))


SFT = of_hidden_states(
    "sft",
    lambda head, hidden, batch: (token_loss(head, hidden, batch), {}),
    packs=True,
)
"""What `qlora train` minimizes unless it is told otherwise."""
