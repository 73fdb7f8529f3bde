"""DataConfig: how rows become tokens."""

import dataclasses
import functools
from typing import Literal

from qlora_jax.errors import ConfigError

TooLong = Literal["error", "drop", "truncate", "split"]
Packing = Literal["auto", "on", "off", "drawn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """These settings say how rows are read, tokenized and weighted in the loss."""

    max_tokens: int = 1024
    """Longest row, in tokens, prompt and answer together."""

    too_long: TooLong = "error"
    """What to do with a longer row: error (count and name them), drop, truncate (cut the
    end of the answer), or split (into several, of which each is a document of its own)."""

    packing: Packing = "auto"
    """How rows are laid into batches. on packs several into one, so that next to nothing
    is padding; they do not see each other, and a step has as many as without. off groups
    rows by length. auto is on where the objective can learn from packed rows, else off.
    drawn pads rows as they are drawn, as runs did before there was this setting."""

    train_on_prompt: bool = False
    """Count the loss on the prompt too, not on the answer alone."""

    train_on: tuple[str, ...] = ("assistant",)
    """Count the loss on the turns of these roles in a conversation: assistant, user, system,
    tool. Of others than the assistant, what a turn says counts, and its end."""

    columns: tuple[str, ...] = ()
    """Fields by the names that are known here, for rows that call them otherwise:
    input=question output=answer. `qlora data` lists the names of each form."""

    input_key: str = "input"
    """Name of the prompt's field; the same as --data.columns input=NAME."""

    output_key: str = "output"
    """Name of the answer's field; the same as --data.columns output=NAME."""

    prompt_template: str | None = None
    """What the prompt of a row is made of, in Jinja's language, or a file with it:
    'Question: {{ question }} Answer: '. The answer is the field `output`."""

    chat: bool = False
    """Put rows that have a prompt and an answer through the model's chat template, as a
    user's turn and the assistant's."""

    chat_template: str | None = None
    """Template for rows with messages: a file in Jinja's language, or the name of one of the
    model's own, where it has several; None for the model's."""

    eval_rows: int = 0
    """Rows held out of the training rows for the eval loss (ignored with eval data)."""

    def __post_init__(self):
        if self.max_tokens < 2:
            raise ConfigError(
                f"--data.max-tokens is {self.max_tokens}, expected at least 2"
            )
        if self.eval_rows < 0:
            raise ConfigError(
                f"--data.eval-rows is {self.eval_rows}, expected 0 or more"
            )
        roles = ("assistant", "user", "system", "tool")
        if not self.train_on or not {*self.train_on} <= {*roles}:
            given = " ".join(self.train_on) or "nothing"
            raise ConfigError(
                f"--data.train-on is {given}, expected some of {', '.join(roles)}"
            )
        names = [text.partition("=")[0] for text in self._renamings()]
        for text in self.columns:
            name, _, field = text.partition("=")
            if not (name and field):
                raise ConfigError(f"--data.columns: {text!r}, expected NAME=FIELD")
            if names.count(name) > 1:
                raise ConfigError(f"--data.columns: {name!r} is given twice")

    def _renamings(self) -> list[str]:
        texts = list(self.columns)
        for name, key in (("input", self.input_key), ("output", self.output_key)):
            if key != name:
                texts.append(f"{name}={key}")
        return texts

    @functools.cached_property
    def renamed(self) -> dict[str, str]:
        """The field that stands for each name, where it has another."""
        pairs = (text.partition("=") for text in self._renamings())
        return {name: field for name, _, field in pairs}
