"""A tokenizer.json with its special tokens and chat template."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jinja2
import jinja2.sandbox
import tokenizers

from qlora_jax.errors import CheckpointError, DataError

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""What belongs to a tokenizer in a model folder; copied along with a model."""


class Tokenizer:
    """Text to ids and back.

    Attributes:
      bos_id: Id put before a text, or None where the model has none.
      eos_ids: Ids that end a text, the tokenizer's first; may be empty.
      vocab_size: Ids it knows, added tokens included.
      chat_template: Jinja source, or None.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        chat_template: str | None = None,
        special_tokens: dict[str, str] | None = None,
    ):
        self._tokenizer = tokenizer
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        self.chat_template = chat_template
        self._special_tokens = special_tokens or {}

    @classmethod
    def open(cls, folder: Path) -> "Tokenizer | None":
        """Reads a model folder's tokenizer; None where it has no tokenizer.json.

        Raises:
          CheckpointError: a file is there and cannot be read.
        """
        path = folder / "tokenizer.json"
        if not path.exists():
            return None
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(f"{path} is no tokenizer: {error}") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        settings = read_json(folder / "tokenizer_config.json")
        special = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in settings.items()
            if key.endswith("_token") and isinstance(value, (str, dict))
        }
        ids = {key: tokenizer.token_to_id(text) for key, text in special.items()}
        generation = read_json(folder / "generation_config.json")
        model = read_json(folder / "config.json")
        eos = [ids.get("eos_token")]
        stored = generation.get("eos_token_id", model.get("eos_token_id"))
        eos += stored if isinstance(stored, list) else [stored]
        bos = ids.get("bos_token")
        # A tokenizer_config that says null means it: such models (Qwen2) use no BOS.
        if bos is None and "bos_token" not in settings:
            bos = model.get("bos_token_id")
        template = settings.get("chat_template")
        if (folder / "chat_template.jinja").exists():
            template = (folder / "chat_template.jinja").read_text()
        return cls(
            tokenizer,
            bos_id=bos,
            eos_ids=list(dict.fromkeys(i for i in eos if i is not None)),
            chat_template=template if isinstance(template, str) else None,
            special_tokens=special,
        )

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
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
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

    def id_of(self, text: str) -> int | None:
        """Returns the id of a text that is one token, else None."""
        return self._tokenizer.token_to_id(text)

    def with_tokens(self, tokens: Sequence[str]) -> tuple["Tokenizer", tuple[int, ...]]:
        """Returns a tokenizer that has these texts as tokens, and their ids."""
        larger = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        larger.add_tokens(list(tokens))
        ids = tuple(cast(int, larger.token_to_id(text)) for text in tokens)
        return self._with(larger), ids

    def with_vocabulary(self, other: "Tokenizer") -> "Tokenizer":
        """Returns one that splits text as another does, with this one's settings."""
        return self._with(other._tokenizer)

    def _with(self, tokenizer: tokenizers.Tokenizer) -> "Tokenizer":
        return Tokenizer(
            tokenizer,
            bos_id=self.bos_id,
            eos_ids=self.eos_ids,
            chat_template=self.chat_template,
            special_tokens=self._special_tokens,
        )

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without BOS or EOS."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of many texts, in parallel."""
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [one.ids for one in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, special tokens left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def chat(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = False
    ) -> str:
        """Renders messages through the chat template.

        Raises:
          DataError: there is no template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise DataError(
                "this model's tokenizer has no chat template, so rows with 'messages' "
                "cannot be rendered; use rows with 'input' and 'output'"
            )
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = lambda value, **kwargs: json.dumps(
            value, ensure_ascii=False, **kwargs
        )
        try:
            return environment.from_string(self.chat_template).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:  # a template can fail in any way that Python can
            raise DataError(
                f"the chat template refuses the messages: {error}"
            ) from None


def _refuse(message: str):
    raise jinja2.TemplateError(message)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; {} where there is no file.

    Raises:
      CheckpointError: the file is not a JSON object.
    """
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds {type(value).__name__}, expected an object"
        )
    return value
