"""Text to ids and back, with special tokens and chat templates."""

import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import tokenizers

from qlora_jax.errors import ConfigError, DataError
from qlora_jax.inputs import read_text
from qlora_jax.text import bounded
from qlora_jax.text.chat import ChatTemplate
from qlora_jax.text.folder import (
    DEFAULT,
    FILES,
    TEMPLATES,
    read_folder,
)

__all__ = ["FILES", "TEMPLATES", "Encoded", "Tokenizer"]

logger = logging.getLogger(__name__)


class Encoded(NamedTuple):
    """A text's ids, and the (start, end) in its characters of each."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Tokenizer:
    """Text to ids and back.

    Attributes:
      bos_id: Id that begins input/output rows, or None where the model has none.
      eos_ids: Ids that end a text, the tokenizer's first; may be empty.
      before: Ids that the tokenizer itself puts before a plain text.
      after: Ids that it puts after one.
      vocab_size: Ids it knows, added tokens included.
      chat_templates: Name -> Jinja source; "default" counts unless another is chosen.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        chat_template: str | Mapping[str, str] | None = None,
        special_tokens: dict[str, str] | None = None,
        before: Sequence[int] | None = None,
        after: Sequence[int] = (),
    ):
        """Makes one of its parts; without `before`, a plain text begins with the BOS."""
        self._tokenizer = tokenizer
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        if before is None:
            before = () if bos_id is None else (bos_id,)
        self.before, self.after = tuple(before), tuple(after)
        if isinstance(chat_template, str):
            chat_template = {DEFAULT: chat_template}
        self.chat_templates = dict(chat_template or {})
        self._special_tokens = special_tokens or {}

    @classmethod
    def open(cls, folder: Path) -> "Tokenizer | None":
        """Reads a model folder's tokenizer; None where it has none.

        Raises:
          CheckpointError: a file is there and cannot be read, or needs a converter that
            is not installed.
        """
        parts = read_folder(folder)
        if parts is None:
            return None
        before, after = _around(parts.tokenizer)
        return cls(
            parts.tokenizer,
            bos_id=parts.bos_id,
            eos_ids=parts.eos_ids,
            chat_template=parts.templates,
            special_tokens=parts.special_tokens,
            before=before,
            after=after,
        )

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the template that counts, or None."""
        return self.chat_templates.get(DEFAULT)

    def save_vocabulary(self, folder: Path) -> None:
        """Writes tokenizer.json alone."""
        folder.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(folder / "tokenizer.json"))

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and generation_config.json."""
        self.save_vocabulary(folder)
        settings: dict[str, Any] = dict(self._special_tokens)
        if self.bos_id is None:  # null says that none is put before a text
            settings["bos_token"] = None
        if self.chat_template is not None and len(self.chat_templates) == 1:
            settings["chat_template"] = self.chat_template
        elif self.chat_templates:
            settings["chat_template"] = [
                {"name": name, "template": text}
                for name, text in self.chat_templates.items()
            ]
        for name, content in (
            ("tokenizer_config.json", settings),
            ("generation_config.json", {"eos_token_id": list(self.eos_ids)}),
        ):
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (folder / name).write_text(text + "\n", encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Ids it knows."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def rows(self) -> int:
        """Rows that an embedding needs: the largest id and one."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def identity(self) -> str:
        """A digest of all that ids and renderings follow from."""
        parts = [
            self._tokenizer.to_str(),
            self.bos_id,
            self.eos_ids,
            self.before,
            self.after,
            self.chat_templates,
            self._special_tokens,
        ]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    def id_of(self, text: str) -> int | None:
        """Returns the id of a text that is one token, else None."""
        return self._tokenizer.token_to_id(text)

    def token_of(self, token: int) -> str | None:
        """Returns the text of an id, as the vocabulary has it."""
        return self._tokenizer.id_to_token(token)

    def with_tokens(self, tokens: Sequence[str]) -> tuple["Tokenizer", tuple[int, ...]]:
        """Returns a tokenizer that has these texts as tokens, and their ids."""
        larger = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        larger.add_tokens(list(tokens))
        ids = tuple(cast(int, larger.token_to_id(text)) for text in tokens)
        return self._with(larger), ids

    def with_vocabulary(self, other: "Tokenizer") -> "Tokenizer":
        """Returns one that splits text as another does, with this one's settings."""
        return self._with(other._tokenizer)

    def with_chat_template(self, choice: str) -> "Tokenizer":
        """Returns one with another chat template.

        Args:
          choice: A file with a template, or the name of one that the model has.

        Raises:
          ConfigError: it is neither.
        """
        path = Path(choice).expanduser()
        if path.is_file():
            text = read_text(path)
        elif choice in self.chat_templates:
            text = self.chat_templates[choice]
        else:
            names = ", ".join(self.chat_templates) or "none"
            raise ConfigError(
                f"--data.chat-template {choice} is no file, and no template of this model "
                f"(it has: {names})"
            )
        return self._with(self._tokenizer, {DEFAULT: text})

    def _with(
        self,
        tokenizer: tokenizers.Tokenizer,
        chat_templates: Mapping[str, str] | None = None,
    ) -> "Tokenizer":
        return Tokenizer(
            tokenizer,
            bos_id=self.bos_id,
            eos_ids=self.eos_ids,
            chat_template=chat_templates or self.chat_templates,
            special_tokens=self._special_tokens,
            before=self.before,
            after=self.after,
        )

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without BOS or EOS."""
        return bounded.encode(self._tokenizer, [text])[0].ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of many texts, in parallel."""
        return [one.ids for one in bounded.encode(self._tokenizer, texts)]

    def encode_offsets(self, texts: Sequence[str]) -> list[Encoded]:
        """Returns the ids of many texts with their places, in parallel."""
        encoded = bounded.encode(self._tokenizer, texts)
        return [Encoded(one.ids, one.offsets) for one in encoded]

    def encode_after(self, text: str) -> list[int]:
        """Returns the ids of a text that follows another.

        A SentencePiece tokenizer puts a space before the first word that it is given;
        here a line break stands there, and is taken away again.
        """
        line = self.encode("\n")
        ids = self.encode("\n" + text)
        return ids[len(line) :] if ids[: len(line)] == line else self.encode(text)

    def begun(
        self, ids: Sequence[int], before: Sequence[int] | None = None
    ) -> list[int]:
        """Returns ids with what goes before a plain text, unless they begin with it."""
        before = list(self.before if before is None else before)
        return [*ids] if [*ids[: len(before)]] == before else [*before, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, special tokens left out."""
        return bounded.decode(self._tokenizer, ids, special=False)

    def text_of(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, special tokens too."""
        return bounded.decode(self._tokenizer, ids, special=True)

    def template(self, *, tools: bool = False) -> ChatTemplate:
        """Returns the chat template for conversations with or without tools.

        Raises:
          DataError: there is none.
        """
        name = "tool_use" if tools and "tool_use" in self.chat_templates else DEFAULT
        if name in self._templates:
            return self._templates[name]
        if self.chat_templates:
            names = ", ".join(self.chat_templates)
            raise DataError(
                f"this model has several chat templates ({names}) and none is its "
                "default; choose one with --data.chat-template"
            )
        raise DataError(
            "this model's tokenizer has no chat template, so rows with 'messages' "
            "cannot be rendered; give one with --data.chat-template FILE, or use rows "
            "with 'input' and 'output'"
        )

    @functools.cached_property
    def _templates(self) -> dict[str, ChatTemplate]:
        return {
            name: ChatTemplate(text, self._special_tokens)
            for name, text in self.chat_templates.items()
        }

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """Renders messages through the chat template.

        Args:
          messages: {"role", "content", ...}.
          add_generation_prompt: End with what the assistant's answer comes after.
          **variables: `tools`, `documents`, and what else the template takes.

        Raises:
          DataError: there is no template, or it refuses the messages.
        """
        template = self.template(tools=variables.get("tools") is not None)
        return template.render(
            messages, add_generation_prompt=add_generation_prompt, **variables
        )

    @functools.cached_property
    def chat_ends(self) -> tuple[int, ...]:
        """The id that ends an assistant turn in the chat template; empty without one."""
        if DEFAULT not in self._templates:
            return ()
        asked, said = "a question", "an answer"
        turns = [("user", asked), ("assistant", said)]
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            text = self._templates[DEFAULT].render(messages)
        except DataError:
            return ()
        added = self._tokenizer.get_added_tokens_decoder()
        tail = text[text.rfind(said) + len(said) :] if said in text else ""
        ids = (i for i in self.encode(tail) if i in added and added[i].content.strip())
        return tuple(ids)[:1]

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids at which the answer in a chat ends: the EOS, and what ends its turns."""
        return tuple(dict.fromkeys((*self.eos_ids, *self.chat_ends)))


def _around(tokenizer: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the ids that a tokenizer puts before and after a text."""
    bare = bounded.encode(tokenizer, ["a"])[0].ids
    whole = bounded.encode(tokenizer, ["a"], special=True)[0].ids
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return tuple(whole[:start]), tuple(whole[start + len(bare) :])
    return (), ()
