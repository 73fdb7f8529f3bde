"""Examples to rows: ids, and the weight of each in the loss.

A text is tokenized whole, and a token trains where it overlaps what trains. So the ids are
those that the text has anywhere else, and the prompt's are their beginning.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from qlora_jax.config.data import DataConfig
from qlora_jax.data.fields import LABEL, PROMPT_WEIGHTS, TEACHER_IDS, TEACHER_LOGPROBS
from qlora_jax.data.forms import Example, Judged, Made, Pair
from qlora_jax.data.given_ids import Ids, Taught
from qlora_jax.errors import DataError
from qlora_jax.text import Tokenizer
from qlora_jax.text.tokenizer import Encoded
from qlora_jax.text.turns import Span

MAX_TEXT = 3_000_000
"""Characters of a row's text, and of those that are tokenized together: the package takes up to
300 bytes of memory for each."""


NO_EXTRAS: Mapping[str, np.ndarray] = {}
"""All rows without extras share this dict, which nothing writes to; it is no mapping proxy, as
that cannot be pickled for the worker processes."""


class Row(NamedTuple):
    """A tokenized row.

    Attributes:
      tokens: int32 (tokens,).
      weights: float32 (tokens,), 1 where the loss counts.
      prompt: Tokens before the answer: what trains, of a chat its last turn that trains.
      answer: The answer's text, as a model's would be decoded.
      adapter: The name in the row's "adapter" field, where the file was read with names.
      chat: It went through the chat template.
      other: The row that its objective sets beside it in a batch, such as the answer that was
        not preferred; None for none.
      extras: What else of it a batch has, by name: a scalar, or an array with a leading axis
        of tokens.
    """

    tokens: np.ndarray
    weights: np.ndarray
    prompt: int
    answer: str
    adapter: str | None = None
    chat: bool = False
    other: "Row | None" = None
    extras: Mapping[str, np.ndarray] = NO_EXTRAS


def tokenize(
    made: Sequence[Made], tokenizer: Tokenizer, config: DataConfig
) -> list[Row]:
    """Makes a row of each thing that a record became."""
    flat = [part for one in made for part in parts_of(one)]
    asked = config
    if any(isinstance(one, Pair | Judged) for one in made):
        # A preference is one of answers; what else trains stands in `prompt_weights`.
        config = dataclasses.replace(config, train_on_prompt=False)
    rows = iter(_tokenize(flat, tokenizer, config))
    found = []
    for one in made:
        row = next(rows)
        if isinstance(one, Pair):
            row = _pair(one, row, next(rows), tokenizer, asked)
        elif isinstance(one, Judged):
            row = row._replace(extras={LABEL: np.float32(one.label)})
        elif isinstance(one, Taught):
            said = {
                TEACHER_IDS: one.teacher_ids,
                TEACHER_LOGPROBS: one.teacher_logprobs,
            }
            row = row._replace(extras=said)
        found.append(row)
    return found


def parts_of(made: Made) -> tuple[Example | Ids, ...]:
    """Returns the examples of what a record became."""
    if isinstance(made, Pair):
        return made
    if isinstance(made, Judged):
        return (made.example,)
    return (made.ids,) if isinstance(made, Taught) else (made,)


def _pair(
    pair: Pair, chosen: Row, rejected: Row, tokenizer: Tokenizer, config: DataConfig
) -> Row:
    """Puts the rows of a pair together; the tokens of their prompts are the same."""
    plain = dataclasses.replace(config, train_on_prompt=False)
    ends = [int(np.argmax(row.weights > 0)) for row in (chosen, rejected)]
    same = np.array_equal(chosen.tokens[: ends[0]], rejected.tokens[: ends[1]])
    if not same:
        encoded = tokenizer.encode_offsets([example.text for example in pair])
        chosen, rejected = (
            _row(example, one, tokenizer, plain, apart=True)
            for example, one in zip(pair, encoded, strict=True)
        )
    if config.train_on_prompt:
        chosen, rejected = (
            row._replace(extras={PROMPT_WEIGHTS: np.float32(row.weights == 0)})
            for row in (chosen, rejected)
        )
    return chosen._replace(other=rejected)


def _tokenize(
    examples: Sequence[Example | Ids], tokenizer: Tokenizer, config: DataConfig
) -> list[Row]:
    """Makes a row of each example, of about so much text at a time as one may have."""
    rows: list[Row] = []
    group: list[Example | Ids] = []
    held = 0
    for example in examples:
        held += len(example.text) if isinstance(example, Example) else 0
        if held > MAX_TEXT:
            rows += _rows(group, tokenizer, config)
            group, held = [], len(example.text) if isinstance(example, Example) else 0
        group.append(example)
    return rows + _rows(group, tokenizer, config)


def _rows(
    examples: Sequence[Example | Ids], tokenizer: Tokenizer, config: DataConfig
) -> list[Row]:
    texts = [example.text for example in examples if isinstance(example, Example)]
    encoded = iter(tokenizer.encode_offsets(texts))
    return [
        _row(example, next(encoded), tokenizer, config)
        if isinstance(example, Example)
        else _given(example, tokenizer, config)
        for example in examples
    ]


def check_length(made: Made) -> None:
    """Refuses a text that would take gigabytes to tokenize.

    Raises:
      DataError: it is longer than MAX_TEXT.
    """
    for example in parts_of(made):
        if isinstance(example, Example) and len(example.text) > MAX_TEXT:
            raise DataError(
                f"has a text of {len(example.text)} characters, expected at most "
                f"{MAX_TEXT}; split it into rows"
            )


def _given(example: Ids, tokenizer: Tokenizer, config: DataConfig) -> Row:
    """Takes ids as they are; the answer is what trains last."""
    ids, weights = example
    trained = [i for i, weight in enumerate(weights) if weight]
    end = trained[-1] + 1 if trained else len(ids)
    start = end
    while start and weights[start - 1]:
        start -= 1
    if config.train_on_prompt:
        weights = [weight or 1.0 for weight in weights]
    return _made(ids, weights, start, _answer(ids[start:end], tokenizer))


def _row(
    example: Example,
    encoded: Encoded,
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    apart: bool = False,
) -> Row:
    if apart:
        encoded = _apart(example, tokenizer)
    elif example.kind != "chat" and example.spans[0].start:
        encoded = _cut_between(example, encoded, tokenizer)
    ids = encoded.ids
    outside = float(config.train_on_prompt)
    weights, last = token_weights(encoded.offsets, example.spans, outside)
    if example.kind == "chat":
        answer = _answer(ids[last[0] : last[1]], tokenizer)
        return _made(ids, weights, last[0], answer, chat=True)
    bos = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
    begun = tokenizer.begun(ids, bos if example.kind == "pair" else tokenizer.before)
    put = len(begun) - len(ids)
    weights = [0.0] * put + weights
    ends = tokenizer.eos_ids[:1] or tokenizer.after
    if not ids or ids[-1] not in (*tokenizer.eos_ids, *ends):
        begun, weights = [*begun, *ends], weights + [1.0] * len(ends)
    start, end, _ = example.spans[-1]
    return _made(begun, weights, last[0] + put, example.text[start:end])


def _made(
    ids: Sequence[int],
    weights: Sequence[float],
    prompt: int,
    answer: str,
    *,
    chat: bool = False,
) -> Row:
    tokens = np.array(ids, np.int32)
    return Row(tokens, np.array(weights, np.float32), prompt, answer, chat=chat)


def token_weights(
    offsets: Sequence[tuple[int, int]], spans: Sequence[Span], outside: float = 0.0
) -> tuple[list[float], tuple[int, int]]:
    """Returns the weight of each token, and (first, end) of those of the last span that counts.

    A token has the weight of the span that it overlaps, as in transformers' assistant
    masks, or else `outside`.
    """
    weights = [outside] * len(offsets)
    last = (len(offsets), len(offsets))
    which, begun = 0, -1
    for i, (start, end) in enumerate(offsets):
        while which < len(spans) and start >= spans[which].end:
            which += 1
        if which == len(spans):
            break
        if end > spans[which].start:
            weights[i] = spans[which].weight
            if weights[i]:
                last = (last[0] if begun == which else i, i + 1)
                begun = which
    return weights, last


def _answer(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Returns the text of a turn up to what ends it."""
    ends = tokenizer.stop_ids
    count = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return tokenizer.decode(ids[:count])


def _cut_between(example: Example, encoded: Encoded, tokenizer: Tokenizer) -> Encoded:
    """Keeps prompt and answer apart where one token would hold letters of both.

    A prompt is given without its answer, so the answer could not be asked for. A space
    that joins the answer's first word stays with it.
    """
    text, cut = example.text, example.spans[0].start
    for start, end in encoded.offsets:
        if start >= cut:
            break
        if end > cut and text[start:cut].strip():
            return _apart(example, tokenizer)
    return encoded


def _apart(example: Example, tokenizer: Tokenizer) -> Encoded:
    """Encodes the prompt, and what comes after it, each alone."""
    text = example.text
    cut = next(span.start for span in example.spans if span.weight)
    prompt = tokenizer.encode_offsets([text[:cut]])[0]
    ids = tokenizer.encode_after(text[cut:])
    places = [(cut, len(text))] * len(ids)
    return Encoded([*prompt.ids, *ids], [*prompt.offsets, *places])
