"""Row formats: one JSON object to texts, and what of them trains.

{"input", "output"}                     BOS input | output EOS        (qlora.py)
{"instruction", "input", "output"}      Alpaca prompt | output EOS
{"messages": [{"role", "content"}]}     the chat template; assistant turns train
{"text"}                                as the tokenizer has a text, EOS; all of it trains

A row with messages may have `tools`, `documents`, `chat_template_kwargs`, and whatever
else the chat template takes.
"""

from collections import Counter
from typing import Any, Literal, NamedTuple

from qlora_jax.data.config import DataConfig
from qlora_jax.errors import DataError
from qlora_jax.text import Tokenizer
from qlora_jax.text.chat import checked_messages, variables_of
from qlora_jax.text.turns import Span, examples_of

Kind = Literal["pair", "text", "chat"]


class Example(NamedTuple):
    """A text, what of it trains, and how it begins and ends.

    Attributes:
      text: All of it.
      spans: What trains, in order.
      kind: pair and text get BOS and EOS around them; a chat has its own.
    """

    text: str
    spans: tuple[Span, ...]
    kind: Kind


# The prompts of Stanford Alpaca, which models tuned on its format expect verbatim.
_ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
)
_ALPACA_MORE = ", paired with an input that provides further context"


def format_row(
    row: dict[str, Any],
    config: DataConfig,
    tokenizer: Tokenizer,
    unread: Counter[str] | None = None,
) -> list[Example]:
    """Turns a row into examples: one, or one for each assistant turn.

    Args:
      row: An object.
      config: Names of its fields.
      tokenizer: With the chat template.
      unread: Counts the fields that the template has no name for.

    Raises:
      DataError: the row has none of the known sets of keys, or a value of another type.
    """
    prompt_key, answer_key = config.input_key, config.output_key
    if "messages" in row:
        return _chat(row, tokenizer, unread)
    if "instruction" in row and answer_key in row:
        more = text_of(row, prompt_key) if row.get(prompt_key) else ""
        prompt = _ALPACA.format(
            more=_ALPACA_MORE if more else "", instruction=text_of(row, "instruction")
        )
        prompt += f"### Input:\n{more}\n\n" if more else ""
        prompt += "### Response:\n"
        return [_pair(prompt, text_of(row, answer_key))]
    if prompt_key in row and answer_key in row:
        return [_pair(text_of(row, prompt_key), text_of(row, answer_key))]
    if "text" in row:
        text = text_of(row, "text")
        return [Example(text, (Span(0, len(text)),), "text")]
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


def _pair(prompt: str, answer: str) -> Example:
    whole = prompt + answer
    return Example(whole, (Span(len(prompt), len(whole)),), "pair")


def _chat(
    row: dict[str, Any], tokenizer: Tokenizer, unread: Counter[str] | None
) -> list[Example]:
    messages = checked_messages(row["messages"])
    template = tokenizer.template(tools=row.get("tools") is not None)
    variables = variables_of(row, template)
    examples = examples_of(messages, template, variables)
    if unread is not None:
        unread.update(template.unread(messages))
        unread.update(
            key
            for key in ("tools", "documents")
            if variables.get(key) and key not in template.variables
        )
    return [Example(text, spans, "chat") for text, spans in examples]
