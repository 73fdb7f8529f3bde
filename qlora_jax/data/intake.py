"""Rows of files and datasets to a Dataset: read, tokenized, checked, and what is to be said."""

import dataclasses
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qlora_jax.config.data import DataConfig
from qlora_jax.config.objective import Rows
from qlora_jax.data import cache
from qlora_jax.data.dataset import Dataset
from qlora_jax.data.fields import LABEL
from qlora_jax.data.fitting import Taken, size_of, taken
from qlora_jax.data.forming import Formed, Forming
from qlora_jax.data.mismatch import mismatched
from qlora_jax.data.order import Share
from qlora_jax.data.problems import Problems
from qlora_jax.data.sources import Opened, Source, parse_sources
from qlora_jax.data.tokenize import Row
from qlora_jax.errors import ConfigError, DataError, gathered
from qlora_jax.text import Tokenizer

logger = logging.getLogger(__name__)

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class Intake(NamedTuple):
    """One source's rows, tokenized, before any is left out for its length.

    Attributes:
      source: The source that they come from.
      formed: The rows, and what is to be said of them.
      problems: Names their places.
    """

    source: Source
    formed: Formed
    problems: Problems


def load_dataset(
    path: Paths,
    tokenizer: Tokenizer,
    batch_size: int,
    max_tokens: int = 1024,
    *,
    config: DataConfig | None = None,
    seed: int = 0,
    epochs: int = 1,
    kind: Rows = "texts",
) -> Iterator[dict[str, np.ndarray]]:
    """Yields shuffled batches of rows; see data/forms.py for their forms.

    Args:
      path: A file, or several; see data/sources.py.
      tokenizer: The tokenizer, from `load`.
      batch_size: Rows of a batch.
      max_tokens: Longest row.
      config: More choices; its max_tokens is replaced.
      seed: The random seed of the rows' order.
      epochs: Passes over the data; the last batch wraps around to be full.
      kind: The kind of rows, `Objective.rows` of what is to be minimized.

    Returns:
      Batches for `make_train_step`: tokens and weights, (batch_size, seq), and what else the
      kind has. Of pairs, batch_size counts pairs. They are grouped by length;
      config.packing says otherwise.

    Raises:
      DataError: see `read_dataset` (at once, not at the first batch).
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, expected at least 1")
    config = dataclasses.replace(config or DataConfig(), max_tokens=max_tokens)
    dataset = read_dataset(path, tokenizer, config, kind=kind)
    # Nothing says that a loop of the caller's own gives a model the documents' positions.
    packing = "off" if config.packing == "auto" else config.packing
    batches = dataset.batches(
        documents=batch_size, micro_batch=batch_size, seed=seed, packing=packing
    )
    return map(batches.at, range(batches.steps(epochs)))


def read_dataset(
    path: Paths,
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    adapters: Collection[str] = (),
    keep: Path | None = None,
    progress: Callable[[str, int], None] | None = None,
    kind: Rows = "texts",
) -> Dataset:
    """Reads and tokenizes rows.

    Args:
      path: A file, a folder, a dataset's id, or several, each with a weight if wanted
        (data/sources.py).
      tokenizer: The tokenizer, from `load`.
      config: The settings that rows are read by, such as max_tokens and too_long.
      adapters: Names that a row's "adapter" field may have; without any, the field is
        like any other that nobody asked for.
      keep: A folder for tokenized rows, which are read there the next time.
      progress: Called with the source's name, and the number of its rows that are done.
      kind: The kind of rows, `Objective.rows` of what is to be minimized.

    Raises:
      DataError: no file, no rows, rows that cannot be used (by kind), rows longer than
        max_tokens with too_long='error', or adapters of other names.
    """
    intakes = read_intakes(
        *(path, tokenizer, config),
        adapters=adapters,
        keep=keep,
        progress=progress,
        kind=kind,
    )
    fitted, problems = [], []
    for intake in intakes:
        logger.info("%s: %s", intake.problems.name, counted(intake.formed))
        try:
            fitted.append(_fit(intake, config))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    shares, rows = [], []
    for intake, some in zip(intakes, fitted, strict=True):
        numbers = np.arange(len(rows), len(rows) + len(some.rows))
        shares.append(Share(numbers, intake.source.weight))
        rows += some.rows
    if kind == "judged":
        rows = mismatched(rows, config.max_tokens)
    dropped = sum(some.long + some.empty for some in fitted)
    return Dataset(rows, config.max_tokens, dropped, shares)


def read_intakes(
    path: Paths,
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    adapters: Collection[str] = (),
    keep: Path | None = None,
    progress: Callable[[str, int], None] | None = None,
    kind: Rows = "texts",
) -> list[Intake]:
    """Reads and tokenizes rows, source by source; arguments as `read_dataset` has them.

    Raises:
      DataError: as `read_dataset`, but for the rows' lengths.
    """
    several = [path] if isinstance(path, (str, os.PathLike)) else path
    sources = parse_sources([os.fspath(one) for one in several])
    if config.chat_template is not None:
        tokenizer = tokenizer.with_chat_template(config.chat_template)
    forming = Forming(tokenizer, config, tuple(adapters), kind)
    intakes, problems = [], []
    for source in sources:
        told = None
        if progress is not None:
            told = _told(progress, source.name)
        try:
            opened = Opened(source)
            formed = _formed(opened, forming, keep, told)
        except DataError as error:
            problems.append(str(error))
            continue
        intakes.append(Intake(source, formed, opened.problems))
    if problems:
        raise DataError("\n".join(problems))
    for intake in intakes:
        _say(intake, tokenizer)
    return intakes


def _told(progress: Callable[[str, int], None], name: str) -> Callable[[int], None]:
    return lambda done: progress(name, done)


def _formed(
    opened: Opened,
    forming: Forming,
    keep: Path | None,
    progress: Callable[[int], None] | None,
) -> Formed:
    """Makes the rows of a source, or finds those that were kept.

    Raises:
      DataError: it has none, or some cannot be used.
    """
    name, identity = "", opened.identity
    if forming.adapters:
        keep = None
    if keep is not None and (not isinstance(identity, Path) or identity.is_file()):
        name = cache.digest_of(
            *(identity, forming.tokenizer, forming.config, forming.rows)
        )
        if (kept := cache.read(keep, name)) is not None:
            opened.problems.lines = kept.lines
            logger.info(
                "%s: %d rows, tokenized before, are read from %s",
                *(opened.problems.name, kept.read, keep / name),
            )
            return kept
    started = time.monotonic()
    formed = forming.all_of(opened.records(), progress)
    for place, message in formed.problems:
        opened.problems.add(place, message)
    if opened.problems:
        opened.problems.fail()
    if not formed.read:
        raise DataError(f"{opened.problems.name} has no rows")
    formed = formed._replace(lines=opened.problems.lines)
    if (
        keep is not None
        and formed.rows
        and time.monotonic() - started > cache.MIN_SECONDS
    ):
        cache.write(keep, name, formed)
    return formed


def _say(intake: Intake, tokenizer: Tokenizer) -> None:
    """Says once what of the rows does not reach the model, and what it will not learn."""
    name, formed = intake.problems.name, intake.formed
    rows = formed.rows
    if formed.unused:
        logger.warning(
            "%s: fields that nothing reads, so that the model does not see them: %s",
            name,
            ", ".join(
                f"{key!r} ({_rows(n)})" for key, n in formed.unused.most_common()
            ),
        )
    for key, count in formed.unread.items():
        logger.warning(
            "%s: %s %r, which the chat template does not read; the model does not see it",
            name,
            "1 row has" if count == 1 else f"{count} rows have",
            key,
        )
    if len(rows) > formed.read:
        logger.info(
            "%s: %d rows became %d examples, one for each %s",
            name,
            formed.read,
            len(rows),
            "answer"
            if LABEL in rows[0].extras
            else "assistant turn, since the chat template renders earlier turns otherwise "
            "than the last",
        )
    ends = set(tokenizer.stop_ids)
    tails = (row.tokens[-16:][row.weights[-16:] > 0].tolist() for row in rows)
    endless = [tail for tail in tails if not ends.intersection(tail)]
    if endless:
        logger.warning(
            "%s: %d of %d rows end without an end-of-text token, so the model does not "
            "learn to stop%s",
            name,
            len(endless),
            len(rows),
            "" if ends else "; its tokenizer names none (eos_token)",
        )
    others = [i for i in tokenizer.chat_ends if i not in tokenizer.eos_ids]
    if others and any(row.chat for row in rows):
        logger.warning(
            "%s: a turn ends in %r, which is none of the model's EOS; generate and evaluate "
            "stop there, other programs need it as eos_token_id in generation_config.json",
            name,
            tokenizer.token_of(others[0]),
        )


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def counted(formed: Formed) -> str:
    """Says how many rows there are of each form."""
    forms = ", ".join(f"{name} {count}" for name, count in formed.forms.most_common())
    return f"{_rows(formed.read)} ({forms})"


def check_ids(rows: Sequence[Row], tokenizer: Tokenizer, vocab_size: int) -> None:
    """Compares the rows' ids with the rows of an embedding.

    Raises:
      DataError: ids are not in it; they are named with their number.
    """
    rows = [one for row in rows for one in (row, row.other) if one is not None]
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


def _fit(intake: Intake, config: DataConfig) -> Taken:
    """Returns what a run takes, and says what it does not.

    Raises:
      DataError: rows are too long, or none has anything to learn.
    """
    name, formed, limit = intake.problems.name, intake.formed, config.max_tokens
    made = taken(formed.rows, name, config)
    if made.refused:
        sizes = [size_of(row) for row in formed.rows]
        order = sorted(range(len(sizes)), key=lambda i: -sizes[i])[: made.refused]
        raise DataError(
            gathered(
                f"{made.refused} of {len(sizes)} rows of {name} are longer than "
                f"--data.max-tokens {limit}; raise it, or choose --data.too-long drop, "
                "truncate or split; the longest first",
                [
                    f"{intake.problems.at(formed.places[i])}: {sizes[i]} tokens"
                    for i in order
                ],
            )
        )
    if count := made.cut or made.split or made.long:
        verb = "cut" if made.cut else "split" if made.split else "left out"
        logger.warning("%s: %d rows over %d tokens were %s", name, count, limit, verb)
    if not made.rows:
        raise DataError(
            f"{name}: no row has a token to learn within {limit} tokens; raise "
            "--data.max-tokens"
        )
    if made.empty:
        logger.warning(
            "%s: %d %s with nothing to learn were left out",
            name,
            made.empty,
            "rows, or parts of rows," if made.split else "rows",
        )
    return made
