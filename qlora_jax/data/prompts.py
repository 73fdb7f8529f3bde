"""Prompts to continue, from JSON lines.

{"prompt"} or {"input"}                 BOS prompt; with `chat`, a user's turn
{"messages": [{"role", "content"}]}     the chat template; a last assistant turn, which a
                                        row to learn from has, is left out
"""

import os
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from qlora_jax.data.formats import ChatTokenizer, checked_messages, text_of
from qlora_jax.data.jsonl import chosen_adapter, read_jsonl
from qlora_jax.errors import DataError


@runtime_checkable
class PromptTokenizer(ChatTokenizer, Protocol):
    """What prompts need of a tokenizer."""

    bos_id: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ...


class Prompt(NamedTuple):
    """A prompt to continue.

    Attributes:
      row: What it was made of.
      tokens: Ids, at least one.
      adapter: The name in the row's "adapter" field.
    """

    row: dict[str, Any]
    tokens: list[int]
    adapter: str | None = None

    @classmethod
    def of(
        cls,
        row: dict[str, Any],
        tokenizer: PromptTokenizer,
        *,
        chat: bool = False,
        adapters: tuple[str, ...] = (),
    ) -> "Prompt":
        """Makes one of a row.

        Raises:
          DataError: it has no prompt, one without tokens, or an adapter that is none of
            `adapters` (with none, the field is not looked at).
        """
        if "messages" in row:
            messages = checked_messages(row["messages"])
            if messages[-1]["role"] == "assistant":
                messages = messages[:-1]
            if not messages:
                raise DataError("'messages' has nothing but an answer")
            text, templated = tokenizer.chat(messages, add_generation_prompt=True), True
        else:
            key = next((key for key in ("prompt", "input") if key in row), None)
            if key is None:
                have = ", ".join(map(repr, row)) or "no keys"
                raise DataError(f"has {have}; expected 'prompt', 'input' or 'messages'")
            text, templated = text_of(row, key), chat
            if chat:
                turn = [{"role": "user", "content": text}]
                text = tokenizer.chat(turn, add_generation_prompt=True)
        bos = [] if templated or tokenizer.bos_id is None else [tokenizer.bos_id]
        tokens = bos + tokenizer.encode(text)
        if not tokens:
            raise DataError("has a prompt without tokens; give at least one character")
        return cls(row, tokens, chosen_adapter(row, adapters) if adapters else None)


def read_prompts(
    path: str | os.PathLike[str],
    tokenizer: PromptTokenizer,
    *,
    chat: bool = False,
    adapters: tuple[str, ...] = (),
) -> list[Prompt]:
    """Reads the prompts of a .jsonl file.

    Raises:
      DataError: as `read_jsonl` and `Prompt.of`.
    """

    def parse(row: dict[str, Any]) -> Prompt:
        return Prompt.of(row, tokenizer, chat=chat, adapters=adapters)

    return [prompt for _, prompt in read_jsonl(Path(path), parse)]
