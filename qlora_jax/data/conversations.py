"""Conversations as rows have them, brought to the messages that chat templates take.

ShareGPT's turns have `from` and `value`; a call of a function is a turn of its own, whose value
is JSON. Source of the names: FastChat's and LLaMA-Factory's datasets.
"""

from collections.abc import Mapping
from typing import Any

from qlora_jax.data.fields import listed, text_of
from qlora_jax.errors import DataError
from qlora_jax.inputs import parse_json
from qlora_jax.text.chat import checked_messages

_ROLES = {
    "user": ("human", "user"),
    "assistant": ("gpt", "assistant", "model", "chatgpt", "bing", "bard", "bot"),
    "system": ("system",),
    "tool": ("tool", "observation", "function_response", "tool_response"),
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names}
_CALLS = ("function_call", "tool_call")


def conversation_of(
    row: Mapping[str, Any], key: str
) -> tuple[list[dict[str, Any]], set[str]]:
    """Returns the messages of a row, as chat templates take them, and the keys read."""
    turns = listed(row[key])
    if isinstance(turns, list):
        turns = [
            _message(turn) if isinstance(turn, dict) and "from" in turn else turn
            for turn in turns
        ]
    messages = checked_messages(turns, key)
    if row.get("system") and messages[0]["role"] != "system":
        system = {"role": "system", "content": text_of(row, "system")}
        return [system, *messages], {key, "system"}
    return messages, {key}


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ShareGPT's form of a turn as a message."""
    name, rest = turn["from"], {k: v for k, v in turn.items() if k != "from"}
    if not isinstance(name, str):
        raise DataError(f"'from' is {type(name).__name__}, expected a string")
    if "value" not in rest:
        raise DataError("has a turn with 'from' and without 'value'")
    said = rest.pop("value")
    if name in _CALLS:
        try:
            calls = (
                parse_json(said, "a field", error=DataError, strict=False)
                if isinstance(said, str)
                else said
            )
        except ValueError:
            raise DataError(f"has a turn of {name!r} whose value is no JSON") from None
        calls = calls if isinstance(calls, list) else [calls]
        calls = [{"type": "function", "function": call} for call in calls]
        return {"role": "assistant", "content": "", "tool_calls": calls, **rest}
    if name not in _ROLE_OF:
        known = ", ".join((*_ROLE_OF, *_CALLS))
        raise DataError(f"has a turn from {name!r}, expected one of {known}")
    return {"role": _ROLE_OF[name], "content": said, **rest}
