"""A part of a conversation's text trains: the turns of the assistant, or of other roles.

The whole text is tokenized at once, so a part is (start, end) in its characters. Found,
in this order:

1. By the template's generation blocks, where it has them.
2. By prefixes: what comes before a turn is the text of the shorter conversation with the
   generation prompt, and the turn ends where the text with it ends. This needs each of
   these texts to begin the next.
3. Where they do not (thoughts of earlier turns are left out, something ends the last turn
   alone, the prompt opens a thought that the rendered answer lacks), each turn is an
   example of its own: its history exactly as it is shown when the answer is asked for, and
   then the answer. That turn alone trains.

A turn of `weight` 0 does not train. What follows the last assistant turn is left out: no
token before it depends on it.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qlora_jax.errors import DataError
from qlora_jax.text.chat import ChatTemplate, fitted, text_of_parts

_OPEN, _CLOSE = "<think>", "</think>"
_PROBE = "a probe of what a turn says"


ASSISTANT = ("assistant",)
"""Turns of these roles train, unless --data.train-on names others."""


class Span(NamedTuple):
    """Characters that train, and how much each of their tokens counts."""

    start: int
    end: int
    weight: float = 1.0


class Example(NamedTuple):
    """A text, and what of it trains, in order."""

    text: str
    spans: tuple[Span, ...]


def examples_of(
    messages: Sequence[dict[str, Any]],
    template: ChatTemplate,
    variables: Mapping[str, Any] | None = None,
    roles: Sequence[str] = ASSISTANT,
) -> list[Example]:
    """Renders a conversation; one example, or one for each assistant turn.

    Args:
      messages: The conversation, as `checked_messages` returns it.
      template: The template to render it with.
      variables: `tools`, `documents`, and what else the template takes.
      roles: Whose turns train.

    Raises:
      DataError: no turn is theirs, or the template refuses the messages.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] in roles]
    if not turns:
        raise DataError(f"'messages' has no {' or '.join(roles)} turn to learn from")
    shown = fitted(messages[: turns[-1] + 1], template)
    weights = [float(messages[i].get("weight", 1) or 0) for i in turns]
    for i, turn in enumerate(turns):
        if messages[turn].get("weight", 1) is None:
            weights[i] = 1.0
    conversation = _Conversation(shown, turns, weights, template, dict(variables or {}))
    alone = tuple(roles) == ASSISTANT  # whose turns are all that templates mark
    whole = conversation.by_marks() if template.marks and alone else None
    whole = whole or conversation.by_prefixes()
    if whole is None and not alone:
        raise DataError(
            "the chat template renders earlier turns differently later on, so turns of "
            "others than the assistant cannot be told apart; --data.train-on assistant"
        )
    return [whole] if whole else conversation.one_each()


