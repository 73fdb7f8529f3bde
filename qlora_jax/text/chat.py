"""Chat templates: a conversation as the model has it, as one text.

A template sees what transformers would show it: messages without the keys that are null,
`tools` and `documents` (None unless given), the named special tokens, and any other
variable. Reasoning is found as `reasoning_content`, and as `thinking`, whatever a row calls
it.

Source: transformers 5.24, utils/chat_template_utils.py (render_jinja_template).
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jinja2

from qlora_jax.errors import DataError
from qlora_jax.inputs import parse_json
from qlora_jax.text.environment import compiled, names_in, render
from qlora_jax.text.limits import Stopped

_REASONING = ("reasoning_content", "thinking", "reasoning")
_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PROBE = "a probe"
Contents = Literal["text", "parts", "either"]


class ChatTemplate:
    """A template with the special tokens of its tokenizer.

    Attributes:
      source: The template's text, in Jinja's language.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None):
        self.source = source
        self._special = dict(special_tokens or {})
        self._stopped: str | None = None

    @functools.cached_property
    def marks(self) -> bool:
        """Whether it marks what the assistant generates."""
        return _MARK.search(self.source) is not None

    @functools.cached_property
    def variables(self) -> frozenset[str]:
        """Variables that it takes beside the messages and the special tokens."""
        return self._names[0].difference(self._special)

    @functools.cached_property
    def _names(self) -> tuple[frozenset[str], frozenset[str]]:
        try:
            return names_in(self.source)
        except jinja2.TemplateError:
            return frozenset(), frozenset()

    @functools.cached_property
    def contents(self) -> Contents:
        """The form of a content that it renders: text, parts, or either."""
        shown = []
        for content in (_PROBE, [{"type": "text", "text": _PROBE}]):
            try:
                text = self.render([{"role": "user", "content": content}])
            except DataError:
                text = ""
            # Printed as the objects that they are, parts are not taken.
            printed = re.search("""['"]text['"]: *['"]""", text) is not None
            shown.append(_PROBE in text and not printed)
        if shown == [False, True]:
            return "parts"
        return "either" if shown[1] else "text"

    def unread(self, messages: Sequence[Mapping[str, Any]]) -> set[str]:
        """Returns the fields of messages that the template has no name for."""
        read = self._names[1] | {"role", "content", "weight"}
        # Reasoning has several names, of which the template may read any.
        if not read.isdisjoint(_REASONING):
            read = read.union(_REASONING)
        given = (pair for message in messages for pair in message.items())
        return {key for key, value in given if value is not None and key not in read}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """Returns the text of a conversation.

        Args:
          messages: {"role", "content", ...}, the content a text, or parts of it.
          add_generation_prompt: End with what the assistant's answer comes after.
          **variables: `tools`, `documents`, and what else the template takes.

        Raises:
          DataError: the template refuses the messages, or does not end.
        """
        return self.render_marked(
            messages, add_generation_prompt=add_generation_prompt, **variables
        )[0]

    def render_marked(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> tuple[str, list[tuple[int, int]]]:
        """Returns the text, and (start, end) of what its generation blocks mark."""
        values = {
            **self._special,
            "tools": None,
            "documents": None,
            **variables,
            "messages": [_shown(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        if self._stopped is not None:
            # Each row would take as long again.
            raise DataError(f"the chat template was stopped before: {self._stopped}")
        try:
            template = compiled(self.source)
            try:
                text, run = render(template, values)
            except Stopped:
                raise
            except Exception:
                # Many templates take a content for granted, beside tool calls too.
                bare = [m for m in values["messages"] if "content" not in m]
                if not bare:
                    raise
                for message in bare:
                    message["content"] = ""
                text, run = render(template, values)
            text.encode()  # half of a surrogate pair is no text
        except Stopped as error:
            self._stopped = str(error)
            raise DataError(
                f"the chat template refuses the messages: {error}"
            ) from None
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"the chat template refuses the messages: its line {error.lineno} is no "
                f"Jinja: {error.message}"
            ) from None
        except Exception as error:  # a template can fail in any way that Python can
            raise DataError(
                f"the chat template refuses the messages: {error}"
            ) from None
        return text, run.marks


def _shown(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a message as a template sees it."""
    shown = {k: v for k, v in message.items() if v is not None and k != "weight"}
    reasoning = next((shown[key] for key in _REASONING if key in shown), None)
    if reasoning is None:
        return shown
    return {"thinking": reasoning, **shown, "reasoning_content": reasoning}


def checked_messages(messages: Any, key: str = "messages") -> list[dict[str, Any]]:
    """Returns a conversation's messages.

    Raises:
      DataError: it is no list of roles and contents.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{key!r} is not a list with something in it")
    for message in messages:
        if not isinstance(message, dict) or "role" not in message:
            raise DataError(f"{key!r} has an entry without 'role' and 'content'")
        check_text("role", message["role"])
        _check_weight(message)
        content = message.get("content")
        # Tables have every key in every message, null where it has none.
        instead = (message.get(key) is not None for key in _IN_PLACE_OF_CONTENT)
        if content is None and any(instead):
            continue
        if "content" not in message:
            raise DataError(f"{key!r} has an entry without 'role' and 'content'")
        if isinstance(content, list):
            _check_parts(content)
        else:
            check_text("content", content)
    return messages


_IN_PLACE_OF_CONTENT = ("tool_calls", "function_call", *_REASONING)


def check_text(key: str, text: Any) -> None:
    """Raises DataError for what is no string, or half of a surrogate pair."""
    if not isinstance(text, str):
        raise DataError(f"{key!r} is {type(text).__name__}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{key!r} is no Unicode text: {error}") from None


def _check_parts(parts: list[Any]) -> None:
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise DataError(
                f"'content' has a part of type {kind!r}; only parts of text can be used"
            )
        check_text("text", part.get("text"))


def _check_weight(message: Mapping[str, Any]) -> None:
    weight = message.get("weight")
    if weight is None:
        return
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not number or not 0 <= weight < float("inf"):
        raise DataError(
            f"'weight' of a message is {weight!r}, expected 0, 1 or between"
        )


def text_of_parts(content: Any) -> str:
    """Returns a content as one text."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def fitted(
    messages: Iterable[dict[str, Any]], template: ChatTemplate
) -> list[dict[str, Any]]:
    """Returns messages with contents in a form that the template renders."""
    messages, form = list(messages), template.contents
    if form == "either":
        return messages
    made = []
    for message in messages:
        content = message.get("content")
        if form == "text" and isinstance(content, list):
            message = {**message, "content": text_of_parts(content)}
        if form == "parts" and isinstance(content, str):
            message = {**message, "content": [{"type": "text", "text": content}]}
        made.append(message)
    return made


def variables_of(row: Mapping[str, Any], template: ChatTemplate) -> dict[str, Any]:
    """Returns the template's variables that a row sets.

    These are `tools` and `documents`, everything in `chat_template_kwargs`, and each
    variable of the template that is a key of the row (`enable_thinking`).

    Raises:
      DataError: one of them is of another type.
    """
    found = {key: row[key] for key in template.variables if key in row}
    more = row.get("chat_template_kwargs")
    if more is not None and not isinstance(more, dict):
        raise DataError(
            f"'chat_template_kwargs' is {type(more).__name__}, expected an object"
        )
    found |= more or {}
    for key in ("tools", "documents"):
        value = found.get(key, row.get(key))
        if isinstance(value, str):  # as files of one type a column have them
            try:
                value = parse_json(value, "a field", error=DataError, strict=False)
            except ValueError:
                raise DataError(f"{key!r} is a text, and no JSON") from None
        if value is None:
            found.pop(key, None)
        elif isinstance(value, list) and all(isinstance(one, dict) for one in value):
            found[key] = value
        else:
            raise DataError(f"{key!r} is no list of objects")
    return found
