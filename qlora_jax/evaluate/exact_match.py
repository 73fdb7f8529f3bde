"""Exact match: does the greedy answer equal the row's?"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from qlora_jax.adapters.bank import AdapterBank
from qlora_jax.data import Dataset
from qlora_jax.errors import DataError, gathered
from qlora_jax.evaluate.answers import Extract, same_answer
from qlora_jax.evaluate.statistics import mean_of
from qlora_jax.inference import SampleConfig, Stop, decoded, generate


class Answer(NamedTuple):
    """A prompt, the expected and the given answer, all as text.

    Attributes:
      prompt: The prompt's text, special tokens left out.
      expected: The row's answer.
      given: The model's, up to what ends it.
      extracted: Where a pattern was given, (expected, given) as it takes them out; the
        model's is None where it has no match.
    """

    prompt: str
    expected: str
    given: str
    extracted: tuple[str, str | None] | None = None

    @property
    def correct(self) -> bool:
        """Whether they are equal: space around them aside, or what a pattern took out."""
        if self.extracted is None:
            return self.expected.strip() == self.given.strip()
        expected, given = self.extracted
        return given is not None and same_answer(expected, given)

    def line(self) -> dict[str, Any]:
        """Returns what --predictions says of it."""
        line: dict[str, Any] = {
            "prompt": self.prompt,
            "expected": self.expected,
            "given": self.given,
        }
        if self.extracted is not None:
            line["expected_answer"], line["given_answer"] = self.extracted
        return {**line, "correct": self.correct}


def answer_figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """Returns the share of correct answers with its standard error.

    Where a pattern was given, `answers_without_match` counts the model's that had none.
    """
    share = mean_of([answer.correct for answer in answers])
    figures: dict[str, Any] = {
        "exact_match": share.value,
        "exact_match_stderr": share.stderr,
    }
    pairs = [answer.extracted for answer in answers if answer.extracted is not None]
    if pairs:
        figures["answers_without_match"] = sum(given is None for _, given in pairs)
    return figures


def exact_match(
    model: Any,
    dataset: Dataset,
    tokenizer: Any,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 64,
    extract: Extract | None = None,
    stop: Sequence[str] = (),
) -> tuple[float, list[Answer]]:
    """Answers every row's prompt greedily and compares.

    Args:
      model: A Decoder, with or without an adapter; or an AdapterBank, of which each row
        takes the adapter that it names.
      dataset: Rows; of a conversation the last answer that trains is asked for.
      tokenizer: The tokenizer, from `load`.
      batch_size: Rows at once; they are sorted by length first.
      max_new_tokens: The most tokens of an answer; a longer one is cut off there.
      extract: Takes the answer out of a text (`answers.extractor`); None compares texts.
      stop: Texts that end an answer; they and what follows them are left out.

    Returns:
      The share of correct rows, and every answer in the dataset's order.

    Raises:
      DataError: expected answers have no match for `extract`; they are named.
    """
    config = SampleConfig(max_new_tokens=max_new_tokens)
    model = decoded(model)
    rows = dataset.rows
    wanted = None if extract is None else _expected(dataset, extract)
    ends = Stop.of(tokenizer, stop, chat=any(row.chat for row in rows))
    order = sorted(range(len(rows)), key=lambda i: rows[i].prompt)
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size]
        # A short last batch is filled up, so that it compiles nothing anew.
        full = picked + picked[:1] * (min(batch_size, len(order)) - len(picked))
        prompts = [rows[i].tokens[: rows[i].prompt].tolist() for i in full]
        routed = model
        if isinstance(model, AdapterBank):
            routed = model.route([rows[i].adapter for i in full])
        new = generate(routed, prompts, config, stop=ends)
        for i, prompt, ids in zip(picked, prompts, new, strict=False):
            given = ends.cut(tokenizer.decode(ids))
            extracted = None
            if extract is not None and wanted is not None:
                extracted = (wanted[i], extract(given))
            answers[i] = Answer(
                tokenizer.decode(prompt), rows[i].answer, given, extracted
            )
    ordered = [answers[i] for i in range(len(rows))]
    return sum(answer.correct for answer in ordered) / len(ordered), ordered


def _expected(dataset: Dataset, extract: Extract) -> list[str]:
    """Returns the answers in the expected texts, all of which must have one."""
    found = [extract(row.answer) for row in dataset.rows]
    if missing := [i for i, answer in enumerate(found) if answer is None]:
        ends = [dataset.rows[i].answer[-60:] for i in missing]
        named = [
            f"row {i + 1} ends in {end!r}" for i, end in zip(missing, ends, strict=True)
        ]
        raise DataError(
            gathered(
                f"{len(missing)} of {len(found)} expected answers have no match for "
                "--answer-pattern, so no answer could be correct",
                named,
            )
        )
    return [answer for answer in found if answer is not None]
