"""Multiple choice: which of its choices does a model find likeliest after a question?

A choice's log-likelihood is the sum of log p of its tokens after the prompt. Prompt and
choice are tokenized as one text, and the choice begins at the number of tokens that the prompt
has alone, as in lm-evaluation-harness. So a choice gets the tokens that it has in running text:
" A" is one. Where all choices of a question are one token (letters), one forward pass gives
all their likelihoods.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from qlora_jax.adapters.bank import BASE, AdapterBank
from qlora_jax.data import DataConfig
from qlora_jax.data.dataset import padded_length
from qlora_jax.data.questions import ChoicesAs, Question, shots_of
from qlora_jax.errors import DataError, gathered
from qlora_jax.evaluate.statistics import mean_of
from qlora_jax.inference import decoded
from qlora_jax.inference.context import say_beyond_context


class Scored(NamedTuple):
    """A question and what a model thinks of its choices.

    Attributes:
      question: The question.
      prompt: The text that the question was asked with, examples included.
      choices: The texts that answer it, after a space.
      log_likelihoods: The log-probability of each choice, in nats.
    """

    question: Question
    prompt: str
    choices: tuple[str, ...]
    log_likelihoods: tuple[float, ...]

    @property
    def chosen(self) -> int:
        """The likeliest; the first of several."""
        return int(np.argmax(self.log_likelihoods))

    @property
    def chosen_norm(self) -> int:
        """The likeliest by byte of UTF-8, so that longer choices have no handicap."""
        lengths = [len(choice.encode()) for choice in self.choices]
        return int(np.argmax(np.array(self.log_likelihoods) / lengths))

    @property
    def tied(self) -> bool:
        """Whether another choice is as likely as the chosen one, to the last bit."""
        return self.log_likelihoods.count(max(self.log_likelihoods)) > 1

    def line(self) -> dict[str, Any]:
        """Returns what --predictions says of it."""
        answer = self.question.answer
        return {
            "subject": self.question.subject,
            "prompt": self.prompt,
            "choices": self.choices,
            "log_likelihoods": self.log_likelihoods,
            "expected": self.choices[answer],
            "chosen": self.choices[self.chosen],
            "correct": self.chosen == answer,
            "correct_norm": self.chosen_norm == answer,
        }


class _Item(NamedTuple):
    """A row to run: what it says of one choice, or of all that are one token.

    Attributes:
      question: The index of the question.
      choices: Indices of the choices.
      tokens: Ids; the last label is left out, since nothing follows it.
      labels: int (tokens of the choice, choices).
    """

    question: int
    choices: range
    tokens: list[int]
    labels: np.ndarray


class Asked(NamedTuple):
    """Questions, tokenized.

    Attributes:
      questions: The questions that were not left out for their length.
      prompts: The prompt of each question.
      form: The way that choices answer: 'letters' or 'texts' (see `ask`).
      items: Rows to run.
      dropped: Questions left out for their length.
      max_tokens: Longest row.
    """

    questions: list[Question]
    prompts: list[str]
    form: ChoicesAs
    items: list[_Item]
    dropped: int
    max_tokens: int


def ask(
    questions: Sequence[Question],
    tokenizer: Any,
    config: DataConfig,
    *,
    form: ChoicesAs = "letters",
    shots: int = 0,
    pool: Sequence[Question] | None = None,
) -> Asked:
    """Makes prompts of questions, and tokens of prompts and choices.

    Args:
      questions: At least one.
      tokenizer: The tokenizer, from `load`.
      config: max_tokens, and too_long: 'drop' leaves a question out, 'truncate' cuts the
        beginning of its prompt.
      form: 'letters' puts all choices into the prompt and scores their letters; 'texts'
        leaves them out and scores their texts.
      shots: Examples before each question (`shots_of`).
      pool: The questions that examples come from; None for the other questions.

    Raises:
      DataError: questions that are too long, or choices without tokens; all are named.
    """
    examples = shots_of(questions, shots, pool)
    prompts = [q.asked(form, e) for q, e in zip(questions, examples, strict=True)]
    kept, items, long, empty, endless = [], [], [], [], []
    for i, question in enumerate(questions):
        made = _items(len(kept), prompts[i], question.continuations(form), tokenizer)
        if any(not len(item.labels) for item in made):
            empty.append(f"question {i + 1}: {question.question!r:.60}")
        longest = max(len(item.tokens) for item in made)
        if longest > config.max_tokens:
            long.append(f"question {i + 1}: {longest} tokens")
            if config.too_long == "drop":
                continue
            made = [
                item._replace(tokens=item.tokens[-config.max_tokens :]) for item in made
            ]
        if any(len(item.labels) > len(item.tokens) for item in made):
            endless.append(long[-1])
        kept.append(i)
        items += made
    if empty:
        raise DataError(
            gathered(
                "choices that add no token to their prompt cannot be scored; give each a "
                "text",
                empty,
            )
        )
    refused = config.too_long in ("error", "split")  # a question is asked as a whole
    if long and (refused or endless or not kept):
        raise DataError(
            gathered(
                f"{len(long)} of {len(questions)} questions are longer than "
                f"--data.max-tokens {config.max_tokens}; raise it, ask with fewer --shots, "
                "or choose --data.too-long drop or truncate (which cuts the prompt's "
                "beginning, never a choice)",
                endless or long,
            )
        )
    dropped = len(questions) - len(kept)
    picked = [questions[i] for i in kept], [prompts[i] for i in kept]
    return Asked(*picked, form, items, dropped, config.max_tokens)


def _items(
    index: int, prompt: str, choices: Sequence[str], tokenizer: Any
) -> list[_Item]:
    """Returns the rows of a question: one where each choice is one token, else one each."""
    alone, *wholes = tokenizer.encode_batch(
        [prompt, *(f"{prompt} {choice}" for choice in choices)]
    )
    cut = len(alone)
    prefixes = {tuple(whole[:cut]) for whole in wholes}
    if len(prefixes) == 1 and all(len(whole) == cut + 1 for whole in wholes):
        labels = np.array([[whole[-1] for whole in wholes]])
        tokens = tokenizer.begun(wholes[0][:cut])
        return [_Item(index, range(len(choices)), tokens, labels)]
    return [
        _Item(
            index,
            range(i, i + 1),
            tokenizer.begun(whole[:-1]),
            np.array(whole[cut:])[:, None],
        )
        for i, whole in enumerate(wholes)
    ]


def score_choices(model: Any, asked: Asked, batch_size: int = 8) -> list[Scored]:
    """Returns the likelihoods of all choices, in the questions' order.

    Args:
      model: A Decoder, with or without an adapter; or an AdapterBank, of which each
        question takes the adapter that it names (None: the base).
      asked: The tokenized questions, from `ask`.
      batch_size: Rows at once, by length.
    """
    model = decoded(model)
    found: list[list[float]] = [[0.0] * len(q.choices) for q in asked.questions]
    groups: dict[bool, list[_Item]] = defaultdict(list)
    for item in asked.items:
        groups[len(item.choices) > 1].append(item)
    for items in groups.values():
        # One number of positions and of choices for all, so that lengths alone differ.
        most, wide = (max(item.labels.shape[a] for item in items) for a in (0, 1))
        most = 1 << (most - 1).bit_length()
        items.sort(key=lambda item: len(item.tokens))
        for start in range(0, len(items), batch_size):
            some = items[start : start + batch_size]
            routed: Any = model
            if isinstance(model, AdapterBank):
                names = [asked.questions[i.question].adapter or BASE for i in some]
                routed = model.route(names + [BASE] * (batch_size - len(some)))
            batch = _batch(some, (batch_size, most, wide), asked.max_tokens)
            say_beyond_context(routed.config, len(some[-1].tokens), "questions")
            log_p = np.asarray(_log_p(*nnx.split(routed), *batch), np.float64)
            for item, row in zip(some, log_p, strict=False):
                count, width = item.labels.shape
                for choice, value in zip(
                    item.choices, row[:count, :width].sum(axis=0), strict=True
                ):
                    found[item.question][choice] = float(value)
    return [
        Scored(question, prompt, question.continuations(asked.form), tuple(values))
        for question, prompt, values in zip(
            asked.questions, asked.prompts, found, strict=True
        )
    ]


def _batch(
    items: Sequence[_Item], shape: tuple[int, int, int], max_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns tokens, the positions to read, and the labels there, int32, padded right."""
    size, most, _ = shape
    longest = max(len(item.tokens) for item in items)
    tokens = np.zeros((size, padded_length(longest, max_tokens)), np.int32)
    places = np.zeros((size, most), np.int32)
    labels = np.zeros(shape, np.int32)
    for i, item in enumerate(items):
        count, width = item.labels.shape
        end = len(item.tokens)
        tokens[i, :end] = item.tokens
        places[i, :count] = np.arange(end - count, end)
        labels[i, :count, :width] = item.labels
    return tokens, places, labels


