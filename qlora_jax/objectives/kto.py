"""KTO: good answers become more probable than the reference has them, bad ones less so.

What counts is by how much more than other answers do, which is estimated on answers to other
prompts: row 2i + 1 of a batch is row 2i's prompt with another row's answer. As in TRL's
KTOTrainer, the estimate is that of a micro-batch. `label` is 1 for a good answer, 0 for a bad
one. Source: arXiv 2402.01306.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qlora_jax.adapters.attach import join, split
from qlora_jax.config.objective import ObjectiveConfig
from qlora_jax.config.train import Checkpoint
from qlora_jax.data.fields import LABEL, REFERENCE
from qlora_jax.objectives.answers import (
    answers_of,
    chosen,
    count_pairs,
    present,
    reference_logps,
    rejected,
)
from qlora_jax.objectives.base import Batch, Metrics, Objective


def make(config: ObjectiveConfig) -> Objective:
    """Returns the objective."""
    beta = config.strength
    weight_of = (config.undesirable_weight, config.desirable_weight)

    def loss(
        model: Any, batch: Batch, key: Array | None, checkpoint: Checkpoint
    ) -> tuple[Array, Metrics]:
        own = {name: chosen(x) for name, x in batch.items() if name != REFERENCE}
        hidden = model.hidden_states(own["tokens"], key=key, checkpoint=checkpoint)
        answers = answers_of(model.head, hidden, own)
        reference = reference_logps(model, batch)
        ratios = answers.logps - chosen(reference)
        there = present(own["weights"])
        kl = _kl(model, batch, rejected(reference))
        good = own[LABEL]
        gain = jnp.where(good > 0, ratios - kl, kl - ratios)
        weights = there * jnp.where(good > 0, weight_of[1], weight_of[0])
        total = jnp.sum(weights * (1 - jax.nn.sigmoid(beta * gain)))
        return total, _metrics(beta * ratios, answers.logps, good, there, kl)

    return Objective(
        name="kto",
        loss=loss,
        needs=(LABEL, *((REFERENCE,) if config.precompute_reference else ())),
        normalizer=count_pairs,
        rows="judged",
    )


def _kl(model: Any, batch: Batch, reference: Array) -> Array:
    """Returns how much more probable the model makes answers to other prompts, at least 0."""
    graphdef, lora, base = split(model)
    fixed = join(graphdef, jax.lax.stop_gradient(lora), base)
    others = {name: rejected(batch[name]) for name in ("tokens", "weights")}
    hidden = fixed.hidden_states(others["tokens"])
    logps = answers_of(fixed.head, hidden, others).logps
    there = present(others["weights"])
    total = jnp.sum(there * (logps - reference)) / jnp.maximum(jnp.sum(there), 1)
    return jax.lax.stop_gradient(jnp.maximum(total, 0))


def _metrics(
    rewards: Array, logps: Array, good: Array, there: Array, kl: Array
) -> Metrics:
    """Returns what is measured: means over good and over bad answers, and the estimate."""
    found: dict[str, Any] = {"kl": kl * jnp.sum(there)}
    for name, of in (("chosen", there * (good > 0)), ("rejected", there * (good <= 0))):
        found[f"rewards_{name}"] = jnp.sum(of * rewards), jnp.sum(of)
        found[f"logps_{name}"] = jnp.sum(of * logps), jnp.sum(of)
    return found
