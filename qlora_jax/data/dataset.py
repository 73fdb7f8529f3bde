"""JSONL to tokens, and tokens to batches whose order follows from seed and step alone."""

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.data.config import DataConfig
from qlora_jax.data.formats import Example, format_row
from qlora_jax.data.jsonl import chosen_adapter, read_jsonl
from qlora_jax.data.tokenize import Row, tokenize
from qlora_jax.errors import ConfigError, DataError, gathered
from qlora_jax.text import Tokenizer

logger = logging.getLogger(__name__)

_AT_ONCE = 1000
"""Rows that are tokenized together."""


class Dataset:
    """Tokenized rows.

    Attributes:
      rows: In file order.
      max_tokens: Longest batch.
      dropped: Rows left out for their length.
    """

    def __init__(self, rows: list[Row], max_tokens: int, dropped: int = 0):
        self.rows, self.max_tokens, self.dropped = rows, max_tokens, dropped

    def __len__(self) -> int:
        """Counts the rows."""
        return len(self.rows)

    def split(self, count: int, seed: int) -> tuple["Dataset", "Dataset"]:
        """Returns (the rest, `count` rows drawn by the seed).

        Raises:
          DataError: fewer than count + 1 rows.
        """
        if count >= len(self.rows):
            raise DataError(
                f"--data.eval-rows {count} leaves nothing to train on: {len(self)} rows"
            )
        order = np.random.default_rng((seed, 1)).permutation(len(self.rows))
        held = set(order[:count].tolist())
        parts = [
            [row for i, row in enumerate(self.rows) if (i in held) == wanted]
            for wanted in (False, True)
        ]
        rest = Dataset(parts[0], self.max_tokens, self.dropped)
        return rest, Dataset(parts[1], self.max_tokens)

    def batch(self, step: int, batch_size: int, seed: int) -> dict[str, np.ndarray]:
        """Returns batch number `step`; epochs follow one another without a seam.

        Args:
          step: 0, 1, 2, ...: all that the data position is.
          batch_size: Rows.
          seed: Of the order; each epoch has its own.

        Returns:
          tokens int32 and weights float32, (batch_size, seq), padded right to the
          length of `padded_length`.
        """
        count = len(self.rows)
        position = np.arange(step * batch_size, (step + 1) * batch_size)
        orders = {
            epoch: np.random.default_rng((seed, 0, epoch)).permutation(count)
            for epoch in set((position // count).tolist())
        }
        picked = [self.rows[orders[p // count][p % count]] for p in position.tolist()]
        return self.pad(picked, batch_size)

    def packed(self, count: int, length: int, seed: int) -> np.ndarray:
        """Returns rows laid end to end, with no padding, to measure a model on.

        Args:
          count: Sequences.
          length: Tokens of each.
          seed: Of the rows' order; few rows are repeated.

        Returns:
          int32 (count, length).
        """
        order = np.random.default_rng((seed, 2)).permutation(len(self.rows))
        tokens = np.concatenate([self.rows[i].tokens for i in order])
        return np.resize(tokens, (count, length))

    def in_order(self, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """Yields all rows once, by length; short batches are filled with weight 0."""
        for rows in self.by_length(batch_size):
            yield self.pad(rows, batch_size)

    def by_length(self, batch_size: int) -> Iterator[list[Row]]:
        """Yields the rows of the batches of `in_order`."""
        rows = sorted(self.rows, key=lambda row: len(row.tokens))
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]

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


def padded_length(longest: int, max_tokens: int) -> int:
    """Returns the length to pad to: few different ones, since each compiles anew.

    Multiples of 32 up to 128, then of an eighth to a quarter of the length.
    """
    step = 32
    while step * 4 < longest:
        step *= 2
    return max(longest, min(-(-longest // step) * step, max_tokens))


def load_dataset(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    batch_size: int,
    max_tokens: int = 1024,
    *,
    config: DataConfig | None = None,
    seed: int = 0,
    epochs: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields shuffled batches of a JSONL file; see data/formats.py for its rows.

    Args:
      path: A .jsonl file.
      tokenizer: From `load`.
      batch_size: Rows of a batch.
      max_tokens: Longest row.
      config: More choices; its max_tokens is replaced.
      seed: Of the order.
      epochs: Passes over the data; the last batch wraps around to be full.

    Returns:
      Batches for `make_train_step`: tokens and weights, (batch_size, seq).

    Raises:
      DataError: see `read_dataset` (at once, not at the first batch).
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, expected at least 1")
    config = dataclasses.replace(config or DataConfig(), max_tokens=max_tokens)
    dataset = read_dataset(path, tokenizer, config)
    steps = -(-len(dataset) * epochs // batch_size)
    return (dataset.batch(step, batch_size, seed) for step in range(steps))


def read_dataset(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    adapters: Collection[str] = (),
) -> Dataset:
    """Reads and tokenizes a JSONL file.

    Args:
      path: A .jsonl file.
      tokenizer: From `load`.
      config: How to read its rows.
      adapters: Names that a row's "adapter" field may have; without any, the field is
        like any other that nobody asked for.

    Raises:
      DataError: no file, no rows, lines that are not JSON or lack their keys (up to 20
        are named), rows longer than max_tokens with too_long='error', or adapters of
        other names.
    """
    path = Path(path)
    names = tuple(adapters)
    if config.chat_template is not None:
        tokenizer = tokenizer.with_chat_template(config.chat_template)
    unread: Counter[str] = Counter()

    def parse(row: dict[str, Any]) -> tuple[list[Example], str | None]:
        adapter = chosen_adapter(row, names) if names else None
        return format_row(row, config, tokenizer, unread), adapter

    lines, rows = [], []
    parsed = read_jsonl(path, parse)
    for start in range(0, len(parsed), _AT_ONCE):
        flat = [
            (line, adapter, example)
            for line, (examples, adapter) in parsed[start : start + _AT_ONCE]
            for example in examples
        ]
        made = tokenize([example for *_, example in flat], tokenizer, config)
        for (line, adapter, _), row in zip(flat, made, strict=True):
            lines.append(line)
            rows.append(row._replace(adapter=adapter))
    _say(path, rows, tokenizer, unread, len(parsed))
    return _fit(path, rows, lines, config)


def _say(
    path: Path, rows: list[Row], tokenizer: Tokenizer, unread: Counter[str], read: int
) -> None:
    """Says once what of the rows does not reach the model, and what it will not learn."""
    for name, count in unread.items():
        logger.warning(
            "%s: %s %r, which the chat template does not read; the model does not see it",
            path,
            "1 row has" if count == 1 else f"{count} rows have",
            name,
        )
    if len(rows) > read:
        logger.info(
            "%s: %d rows became %d examples, one for each assistant turn, since the chat "
            "template renders earlier turns otherwise than the last",
            path,
            read,
            len(rows),
        )
    ends = set(tokenizer.stop_ids)
    tails = (row.tokens[-16:][row.weights[-16:] > 0].tolist() for row in rows)
    endless = [tail for tail in tails if not ends.intersection(tail)]
    if endless:
        logger.warning(
            "%s: %d of %d rows end without an end-of-text token, so the model does not "
            "learn to stop%s",
            path,
            len(endless),
            len(rows),
            "" if ends else "; its tokenizer names none (eos_token)",
        )
    others = [i for i in tokenizer.chat_ends if i not in tokenizer.eos_ids]
    if others and any(row.chat for row in rows):
        logger.warning(
            "%s: a turn ends in %r, which is none of the model's EOS; generate and evaluate "
            "stop there, other programs need it as eos_token_id in generation_config.json",
            path,
            tokenizer.token_of(others[0]),
        )


def check_ids(rows: Sequence[Row], tokenizer: Tokenizer, vocab_size: int) -> None:
    """Compares the rows' ids with the rows of an embedding.

    Raises:
      DataError: ids are not in it; they are named with their number.
    """
    largest = [(int(row.tokens.max()), i) for i, row in enumerate(rows)]
    beyond = [i for token, i in largest if token >= vocab_size]
    if not beyond:
        return
    counts: Counter[int] = Counter()
    for i in beyond:
        tokens = rows[i].tokens
        counts.update(tokens[tokens >= vocab_size].tolist())
    named = [
        f"id {token} ({tokenizer.token_of(token)!r}), {count} times"
        for token, count in counts.most_common()
    ]
    raise DataError(
        gathered(
            f"{len(beyond)} of {len(rows)} rows have ids that the model's embedding of "
            f"{vocab_size} rows does not have; the tokenizer is another model's, or "
            "tokens were added to it alone (--add-tokens adds them to both)",
            named,
        )
    )


def _fit(
    path: Path, rows: list[Row], lines: Sequence[int], config: DataConfig
) -> Dataset:
    limit = config.max_tokens
    long = [i for i, row in enumerate(rows) if len(row.tokens) > limit]
    if long and config.too_long == "error":
        named = [f"{path}:{lines[i]}: {len(rows[i].tokens)} tokens" for i in long]
        raise DataError(
            gathered(
                f"{len(long)} of {len(rows)} rows are longer than --data.max-tokens {limit}; "
                "raise it, or choose --data.too-long drop or truncate",
                named,
            )
        )
    kept = set(long)
    if config.too_long == "drop":
        rows = [row for i, row in enumerate(rows) if i not in kept]
    elif long:
        rows = [
            row._replace(tokens=row.tokens[:limit], weights=row.weights[:limit])
            for row in rows
        ]
    if long:
        verb = "left out" if config.too_long == "drop" else "cut"
        logger.warning(
            "%s: %d rows over %d tokens were %s", path, len(long), limit, verb
        )
    useful = [row for row in rows if row.weights[1:].any()]
    if not useful:
        raise DataError(
            f"{path}: no row has a token to learn within {limit} tokens; raise "
            "--data.max-tokens"
        )
    if empty := len(rows) - len(useful):
        logger.warning("%s: %d rows with nothing to learn were left out", path, empty)
    dropped = empty + (len(long) if config.too_long == "drop" else 0)
    return Dataset(useful, limit, dropped)
