"""Objective: what training minimizes, as a value.

The train step knows nothing of what a loss is. It gives an objective the model and rows,
gets a sum of losses back, and divides by a normalizer of the whole batch, so that the loss
and gradient of accumulated micro-batches are those of one big batch.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qlora_jax.config.objective import Rows
from qlora_jax.config.train import Checkpoint
from qlora_jax.errors import ConfigError, gathered
from qlora_jax.nn.documents import places_of

Batch = Mapping[str, Any]
"""tokens: int32 (batch, seq), or (micro, batch, seq) of micro-batches; padding right.
weights: float32 of the same shape: what predicting each token counts; the first of a
document has nothing to predict it and is ignored. positions, segment_ids: int32 of the same
shape, where rows hold several documents: see `Decoder.hidden_states`. What else there is has
the same leading axes."""

Metrics = Mapping[str, Any]
"""What is measured beside the loss, by name: a scalar, the sum over the rows, which the
step divides by the objective's normalizer; or a pair, such a sum and its own normalizer."""

Loss = Callable[[Any, Batch, Array | None, Checkpoint], tuple[Array, Metrics]]
"""(model, batch, dropout key, checkpoint) -> (sum of losses over the rows, metrics)."""

HeadLoss = Callable[[Any, Array, Batch], tuple[Array, Metrics]]
"""(head, hidden states, batch) -> (sum of losses over the rows, metrics)."""

DOCUMENTS = ("positions", "segment_ids")
"""Names of what tells the documents of a batch's rows apart."""

RESERVED = frozenset(
    ("step", "loss", "grad_norm", "tokens", "loss_scale", "skipped", "eval_loss")
    + ("learning_rate", "tokens_per_s", "device_memory_bytes")
)
"""Names of a step's own metrics, and of what the Trainer writes beside them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What a step minimizes: the sum of losses over all rows, divided by a normalizer.

    Calling it runs the loss and refuses what the step could not use.

    Attributes:
      name: What messages and a run's checkpoints call it.
      loss: The function, of a 2-D batch.
      needs: What a batch has to have beside tokens and weights.
      normalizer: A 2-D batch -> the float32 scalar that the sum over it is divided by, added
        up over micro-batches and taken as 1 where it is less. It follows from the batch
        alone because each micro-batch's loss is divided by all of it before its gradient
        is taken. None for the sum of the predicted tokens' weights.
      takes_micro_axis: Whether `loss` also takes a batch with an axis of micro-batches in
        front, and returns sums over all of them. Where layers come from host memory, it
        then gets all micro-batches at once, so that each layer can be copied once for
        all. Without it, micro-batches take turns, each with its own copies.
      packs: Whether a row of a batch may be several documents, which `positions` tell
        apart: the loss is a sum over tokens, and the model is given the positions.
      rows: The rows that it takes, as files are read for it. Of all but texts, a batch has
        more than tokens and weights: of pairs, rows 2i and 2i + 1 are the chosen and the
        rejected answer to a prompt; what judged rows and a teacher's have is in `kto` and
        `distill`.
      settings: What its arithmetic follows from beside its name, by name: values of JSON,
        which a run that goes on has to have as it was begun.
      whole: What of a whole batch, 2-D or 3-D, the loss of a micro-batch has to know: a
        function that returns scalars by name. `prepared` puts them into the batch.
    """

    name: str
    loss: Loss
    needs: tuple[str, ...] = ()
    normalizer: Callable[[Batch], Float[Array, ""]] | None = None
    takes_micro_axis: bool = False
    packs: bool = False
    rows: Rows = "texts"
    settings: Mapping[str, float | str] = dataclasses.field(
        default_factory=dict, hash=False
    )
    whole: Callable[[Batch], dict[str, Float[Array, ""]]] | None = None

    def __call__(
        self,
        model: Any,
        batch: Batch,
        key: Array | None = None,
        checkpoint: Checkpoint = "none",
    ) -> tuple[Float[Array, ""], dict[str, Any]]:
        """Returns the sum of losses and the sums behind the metrics, float32 scalars.

        Args:
          model: A whole model, as `join` makes it.
          batch: See `Batch`.
          key: The random key for dropout; None switches it off.
          checkpoint: What backward recomputes.

        Raises:
          ConfigError: the batch lacks what the objective needs; the loss is no scalar, or a
            metric is none or has a name that the step's own have.
        """
        self.check(batch)
        returned = self.loss(model, batch, key, checkpoint)
        if problems := _problems(returned):
            raise ConfigError(
                gathered(f"objective {self.name} cannot be used", problems)
            )
        loss, metrics = returned
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), dict(metrics))
        return loss, wide

    def check(self, batch: Batch) -> None:
        """Refuses a batch that lacks what the objective needs.

        Raises:
          ConfigError: with what is missing.
        """
        missing = [
            name for name in ("tokens", "weights", *self.needs) if name not in batch
        ]
        if not self.packs and (told := documents_of(batch)):
            raise ConfigError(
                f"objective {self.name} takes one document a row, and the batch has "
                f"{' and '.join(told)}; leave them out (--data.packing off), or say packs=True "
                "of an objective that gives them to the model"
            )
        if missing:
            raise ConfigError(
                f"objective {self.name} needs {', '.join(missing)} in a batch, which has "
                f"{', '.join(batch)} only"
            )

    def prepared(self, batch: Batch) -> dict[str, Any]:
        """Returns a whole batch with what the loss of each micro-batch has to know of it."""
        if self.whole is None:
            return dict(batch)
        micro = jnp.shape(batch["tokens"])[:-2]
        found = self.whole(batch)
        return {**batch, **{k: jnp.broadcast_to(x, micro) for k, x in found.items()}}

    def normalizer_of(self, batch: Batch) -> Float[Array, ""]:
        """Returns what the sum of losses over a batch, 2-D or 3-D, is divided by."""
        if self.normalizer is None:
            return predicted(batch)
        if batch["tokens"].ndim == 2:
            return self.normalizer(batch)
        return jnp.sum(jax.vmap(self.normalizer)(dict(batch)))


