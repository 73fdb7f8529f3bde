"""Prompts to continue, from files of rows.

{"prompt"} or {"input"}                 as the tokenizer has a text; with `chat`, a user's turn
{"messages": [{"role", "content"}]}     the chat template; a last assistant turn, which a
                                        row to learn from has, is left out
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

from qlora_jax.data.fields import chosen_adapter, text_of
from qlora_jax.data.records import read_rows
from qlora_jax.errors import DataError
from qlora_jax.text import Tokenizer
from qlora_jax.text.chat import check_text, checked_messages, fitted, variables_of


class Prompt(NamedTuple):
    """A prompt to continue.

    Attributes:
      row: What it was made of.
      tokens: Ids, at least one.
      adapter: The name in the row's "adapter" field.
      chat: It went through the chat template.
    """

    row: dict[str, Any]
    tokens: list[int]
    adapter: str | None = None
    chat: bool = False

    @classmethod
    def of(
        cls,
        row: dict[str, Any],
        tokenizer: Tokenizer,
        *,
        chat: bool = False,
        adapters: tuple[str, ...] = (),
    ) -> "Prompt":
        """Makes one of a row.

        Raises:
          DataError: it has no prompt, one without tokens, or an adapter that is none of
            `adapters` (with none, the field is not looked at).
        """
        asked = _asked(row, chat)
        if isinstance(asked, str):
            tokens = tokenizer.begun(tokenizer.encode(asked))
        else:
            template = tokenizer.template(tools=row.get("tools") is not None)
            text = template.render(
                fitted(asked, template),
                add_generation_prompt=True,
                **variables_of(row, template),
            )
            check_text("the prompt that the row makes", text)
            tokens = tokenizer.encode(text)
        if not tokens:
            raise DataError("has a prompt without tokens; give at least one character")
        adapter = chosen_adapter(row, adapters) if adapters else None
        return cls(row, tokens, adapter, chat=not isinstance(asked, str))


def _asked(row: dict[str, Any], chat: bool) -> str | list[dict[str, Any]]:
    """Returns a row's text, or the messages to answer."""
    if "messages" in row:
        messages = checked_messages(row["messages"])
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise DataError("'messages' has nothing but an answer")
        return messages
    key = next((key for key in ("prompt", "input") if key in row), None)
    if key is None:
        have = ", ".join(map(repr, row)) or "no keys"
        raise DataError(f"has {have}; expected 'prompt', 'input' or 'messages'")
    text = text_of(row, key)
    return [{"role": "user", "content": text}] if chat else text


def read_prompts(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    chat: bool = False,
    adapters: tuple[str, ...] = (),
) -> list[Prompt]:
    """Reads the prompts of a file.

    Raises:
      DataError: as `read_rows` and `Prompt.of`.
    """

    def parse(row: dict[str, Any]) -> Prompt:
        return Prompt.of(row, tokenizer, chat=chat, adapters=adapters)

    return read_rows(Path(path), parse)