class _Conversation(NamedTuple):
    messages: list[dict[str, Any]]
    turns: list[int]
    weights: list[float]
    template: ChatTemplate
    variables: dict[str, Any]

    def render(self, count: int, *, prompt: bool = False) -> str:
        """Renders the first messages."""
        return self.template.render(
            self.messages[:count], add_generation_prompt=prompt, **self.variables
        )

    def by_marks(self) -> Example | None:
        """Takes what generation blocks mark; None where they mark nothing."""
        text, marks = self.template.render_marked(self.messages, **self.variables)
        weights = [1.0] * len(marks)
        if any(weight != 1 for weight in self.weights):
            weights = self._weights_of_marks(len(marks))
        spans = tuple(
            Span(start, end, weight)
            for (start, end), weight in zip(marks, weights, strict=True)
        )
        return Example(text, spans) if any(s.end > s.start for s in spans) else None

    def _weights_of_marks(self, count: int) -> list[float]:
        """Returns the weight of each mark: those that come with a turn are the turn's."""
        if count == len(self.turns):
            return self.weights
        weights: list[float] = []
        for turn, weight in zip(self.turns, self.weights, strict=True):
            _, marks = self.template.render_marked(
                self.messages[: turn + 1], **self.variables
            )
            weights += [weight] * (len(marks) - len(weights))
        if len(weights) != count:
            raise DataError(
                "'weight' of a message cannot be followed: the chat template marks "
                f"{count} parts, and {len(weights)} turn by turn"
            )
        return weights

    def by_prefixes(self) -> Example | None:
        """Takes what each turn adds; None where the texts do not begin one another."""
        text, spans = "", []
        for turn, weight in zip(self.turns, self.weights, strict=True):
            asked = self.messages[turn]["role"] == "assistant"
            before = self.render(turn, prompt=asked) if turn else None
            after = self.render(turn + 1)
            if before is None:
                before = after[: self._opening(after)]
            if not (before.startswith(text) and after.startswith(before)):
                return None
            if not asked:  # no prompt ends in what such a turn begins with
                before = after[: max(self._begin(turn), len(text))]
            spans.append(Span(len(before), len(after), weight))
            text = after
        return Example(text, tuple(spans))

    def _begin(self, turn: int) -> int:
        """Returns where the content of a turn begins: where another one would stand."""
        message = self.messages[turn]
        parts = [{"type": "text", "text": _PROBE}]
        said = parts if isinstance(message.get("content"), list) else _PROBE
        messages = [*self.messages[:turn], {**message, "content": said}]
        return self.template.render(messages, **self.variables).find(_PROBE)

    def _opening(self, text: str) -> int:
        """Returns where the content of a first turn begins, which has no prompt."""
        content = text_of_parts(self.messages[0].get("content")).strip()
        return max(text.find(content), 0) if content else 0

    def one_each(self) -> list[Example]:
        """Makes an example of each turn that counts."""
        examples = []
        for turn, weight in zip(self.turns, self.weights, strict=True):
            if not weight:
                continue
            text = self.render(turn + 1)
            prompt = self.render(turn, prompt=True) if turn else ""
            if not turn:
                prompt = text[: self._opening(text)]
            if not text.startswith(prompt):
                prompt, answer = self._parts(turn, prompt, text)
                text = prompt + answer
            examples.append(Example(text, (Span(len(prompt), len(text), weight),)))
        return examples

    def _parts(self, turn: int, prompt: str, text: str) -> tuple[str, str]:
        """Returns (prompt, answer) where the prompt does not begin the rendered text.

        The answer is what the text has beyond their common beginning, which has to hold
        the history.
        """
        start = len(os.path.commonprefix([prompt, text]))
        asked = text_of_parts(self.messages[turn - 1].get("content")).strip()
        if asked not in prompt[:start] or not start:
            # The history is another there: the answer follows the question's own end.
            end = prompt[prompt.rfind(asked) :] if asked else ""
            at = text.rfind(end)
            if end and at >= 0:
                return prompt, text[at + len(end) :]
            raise DataError(
                "the chat template renders earlier turns differently later on, so the "
                "assistant's part cannot be told apart; use 'input' and 'output' rows"
            )
        content = text_of_parts(self.messages[turn].get("content"))
        history = len(os.path.commonprefix([self.render(turn), text]))
        # What an answer has in common with the prompt's end by chance is the answer's.
        for part in (content.strip(), content.rpartition(_CLOSE)[2].strip()):
            if part and (at := text.find(part, history)) >= 0:
                start = min(start, at)
                break
        # A tag is not cut in two.
        tag = text.rfind("<", max(0, start - 40), start)
        start = tag if tag >= 0 and ">" not in text[tag:start] else start
        tail = text[start:]
        if _CLOSE in prompt[start:] and _CLOSE in tail:
            thought, _, rest = tail.partition(_CLOSE)
            if thought.replace(_OPEN, "").strip():
                return text[:start], tail  # the prompt has none, and the row has one
            return prompt, rest
        if _OPEN in prompt[start:] and _CLOSE not in prompt[start:] + tail:
            tail = self._thought(turn, prompt) + tail.lstrip("\n")
        return prompt, tail

    def _thought(self, turn: int, prompt: str) -> str:
        """Returns the reasoning that a prompt has opened and the template left out."""
        message = self.messages[turn]
        content = text_of_parts(message.get("content"))
        thought, closed, _ = content.rpartition(_CLOSE)
        if not closed:
            named = ("reasoning_content", "thinking", "reasoning")
            thought = next((message[k] for k in named if message.get(k)), "")
            if not thought:
                return ""
            return f"{thought.strip()}\n{_CLOSE}\n\n"
        thought = thought.rpartition(_OPEN)[2]
        if prompt.endswith("\n"):
            thought = thought.removeprefix("\n")
        return f"{thought}{_CLOSE}\n\n"