def _problems(returned: Any) -> list[str]:
    """Returns what a step could not use of what a loss returned."""
    pair = isinstance(returned, tuple) and len(returned) == 2
    if not (pair and isinstance(returned[1], Mapping)):
        return [
            f"it returned {type(returned).__name__}, expected a pair: the sum of losses, and "
            "a dict of metrics"
        ]
    loss, metrics = returned
    problems = [
        f"metric {name} has the name of one that every run has; choose another"
        for name in metrics
        if name in RESERVED
    ]
    if not _is_scalar(loss):
        problems.append(f"the loss is {_said(loss)}, expected a scalar over all rows")
    for name, value in metrics.items():
        parts = value if isinstance(value, tuple) and len(value) == 2 else (value,)
        if not all(map(_is_scalar, parts)):
            problems.append(
                f"metric {name} is {' and '.join(map(_said, parts))}, expected a scalar "
                "over all rows, or a pair of those: a sum and its normalizer"
            )
    return problems


def _is_scalar(x: Any) -> bool:
    return isinstance(x, int | float | jax.Array | np.ndarray | np.generic) and (
        jnp.shape(x) == ()
    )


def _said(x: Any) -> str:
    shape = getattr(x, "shape", None)
    return type(x).__name__ if shape is None else f"an array of shape {shape}"


def documents_of(batch: Batch) -> dict[str, Any]:
    """Returns what of a batch tells the documents of its rows apart, by name."""
    return {name: batch[name] for name in DOCUMENTS if name in batch}


def predicted_weights(batch: Batch) -> Float[Array, "*micro batch seq"]:
    """Returns the weights of tokens, 0 for those that nothing predicts: a document's first."""
    weights = batch["weights"]
    places = places_of(*map(batch.get, DOCUMENTS))
    if places is not None:
        weights = jnp.where(places > 0, weights, 0)
    return weights


def predicted(batch: Batch) -> Float[Array, ""]:
    """Returns the sum of the weights of all tokens that something predicts."""
    return jnp.sum(predicted_weights(batch)[..., 1:])


def of_hidden_states(
    name: str,
    loss: HeadLoss,
    *,
    needs: tuple[str, ...] = (),
    normalizer: Callable[[Batch], Float[Array, ""]] | None = None,
    packs: bool = False,
    rows: Rows = "texts",
    whole: Callable[[Batch], dict[str, Float[Array, ""]]] | None = None,
) -> Objective:
    """Returns the objective whose loss follows from a model's final hidden states.

    The layers may see several micro-batches at once; the loss sees one after the other, so
    that its own memory is that of one.

    Args:
      name: See `Objective`.
      loss: (head, hidden, batch) -> (sum of losses, metrics), of a 2-D batch. `head`
        makes logits of `hidden`, (batch, seq, hidden); `token_logprobs` and
        `cross_entropy` take both and never hold all logits.
      needs: See `Objective`.
      normalizer: See `Objective`.
      packs: See `Objective`; the model is given the positions in any case.
      rows: See `Objective`.
      whole: See `Objective`.
    """

    def of_batch(
        model: Any, batch: Batch, key: Array | None, checkpoint: Checkpoint
    ) -> tuple[Array, Metrics]:
        options = {"key": key, "checkpoint": checkpoint, **documents_of(batch)}
        hidden = model.hidden_states(batch["tokens"], **options)
        if batch["tokens"].ndim == 2:
            return loss(model.head, hidden, batch)

        def one(_: None, xs: Any) -> tuple[None, Any]:
            return None, loss(model.head, *xs)

        each = jax.lax.scan(one, None, (hidden, dict(batch)), reverse=True)[1]
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), each)

    return Objective(
        name=name,
        loss=of_batch,
        needs=needs,
        normalizer=normalizer,
        takes_micro_axis=True,
        packs=packs,
        rows=rows,
        whole=whole,
    )
