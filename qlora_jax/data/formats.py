"""Row formats: one JSON object to a list of text segments, trained on or not.

{"input", "output"}                     BOS input | output EOS        (qlora.py)
{"instruction", "input", "output"}      Alpaca prompt | output EOS
{"messages": [{"role", "content"}]}     the chat template; assistant turns train
{"text"}                                BOS text EOS, all of it trains
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from qlora_jax.data.config import DataConfig
from qlora_jax.errors import DataError


@runtime_checkable
class ChatTokenizer(Protocol):
    """What formats need of a tokenizer."""

    def chat(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = False
    ) -> str:
        """Renders messages."""
        ...


class Segment(NamedTuple):
    """A piece of text, and whether its tokens train."""

    text: str
    trains: bool


class Example(NamedTuple):
    """A row's segments, and whether BOS and EOS go around them (chat has its own)."""

    segments: list[Segment]
    wrap: bool


# The prompts of Stanford Alpaca, which models tuned on its format expect verbatim.
_ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
)
_ALPACA_MORE = ", paired with an input that provides further context"


def format_row(
    row: dict[str, Any], config: DataConfig, tokenizer: ChatTokenizer
) -> Example:
    """Turns a row into segments.

    Raises:
      DataError: the row has none of the known sets of keys, or a value of another type.
    """
    prompt_key, answer_key = config.input_key, config.output_key
    if "messages" in row:
        return Example(_chat(row["messages"], tokenizer), wrap=False)
    if "instruction" in row and answer_key in row:
        more = text_of(row, prompt_key) if row.get(prompt_key) else ""
        prompt = _ALPACA.format(
            more=_ALPACA_MORE if more else "", instruction=text_of(row, "instruction")
        )
        prompt += f"### Input:\n{more}\n\n" if more else ""
        prompt += "### Response:\n"
        answer = Segment(text_of(row, answer_key), True)
        return Example([Segment(prompt, False), answer], wrap=True)
    if prompt_key in row and answer_key in row:
        prompt, answer = text_of(row, prompt_key), text_of(row, answer_key)
        return Example([Segment(prompt, False), Segment(answer, True)], wrap=True)
    if "text" in row:
        return Example([Segment(text_of(row, "text"), True)], wrap=True)
    have = ", ".join(map(repr, row)) or "no keys"
    raise DataError(
        f"has {have}; expected {prompt_key!r} and {answer_key!r}, 'instruction' and "
        f"{answer_key!r}, 'messages', or 'text'"
    )


def text_of(row: dict[str, Any], key: str) -> str:
    """Returns a row's string, which Unicode can encode.

    Raises:
      DataError: it is another type, or half of a surrogate pair.
    """
    text = row[key]
    if not isinstance(text, str):
        raise DataError(f"{key!r} is {type(text).__name__}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{key!r} is no Unicode text: {error}") from None
    return text


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Returns a conversation's messages.

    Raises:
      DataError: it is no list of roles and contents.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError("'messages' is not a list with something in it")
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError("'messages' has an entry without 'role' and 'content'")
        for key in ("role", "content"):
            text_of(message, key)
    return messages


def _chat(messages: Any, tokenizer: ChatTokenizer) -> list[Segment]:
    messages = checked_messages(messages)
    segments, done = [], ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.chat(messages[:i], add_generation_prompt=True)
        after = tokenizer.chat(messages[: i + 1])
        if not (before.startswith(done) and after.startswith(before)):
            raise DataError(
                "the chat template renders earlier turns differently later on, so the "
                "assistant's part cannot be told apart; use 'input' and 'output' rows"
            )
        segments.append(Segment(before[len(done) :], False))
        segments.append(Segment(after[len(before) :], True))
        done = after
    if not segments:
        raise DataError("'messages' has no assistant turn to learn from")
    return segments
