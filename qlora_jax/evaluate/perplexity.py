"""Perplexity of a text in windows, and the loss of rows."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.adapters.bank import BASE, AdapterBank
from qlora_jax.data import Dataset
from qlora_jax.errors import ConfigError, DataError
from qlora_jax.generate import decoded
from qlora_jax.nn.multi_lora import Slots
from qlora_jax.train.step import next_token_loss, token_loss


def perplexity(
    model: Any,
    tokens: Sequence[int],
    *,
    window: int,
    bos_id: int | None = None,
    batch_size: int = 8,
) -> tuple[float, int]:
    """Returns exp of the mean loss a token, and the tokens it is over.

    The text is cut into windows that do not overlap; each gets a BOS in front, where
    there is one, and all its own tokens are predicted from it. Without a BOS the first
    token of each window is only read.

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
    rows = [list(tokens[i : i + window]) for i in range(0, len(tokens), window)]
    if bos_id is not None:
        rows = [[bos_id, *row] for row in rows]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise DataError("the text has no token to predict; it is empty or too short")
    width = max(map(len, rows))
    graphdef, state = nnx.split(decoded(model))
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = {
            "tokens": np.zeros((batch_size, width), np.int32),
            "weights": np.zeros((batch_size, width), np.float32),
        }
        for i, row in enumerate(rows[start : start + batch_size]):
            batch["tokens"][i, : len(row)] = row
            batch["weights"][i, 1 : len(row)] = 1
        total += float(_loss(graphdef, state, batch))
        count += int(batch["weights"].sum())
    return math.exp(total / count), count


def row_loss(model: Any, dataset: Dataset, batch_size: int = 8) -> tuple[float, int]:
    """Returns the mean loss a trained token over all rows, and how many those are."""
    graphdef, state = nnx.split(decoded(model))
    total, count = 0.0, 0
    for batch in dataset.in_order(batch_size):
        total += float(_loss(graphdef, state, batch))
        count += int(batch["weights"][:, 1:].sum())
    return total / count, count


def row_losses(
    bank: AdapterBank, dataset: Dataset, batch_size: int = 8
) -> dict[str, tuple[float, int]]:
    """Returns the mean loss a trained token of the rows of each adapter.

    Args:
      bank: Of adapters.
      dataset: Rows, whose `adapter` says which they take (None: the base). A batch mixes
        them as they come by length.
      batch_size: Rows at once.

    Returns:
      {adapter, or 'base': (mean loss in nats, trained tokens)} of those that have rows.

    Raises:
      ConfigError: a row names an adapter that is not in the bank.
    """
    bank = decoded(bank)
    sums: dict[str, np.ndarray] = {}
    for rows in dataset.by_length(batch_size):
        batch = dataset.pad(rows, batch_size)
        names = [row.adapter or BASE for row in rows]
        routed = bank.route(names + [BASE] * (batch_size - len(rows)))
        losses = np.asarray(_losses(*nnx.split(routed), batch), np.float64)
        counts = batch["weights"][:, 1:].sum(axis=1)
        for name, loss, count in zip(names, losses, counts, strict=False):
            sums[name] = sums.get(name, np.zeros(2)) + (loss, count)
    return {name: (loss / count, int(count)) for name, (loss, count) in sums.items()}


# Of functions that stay the same, so that models of one structure compile once.


@functools.partial(jax.jit, static_argnums=0)
def _loss(graphdef: nnx.GraphDef, state: nnx.State, batch: dict) -> jax.Array:
    return next_token_loss("none")(nnx.merge(graphdef, state), batch, None)


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