# Of a function that stays the same, so that models of one structure compile once.


@partial(jax.jit, static_argnums=0)
def _log_p(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "batch seq"],
    places: Int[Array, "batch labels"],
    labels: Int[Array, "batch labels choices"],
) -> Float[Array, "batch labels choices"]:
    """Returns log p of labels after places, float32."""
    model = nnx.merge(graphdef, state)
    hidden = model.hidden_states(tokens)
    hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)

    def one(xs: tuple) -> jax.Array:
        # A position at a time: the logits of one, never of all.
        hidden, labels = xs
        logits = model.head(hidden[:, None])[:, 0].astype(jnp.float32)
        picked = jnp.take_along_axis(logits, labels, axis=1)
        return picked - jax.nn.logsumexp(logits, axis=1, keepdims=True)

    swapped = hidden.swapaxes(0, 1), labels.swapaxes(0, 1)
    return jax.lax.map(one, swapped).swapaxes(0, 1)


def choice_figures(scored: Sequence[Scored]) -> dict[str, Any]:
    """Returns accuracies with their standard errors, in all and by subject.

    `accuracy` takes the likeliest choice, `acc_norm` the likeliest by byte; `ties` counts the
    questions where that was a tie, which low precision makes.
    """
    figures = _accuracies(scored)
    figures["ties"] = sum(one.tied for one in scored)
    by_subject: dict[str, list[Scored]] = defaultdict(list)
    for one in scored:
        if one.question.subject is not None:
            by_subject[one.question.subject].append(one)
    if by_subject:
        figures["by_subject"] = {
            subject: _accuracies(theirs) for subject, theirs in by_subject.items()
        }
    return figures


def _accuracies(scored: Sequence[Scored]) -> dict[str, Any]:
    right = mean_of([one.chosen == one.question.answer for one in scored])
    norm = mean_of([one.chosen_norm == one.question.answer for one in scored])
    return {
        "questions": len(scored),
        "accuracy": right.value,
        "accuracy_stderr": right.stderr,
        "acc_norm": norm.value,
        "acc_norm_stderr": norm.stderr,
    }
