"""Tokenized rows, and what makes batches of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qlora_jax.data.batches import Batches, Every, Resolved
from qlora_jax.data.layout import padded_length
from qlora_jax.data.order import Share, epoch_rows
from qlora_jax.data.tokenize import Row
from qlora_jax.errors import DataError


class Dataset:
    """Tokenized rows.

    Attributes:
      rows: The tokenized rows in file order, one file after another.
      max_tokens: Longest batch.
      dropped: Rows left out, for their length or because nothing of them trains.
      shares: The rows and the weight of each source, where a weight differs from 1; else
        empty.
    """

    def __init__(
        self,
        rows: list[Row],
        max_tokens: int,
        dropped: int = 0,
        shares: Sequence[Share] = (),
    ):
        self.rows, self.max_tokens, self.dropped = rows, max_tokens, dropped
        self.shares = tuple(shares) if any(s.weight != 1 for s in shares) else ()
        self._batches: tuple[dict[str, Any], Batches] | None = None

    def __len__(self) -> int:
        """Counts the rows."""
        return len(self.rows)

    @property
    def epoch_rows(self) -> int:
        """Rows of an epoch."""
        return epoch_rows(len(self.rows), self.shares)

    def split(self, count: int, seed: int) -> tuple["Dataset", "Dataset"]:
        """Returns (the rest, `count` rows drawn by the seed).

        Raises:
          DataError: fewer than count + 1 rows, or a source without any in the rest.
        """
        if count >= len(self.rows):
            raise DataError(
                f"--data.eval-rows {count} leaves nothing to train on: {len(self)} rows"
            )
        order = np.random.default_rng((seed, 1)).permutation(len(self.rows))
        held = np.isin(np.arange(len(self.rows)), order[:count])
        number = np.cumsum(~held) - 1
        shares = [
            Share(number[share.rows[~held[share.rows]]], share.weight)
            for share in self.shares
        ]
        if not all(share.rows.size for share in shares):
            raise DataError(
                f"--data.eval-rows {count} leaves a file without a row to train on"
            )
        parts = [
            [
                row
                for row, out in zip(self.rows, held.tolist(), strict=True)
                if out == wanted
            ]
            for wanted in (False, True)
        ]
        rest = Dataset(parts[0], self.max_tokens, self.dropped, shares)
        return rest, Dataset(parts[1], self.max_tokens)

    def batches(
        self, *, documents: int, micro_batch: int, seed: int, packing: Resolved
    ) -> Batches:
        """Returns the batches of a run; those that were asked for last are kept.

        Args:
          documents: Documents of an optimizer step: micro_batch * grad_accum. Where they
            are packed, a step has fewer rows, and as many documents on average.
          micro_batch: Rows of a micro-batch, at most.
          seed: The random seed of the rows' order; each epoch has an order of its own.
          packing: How rows are laid, from `resolve`.

        Raises:
          ConfigError: packing is on, and the rows cannot be packed.
          DataError: rows differ in what else they have.
        """
        settings = {
            "documents": documents,
            "micro_batch": micro_batch,
            "seed": seed,
            "packing": packing,
        }
        if self._batches is None or self._batches[0] != settings:
            made = Batches(self.rows, self.max_tokens, self.shares, **settings)
            self._batches = settings, made
        return self._batches[1]

    def every(self, micro_batch: int, packing: Resolved) -> Every:
        """Returns the batches that have each row once, of like lengths, to evaluate on.

        Args:
          micro_batch: Documents of a batch; where they are packed, on average.
          packing: How rows are laid, from `resolve`.
        """
        return Every(self.rows, self.max_tokens, micro_batch, packing)

    def packed(self, count: int, length: int, seed: int) -> np.ndarray:
        """Returns rows laid end to end, with no padding, to measure a model on.

        Args:
          count: The number of sequences.
          length: The number of tokens in each.
          seed: The random seed of the rows' order; if the rows are too few, they are
            repeated.

        Returns:
          int32 (count, length).
        """
        order = np.random.default_rng((seed, 2)).permutation(len(self.rows))
        tokens = np.concatenate([self.rows[i].tokens for i in order])
        return np.resize(tokens, (count, length))

    def pad(self, rows: list[Row], batch_size: int) -> dict[str, np.ndarray]:
        """Makes one batch of rows, padded right with token 0 and weight 0."""
        longest = max(len(row.tokens) for row in rows)
        length = padded_length(longest, self.max_tokens)
        tokens = np.zeros((batch_size, length), np.int32)
        weights = np.zeros((batch_size, length), np.float32)
        for i, row in enumerate(rows):
            tokens[i, : len(row.tokens)] = row.tokens
            weights[i, : len(row.tokens)] = row.weights
        return {"tokens": tokens, "weights": weights}
