"""Objectives on whole answers share these: log-probabilities, pairs, and the reference."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from qlora_jax.adapters.attach import detach
from qlora_jax.config.objective import ObjectiveConfig
from qlora_jax.data.fields import PROMPT_WEIGHTS, REFERENCE
from qlora_jax.errors import ConfigError
from qlora_jax.objectives.base import Batch, Metrics
from qlora_jax.objectives.logprobs import next_tokens, token_logprobs

PAIRS_A_TOKEN = "pairs_a_token"
"""The name in a batch of its pairs by the tokens of their chosen answers."""


class Answers(NamedTuple):
    """The answers of a batch's rows, float32 (rows,).

    Attributes:
      logps: The sum of the log-probabilities of the tokens that count.
      tokens: The number of those.
    """

    logps: Float[Array, " rows"]
    tokens: Float[Array, " rows"]

    @property
    def means(self) -> Float[Array, " rows"]:
        """Log-probabilities a token; 0 of a row that has none."""
        return self.logps / jnp.maximum(self.tokens, 1)


def answers_of(head: Any, hidden: Array, batch: Batch) -> Answers:
    """Returns the answers that a model's hidden states give to a 2-D batch."""
    labels, weights = next_tokens(batch)
    logps = token_logprobs(head, hidden, labels)
    return Answers(jnp.sum(weights * logps, axis=1), jnp.sum(weights, axis=1))


def reference_logps(model: Any, batch: Batch) -> Float[Array, " rows"]:
    """Returns the log-probabilities of the answers by the base without its adapter.

    They are those that the batch has, where they were computed beforehand.

    Raises:
      AdapterMismatchError: something of the base trains in place.
      ConfigError: what runs the model sees to it that its tokens go through once.
    """
    if REFERENCE in batch:
        return batch[REFERENCE]
    if not isinstance(model, nnx.Module):
        raise ConfigError(
            "the reference needs a pass of its own in each step, and a step whose routers are "
            "balanced (--train.router-aux-loss) has one; compute it beforehand with "
            "--objective.precompute-reference"
        )
    base: Any = detach(model)
    hidden = base.hidden_states(batch["tokens"])
    return lax.stop_gradient(answers_of(base.head, hidden, batch).logps)


def with_sft(
    config: ObjectiveConfig, answers: Answers, batch: Batch, metrics: dict[str, Any]
) -> Array | float:
    """Returns what sft_weight adds to a sum of losses over pairs, and puts `nll` into metrics.

    Args:
      config: With sft_weight; 0 adds nothing.
      answers: Those of the batch's rows.
      batch: A 2-D batch of pairs, which knows of the whole batch what `pairs_a_token` says.
      metrics: The objective's, in which nll is the cross-entropy of a chosen answer's token.
    """
    if not config.sft_weight:
        return 0.0
    nll = -jnp.sum(chosen(answers.logps))
    metrics["nll"] = nll, jnp.sum(chosen(answers.tokens))
    return config.sft_weight * pairs_a_token(batch)[PAIRS_A_TOKEN] * nll


def present(weights: Float[Array, "*axes rows seq"]) -> Float[Array, "*axes rows"]:
    """Returns 1 for each row that has something to learn, 0 for those that fill a batch."""
    return jnp.any(weights[..., 1:] > 0, axis=-1).astype(jnp.float32)


def chosen(x: Array, axis: int = 0) -> Array:
    """Returns what belongs to the chosen answers of pairs."""
    return lax.slice_in_dim(x, 0, None, 2, axis)


def rejected(x: Array, axis: int = 0) -> Array:
    """Returns what belongs to the rejected answers of pairs."""
    return lax.slice_in_dim(x, 1, None, 2, axis)


def count_pairs(batch: Batch) -> Float[Array, ""]:
    """Returns the number of pairs in a batch, those that fill it left out."""
    return jnp.sum(present(chosen(batch["weights"], batch["weights"].ndim - 2)))


def pairs_a_token(batch: Batch, *, prompts: bool = False) -> dict[str, Array]:
    """Returns the factor that makes a sum over tokens of chosen answers one over pairs.

    A step divides by the number of pairs, and a cross-entropy is a mean over tokens: of the
    whole batch, however it is divided into micro-batches.

    Args:
      batch: A whole batch, 2-D or 3-D.
      prompts: Whether tokens of prompts count where the batch has weights for them.
    """
    if PAIRS_A_TOKEN in batch:
        return {PAIRS_A_TOKEN: batch[PAIRS_A_TOKEN]}
    weights = learnt(batch) if prompts else batch["weights"]
    tokens = jnp.sum(chosen(weights, weights.ndim - 2)[..., 1:])
    return {PAIRS_A_TOKEN: count_pairs(batch) / jnp.maximum(tokens, 1)}


def learnt(batch: Batch) -> Array:
    """Returns the weights of a cross-entropy: of answers, and of prompts where they train."""
    return batch["weights"] + batch.get(PROMPT_WEIGHTS, 0)


def of_pairs(rewards: Array, answers: Answers, there: Array) -> Metrics:
    """Returns what is measured of pairs.

    Args:
      rewards: What the objective makes larger of chosen than of rejected answers, (rows,).
      answers: The answers.
      there: 1 for each pair, 0 for those that fill the batch.
    """
    good, bad = chosen(rewards), rejected(rewards)
    found = {
        "rewards_chosen": good,
        "rewards_rejected": bad,
        "rewards_margins": good - bad,
        "rewards_accuracies": good > bad,
        "logps_chosen": chosen(answers.logps),
        "logps_rejected": rejected(answers.logps),
    }
    return {name: jnp.sum(there * x) for name, x in found.items()}


def smoothed(margin: Array, smoothing: float) -> Array:
    """Returns -log sigmoid(margin), as if so many of the pairs were the other way round."""
    return -(1 - smoothing) * jax.nn.log_sigmoid(
        margin
    ) - smoothing * jax.nn.log_sigmoid(-margin)
