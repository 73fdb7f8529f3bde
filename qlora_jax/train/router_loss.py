"""The load-balance loss of a mixture's routers, beside an objective.

It is transformers' (router_aux_loss_coef): that of Switch Transformers over all tokens that
count and all layers with experts together, least where every expert has as many. A micro-batch
has a load of its own; a step's loss has the mean of theirs, each weighted as its part of the
objective's normalizer is. Routers are frozen: its gradient reaches the adapters through the
hidden states that routers see, and nothing else can balance them.

Padding does not count: of each row the tokens behind the last one that has a weight.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.config.train import Checkpoint
from qlora_jax.errors import ConfigError
from qlora_jax.nn.moe import load_balance_loss
from qlora_jax.objectives import Objective
from qlora_jax.objectives.base import Batch, Metrics, predicted

NAME = "router_aux_loss"


def balanced(objective: Objective, coefficient: float) -> Objective:
    """Returns an objective that minimizes another and, by a coefficient, the routers' loss.

    Its metrics have router_aux_loss besides, without the coefficient.

    Args:
      objective: One that runs the model's `hidden_states` once over a batch's tokens.
      coefficient: What the loss of the routers is multiplied by.

    Returns:
      The objective. Its call raises ConfigError where no layer has a router, or the
      tokens of the batch do not go through the model once.
    """

    def loss(
        model: Any, batch: Batch, key: Array | None, checkpoint: Checkpoint
    ) -> tuple[Array, Metrics]:
        watched = _Watched(model, batch)
        total, metrics = objective.loss(watched, batch, key, checkpoint)
        if len(watched.loads) != 1:
            raise ConfigError(
                f"objective {objective.name} runs the batch's tokens through the model's "
                f"hidden_states {len(watched.loads)} times, and {NAME} needs the load of "
                f"routers in one pass over them; set {NAME} to 0"
            )
        normalizer = _normalizers(objective, batch)
        tokens = jnp.sum(watched.counted, axis=(-2, -1))
        aux = load_balance_loss(watched.loads[0], tokens) * normalizer
        own = jnp.sum(aux), jnp.sum(normalizer)
        return total + coefficient * own[0], {**metrics, NAME: own}

    return dataclasses.replace(objective, loss=loss)


class _Watched:
    """A model, and the loads of its routers in each pass over a batch's own tokens."""

    def __init__(self, model: Any, batch: Mapping[str, Any]):
        self._model, self._tokens = model, batch["tokens"]
        self.counted = counted(batch["weights"])
        self.loads: list[Array] = []

    def hidden_states(self, tokens: Array, **options: Any) -> Array:
        """Returns the model's, and remembers the load."""
        if tokens is not self._tokens:
            return self._model.hidden_states(tokens, **options)
        hidden, load = self._model.routed(tokens, self.counted, **options)
        self.loads.append(load)
        return hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def counted(weights: Float[Array, "*micro seq"]) -> Float[Array, "*micro seq"]:
    """Returns 1 for each token of a row up to the last one that has a weight, and else 0."""
    weighted = (weights != 0).astype(jnp.float32)
    return jax.lax.cummax(weighted, axis=weights.ndim - 1, reverse=True)


def _normalizers(objective: Objective, batch: Batch) -> Array:
    """Returns the normalizer of each micro-batch."""
    one = objective.normalizer or predicted
    return one(batch) if batch["tokens"].ndim == 2 else jax.vmap(one)(dict(batch))
