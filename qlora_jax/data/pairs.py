"""Rows of preferences: a chosen and a rejected answer to one prompt, each as a row of its own.

| keys, beside chosen and rejected | the prompt |
|---|---|
| (--data.prompt-template) | what the template makes |
| prompt (a text, or messages) | that |
| messages, conversations, conversation | these turns |
| instruction, input, system | Alpaca's prompt |
| input | that |
| none of these | what both answers begin with: turns, or a text |

Both rows go on through data/forms.py, so that each is what a row of one answer would be.
Answers are texts, a message, or messages; those that repeat a prompt's messages are taken
without them. Of a prompt that is a text and answers that are whole conversations, what the
conversations begin with counts, as in TRL.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qlora_jax.data.conversations import conversation_of
from qlora_jax.data.fields import LABEL, keys_of, listed, text_of
from qlora_jax.errors import DataError

TURNS = ("messages", "conversations", "conversation")
ANSWERS = ("chosen", "rejected")
_OF_TEXTS = ("completion", "output", "response", "text", "input_ids", *TURNS)


class Sides(NamedTuple):
    """A row of preferences as two rows of one answer.

    Attributes:
      rows: Those of the chosen and the rejected answer.
      read: Keys of the row that these were made of.
      made: Keys of these that stand for others of the row.
    """

    rows: tuple[dict[str, Any], dict[str, Any]]
    read: frozenset[str]
    made: frozenset[str]


def is_pair(row: Mapping[str, Any]) -> bool:
    """Whether a row has two answers."""
    return all(key in row for key in ANSWERS)


def sides_of(row: Mapping[str, Any], *, template: bool) -> Sides:
    """Returns the two rows of a row of preferences.

    Args:
      row: A row with `chosen` and `rejected`.
      template: Whether a template makes the prompt of the fields.

    Raises:
      DataError: its answers are empty, or equal, or have no prompt.
    """
    for key in ANSWERS:
        if _is_empty(row[key]):
            raise DataError(f"has an empty {key!r} answer; leave the row out")
    if row["chosen"] == row["rejected"]:
        raise DataError(
            "has the same answer as 'chosen' and 'rejected', so nothing is preferred; leave "
            "the row out"
        )
    if template or not any(key in row for key in ("prompt", *TURNS)):
        asked = template or "instruction" in row or "input" in row
        return _sides(row, {}, "output") if asked else _implicit(row)
    key = next(key for key in ("prompt", *TURNS) if key in row)
    prompt = listed(row[key])
    answers = [_turns(row, name) for name in ANSWERS]
    if isinstance(prompt, str):
        if all(isinstance(answer, str) for answer in answers):
            return _sides(row, {"prompt": prompt}, "completion", {key})
        if any(len(turns) > 1 for turns in answers if not isinstance(turns, str)):
            return _implicit(row, text=prompt)
        prompt = [{"role": "user", "content": text_of(row, key)}]
    else:
        prompt, _ = conversation_of({key: prompt}, key)
    answers = [_without(prompt, _as_turns(answer)) for answer in answers]
    return _sides(row, {"prompt": prompt}, "completion", {key}, answers)


def _sides(
    row: Mapping[str, Any],
    more: Mapping[str, Any],
    answer: str,
    read: set[str] | frozenset[str] = frozenset(),
    answers: Sequence[Any] = (),
) -> Sides:
    """Returns rows whose answers have the name that a row of one answer has for it."""
    kept = {k: v for k, v in row.items() if k not in (*ANSWERS, *_OF_TEXTS, LABEL)}
    given = answers or [row[key] for key in ANSWERS]
    chosen, rejected = ({**kept, **more, answer: one} for one in given)
    made = frozenset({answer, *more})
    return Sides((chosen, rejected), frozenset({*ANSWERS, *read}), made)


def _implicit(row: Mapping[str, Any], text: str = "") -> Sides:
    """Returns the rows of answers that begin with their prompt.

    Raises:
      DataError: they do not begin alike.
    """
    both = [_turns(row, name) for name in ANSWERS]
    if all(isinstance(one, str) for one in both):
        start = _shared_text(*both)
        prompt: Any = both[0][:start]
        answers: list[Any] = [one[start:] for one in both]
        if not prompt.strip():
            raise DataError(
                f"has {keys_of(row)}, and answers that do not begin alike, so there is no "
                "prompt; name its field: --data.columns prompt=..."
            )
        if not all(answer.strip() for answer in answers):
            raise DataError(
                "has an answer that the other one only goes on from, so one of them is empty "
                "after the prompt"
            )
        return _sides(row, {"prompt": prompt}, "completion", set(), answers)
    turns = [_as_turns(one) for one in both]
    start = 0
    while start < min(map(len, turns)) and turns[0][start] == turns[1][start]:
        start += 1
    prompt, answers = turns[0][:start], [one[start:] for one in turns]
    if not prompt:
        raise DataError(
            f"has {keys_of(row)}, and conversations that do not begin alike, so there is no "
            "prompt; name its field: --data.columns prompt=..."
        )
    if not all(answers):
        raise DataError(
            "has a conversation that the other one only goes on from, so one of the answers "
            "is empty after the prompt"
        )
    said = text and any(turn.get("content") == text for turn in prompt)
    read = {"prompt"} if said else set()
    return _sides(row, {"prompt": prompt}, "completion", read, answers)


def _shared_text(first: str, second: str) -> int:
    """Returns where two texts part, at the beginning of a word."""
    start = len(os.path.commonprefix([first, second]))
    after = (text[start : start + 1] for text in (first, second))
    if start and any(letter.isalnum() for letter in after):
        while start and first[start - 1].isalnum():
            start -= 1
    # A space that joins the first word is the answer's.
    return start - 1 if start and first[start - 1] == " " else start


def _turns(row: Mapping[str, Any], key: str) -> Any:
    """Returns an answer: a text as it is, a message or messages as messages."""
    value = listed(row[key])
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, str):
        return text_of(row, key)
    if not isinstance(value, list):
        kind = type(value).__name__
        raise DataError(f"{key!r} is {kind}, expected a text, a message or messages")
    return conversation_of({key: value}, key)[0]


def _as_turns(answer: Any) -> list[dict[str, Any]]:
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    return answer


def _without(prompt: list[dict], turns: list[dict]) -> list[dict]:
    """Returns turns without those of a prompt that they repeat."""
    repeats = len(turns) > len(prompt) and turns[: len(prompt)] == prompt
    return turns[len(prompt) :] if repeats else turns


def _is_empty(answer: Any) -> bool:
    if isinstance(answer, str):
        return not answer.strip()
    if isinstance(answer, list):
        last = answer[-1] if answer else None
        return not answer or (isinstance(last, dict) and _is_empty(last))
    if isinstance(answer, dict):
        said = answer.get("content", answer.get("value"))
        calls = answer.get("tool_calls") or answer.get("function_call")
        return not calls and (said is None or _is_empty(said))
    return answer is None


def judgement(row: Mapping[str, Any]) -> float:
    """Returns whether the answer of a judged row is good: 1, or 0.

    Raises:
      DataError: its label says neither.
    """
    value = row[LABEL]
    if isinstance(value, str):
        value = {"true": 1, "1": 1, "false": 0, "0": 0}.get(value.strip().lower())
    if value not in (0, 1):
        raise DataError(
            "has a 'label' that is neither true nor false; of numbers, 1 and 0 are meant"
        )
    return float(value)
