"""Perplexity of a text in windows, and the loss of rows."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.adapters.bank import BASE, AdapterBank
from qlora_jax.data import Dataset
from qlora_jax.data.dataset import Row
from qlora_jax.errors import ConfigError, DataError
from qlora_jax.evaluate.statistics import Mean, ratio_of
from qlora_jax.inference import decoded
from qlora_jax.inference.context import say_beyond_context
from qlora_jax.nn.multi_lora import Slots
from qlora_jax.objectives.sft import token_loss


class Losses(NamedTuple):
    """The losses of rows or windows.

    Attributes:
      sums: float64 (rows,), -log p of a row's tokens that count, in nats.
      counts: float64 (rows,), how many those are.
    """

    sums: np.ndarray
    counts: np.ndarray

    @property
    def loss(self) -> Mean:
        """Mean loss a token, with its standard error over rows."""
        return ratio_of(self.sums, self.counts)

    @property
    def perplexity(self) -> Mean:
        """Exp of the mean loss; its error is the loss's, to first order."""
        value, error = self.loss
        ratio = math.exp(value)
        return Mean(ratio, None if error is None else ratio * error)

    @property
    def tokens(self) -> int:
        """Tokens that count."""
        return int(self.counts.sum())

    def figures(self) -> dict[str, Any]:
        """Returns what `qlora evaluate` says of them."""
        return {
            "loss": self.loss.value,
            "loss_stderr": self.loss.stderr,
            "perplexity": self.perplexity.value,
            "perplexity_stderr": self.perplexity.stderr,
            "tokens": self.tokens,
        }

    def of(self, picked: Sequence[int]) -> "Losses":
        """Returns those of some rows."""
        return Losses(self.sums[[*picked]], self.counts[[*picked]])


def perplexity(
    model: Any,
    tokens: Sequence[int],
    *,
    window: int,
    bos_id: int | None = None,
    batch_size: int = 8,
) -> tuple[float, int]:
    """Returns exp of the mean loss a token, and the tokens it is over.

    As `window_losses`, whose arguments and errors it has.
    """
    losses = window_losses(
        model, tokens, window=window, bos_id=bos_id, batch_size=batch_size
    )
    return losses.perplexity.value, losses.tokens


def window_losses(
    model: Any,
    tokens: Sequence[int],
    *,
    window: int,
    bos_id: int | None = None,
    batch_size: int = 8,
) -> Losses:
    """Returns the loss of each window of a text.

    The windows do not overlap; each gets a BOS in front, where there is one, and all its own
    tokens are predicted from it. Without a BOS the first token of each window is only read.

    Args:
      model: A Decoder, with or without an adapter.
      tokens: Ids of the whole text.
      window: Tokens of a window, BOS not counted.
      bos_id: Put in front of each window; None for none.
      batch_size: Windows at once.

    Raises:
      ConfigError: window or batch_size is less than 1.
      DataError: the text has no token to predict.
    """
    for name, value in (("window", window), ("batch-size", batch_size)):
        if value < 1:
            raise ConfigError(f"--{name} is {value}, expected at least 1")
    pieces = [list(tokens[i : i + window]) for i in range(0, len(tokens), window)]
    if bos_id is not None:
        pieces = [[bos_id, *piece] for piece in pieces]
    pieces = [piece for piece in pieces if len(piece) > 1]
    if not pieces:
        raise DataError("the text has no token to predict; it is empty or too short")
    # All of one length, the last one's too, so that one program does.
    longest = max(map(len, pieces))
    rows = []
    for piece in pieces:
        ids, weights = np.zeros(longest, np.int32), np.zeros(longest, np.float32)
        ids[: len(piece)], weights[1 : len(piece)] = piece, 1
        rows.append(Row(ids, weights, 1, ""))
    return row_losses(model, Dataset(rows, longest), batch_size)


def row_loss(model: Any, dataset: Dataset, batch_size: int = 8) -> tuple[float, int]:
    """Returns the mean loss a trained token over all rows, and how many those are."""
    losses = row_losses(model, dataset, batch_size)
    return losses.loss.value, losses.tokens


def row_losses(model: Any, dataset: Dataset, batch_size: int = 8) -> Losses:
    """Returns the loss of each row, in the dataset's order.

    Args:
      model: A Decoder, with or without an adapter; or an AdapterBank, of which each row
        takes the adapter that it names (None: the base).
      dataset: Rows; a batch mixes them as they come by length.
      batch_size: Rows at once.

    Raises:
      ConfigError: a row names an adapter that is not in the bank.
    """
    model, rows = decoded(model), dataset.rows
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    sums, counts = np.zeros(len(rows)), np.zeros(len(rows))
    longest = len(rows[order[-1]].tokens)
    one = model.base if isinstance(model, AdapterBank) else model
    say_beyond_context(one.config, longest, "rows")
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size]
        batch = dataset.pad([rows[i] for i in picked], batch_size)
        routed = model
        if isinstance(model, AdapterBank):
            names = [rows[i].adapter or BASE for i in picked]
            routed = model.route(names + [BASE] * (batch_size - len(picked)))
        losses = np.asarray(_losses(*nnx.split(routed), batch), np.float64)
        sums[picked] = losses[: len(picked)]
        counts[picked] = batch["weights"][: len(picked), 1:].sum(axis=1)
    return Losses(sums, counts)


# Of a function that stays the same, so that models of one structure compile once.


@functools.partial(jax.jit, static_argnums=0)
def _losses(graphdef: nnx.GraphDef, state: nnx.State, batch: dict) -> jax.Array:
    """Returns the loss of each row."""
    model = nnx.merge(graphdef, state)
    hidden = model.hidden_states(batch["tokens"])
    head, slots, rest = nnx.split(model.head, Slots, ...)

    def one(xs: tuple) -> jax.Array:
        # An adapted head is told of this row alone.
        hidden, batch, slots = jax.tree.map(lambda x: x[None], xs)
        return token_loss(nnx.merge(head, slots, rest), hidden, batch)

    several = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (len(hidden), *x.shape[1:])), slots
    )
    return jax.lax.map(one, (hidden, dict(batch), several))
