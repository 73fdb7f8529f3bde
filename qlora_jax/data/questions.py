"""Questions with choices, from files of rows, and the prompts that ask them.

{"question", "choices": [...], "answer"}    `answer` is an index from 0, a letter, or the text
                                            of a choice
{"input", "output"}                         the input ends in lettered lines ("A. 4") and a line
                                            such as "Answer:"; the output is a letter

Both may have a "subject". Prompts are those of MMLU where letters answer, and those of ARC
where the choices' own texts do.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qlora_jax.config.data import DataConfig
from qlora_jax.data.fields import chosen_adapter, renamed, text_of
from qlora_jax.data.records import read_rows
from qlora_jax.errors import ConfigError, DataError, gathered

ChoicesAs = Literal["letters", "texts"]
"""A choice is answered by its letter, all choices standing in the prompt, or by its own text,
none of them standing there."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_HEADER = re.compile(r"The following are multiple choice questions[^\n]*\n\n")


class Question(NamedTuple):
    """A question with choices.

    Attributes:
      question: The question's text.
      choices: The texts of its choices, at least two.
      answer: The index of the right choice.
      subject: What it is about, as the row names it; None where it does not.
      header: What a prompt of lettered choices begins with, once.
      cue: The line after the choices, which the answer follows.
      adapter: The name in the row's "adapter" field, where the file was read with names.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str | None = None
    header: str = ""
    cue: str = "Answer:"
    adapter: str | None = None

    @classmethod
    def of(cls, row: dict[str, Any], config: DataConfig) -> "Question":
        """Makes one of a row.

        Raises:
          DataError: the row has none of the known forms, or an answer that is no choice.
        """
        row = renamed(row, config)
        subject = text_of(row, "subject") if row.get("subject") is not None else None
        if "choices" in row:
            made = _listed(row, subject)
        elif "input" in row and "output" in row:
            made = _lettered(row)
        else:
            have = ", ".join(map(repr, row)) or "no keys"
            raise DataError(
                f"has {have}; expected 'question', 'choices' and 'answer', or 'input' with "
                "lettered choices and 'output' (--data.columns reads other names)"
            )
        return made._replace(subject=subject)

    def asked(self, form: ChoicesAs, shots: Sequence["Question"] = ()) -> str:
        """Returns the prompt: examples with their answers first, then the question."""
        header = self.header if form == "letters" else ""
        examples = [
            f"{shot._body(form)} {shot.continuations(form)[shot.answer]}\n\n"
            for shot in shots
        ]
        return header + "".join(examples) + self._body(form)

    def continuations(self, form: ChoicesAs) -> tuple[str, ...]:
        """Returns what answers the prompt after a space, one for each choice."""
        if form == "texts":
            return self.choices
        return tuple(LETTERS[: len(self.choices)])

    def _body(self, form: ChoicesAs) -> str:
        if form == "texts":
            return f"Question: {self.question}\n{self.cue}"
        pairs = zip(LETTERS, self.choices, strict=False)
        lines = [f"\n{letter}. {text}" for letter, text in pairs]
        return f"{self.question}{''.join(lines)}\n{self.cue}"


def _listed(row: dict[str, Any], subject: str | None) -> Question:
    if missing := [key for key in ("question", "answer") if key not in row]:
        raise DataError(f"has 'choices' but no {' and no '.join(map(repr, missing))}")
    choices = row["choices"]
    if not (
        isinstance(choices, list)
        and 2 <= len(choices) <= len(LETTERS)
        and all(isinstance(choice, str) and choice.strip() for choice in choices)
    ):
        raise DataError(
            f"'choices' is {choices!r:.80}, expected a list of 2 to {len(LETTERS)} texts"
        )
    about = "" if subject is None else f" about {subject.replace('_', ' ')}"
    header = f"The following are multiple choice questions (with answers){about}.\n\n"
    texts = tuple(choices)  # as they are: spaces are tokens too
    answer = _index(row["answer"], texts)
    return Question(text_of(row, "question"), texts, answer, header=header)


def _index(answer: Any, choices: tuple[str, ...]) -> int:
    """Returns the index that an answer means."""
    letters = LETTERS[: len(choices)]
    found: list[int] = []
    if isinstance(answer, int) and not isinstance(answer, bool):
        found = [answer] if 0 <= answer < len(choices) else []
    elif isinstance(answer, str):
        text = answer.strip()
        same = [i for i, choice in enumerate(choices) if choice.strip() == text]
        letter = [letters.index(text)] if len(text) == 1 and text in letters else []
        found = list(dict.fromkeys(same + letter))
    if len(found) == 1:
        return found[0]
    problem = "could be several of them" if found else "is none of them"
    raise DataError(
        f"'answer' is {answer!r:.80}, which {problem}; expected an index from 0 to "
        f"{len(choices) - 1}, a letter from A to {letters[-1]}, or the text of a choice"
    )


def _lettered(row: dict[str, Any]) -> Question:
    text = text_of(row, "input").rstrip()
    header = match[0] if (match := _HEADER.match(text)) else ""
    body, _, cue = text[len(header) :].rpartition("\n")
    # From the last "A." on, so that lettered lines of the question stay with it.
    starts = [body.rfind("\nA. ")]
    while (at := body.find(f"\n{LETTERS[len(starts)]}. ", starts[-1])) >= 0:
        starts.append(at)
        if len(starts) == len(LETTERS):
            break
    if starts[0] < 0 or len(starts) < 2:
        raise DataError(
            "'input' has no lettered choices; expected lines that begin with "
            "'A. ', 'B. ' and so on, and after them one such as 'Answer:'"
        )
    ends = [*starts[1:], len(body)]
    choices = tuple(
        body[start + len("\nA. ") : end]
        for start, end in zip(starts, ends, strict=True)
    )
    letters = LETTERS[: len(choices)]
    letter = text_of(row, "output").strip()
    if len(letter) != 1 or letter not in letters:
        raise DataError(
            f"'output' is {letter!r:.80}, expected a letter from A to {letters[-1]}"
        )
    index = letters.index(letter)
    return Question(body[: starts[0]], choices, index, header=header, cue=cue)


def read_questions(
    path: Path, config: DataConfig, *, adapters: Collection[str] = ()
) -> list[Question]:
    """Reads the questions of a file.

    Args:
      path: The file.
      config: Other names of the fields.
      adapters: Names that a row's "adapter" field may have.

    Raises:
      DataError: as `read_rows` and `Question.of`.
    """
    names = tuple(adapters)

    def parse(row: dict[str, Any]) -> Question:
        adapter = chosen_adapter(row, names) if names else None
        return Question.of(row, config)._replace(adapter=adapter)

    return read_rows(path, parse)


def shots_of(
    questions: Sequence[Question], count: int, pool: Sequence[Question] | None = None
) -> list[list[Question]]:
    """Returns the examples that go before each question.

    They are the first `count` of the pool that have its subject and are not the question
    itself, so the same ones every time. Where no question of the pool has a subject, they
    serve all.

    Args:
      questions: The questions to ask.
      count: The number of examples of each.
      pool: The questions that examples come from; None for the other questions.

    Raises:
      ConfigError: count is below 0.
      DataError: a subject has too few; all are named.
    """
    if count < 0:
        raise ConfigError(f"--shots is {count}, expected 0 or more")
    if count == 0:
        return [[] for _ in questions]
    pool = questions if pool is None else pool
    named = any(shot.subject is not None for shot in pool)
    by_subject: dict[str | None, list[Question]] = defaultdict(list)
    for shot in pool:
        by_subject[shot.subject].append(shot)
    found, short = [], {}
    for one in questions:
        theirs = by_subject.get(one.subject if named else None, [])
        # A leading part is enough: the question itself may be in it, more than once.
        shots: list[Question] = []
        for shot in theirs:
            if len(shots) == count:
                break
            if (shot.question, shot.choices) != (one.question, one.choices):
                shots.append(shot)
        if len(shots) < count:
            short[one.subject] = len(shots)
        found.append(shots)
    if short:
        raise DataError(
            gathered(
                f"--shots {count}: too few other questions to take as examples; lower it, or "
                "give more with --shots-data",
                [
                    f"{'without a subject' if s is None else s}: {have}"
                    for s, have in short.items()
                ],
            )
        )
    return found
