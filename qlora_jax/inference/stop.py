"""Texts that end an answer.

A text can be spelled by different tokens, and one token can hold its end and what follows.
So what is looked for is looked for in the decoded text.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Stop(NamedTuple):
    """What ends an answer.

    Attributes:
      ids: Ids that end a row.
      texts: Texts that end a row; they and what follows them are left out.
      decode: Turns ids into text; used where there are texts.
    """

    ids: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    decode: Callable[[Sequence[int]], str] = lambda ids: ""

    @classmethod
    def of(cls, tokenizer: Any, texts: Sequence[str] = (), *, chat: bool) -> "Stop":
        """Returns what ends answers.

        Args:
          tokenizer: The tokenizer, from `load`.
          texts: Texts that end an answer besides. A special token's text counts as its id,
            since decoded text does not show it.
          chat: Answers are turns of a chat template, which may end in a token that is
            none of the model's EOS.
        """
        ids = tokenizer.stop_ids if chat else tokenizer.eos_ids
        special = {
            text: token
            for text in texts
            if (token := tokenizer.id_of(text)) is not None
            and not tokenizer.decode([token])
        }
        ids = tuple(dict.fromkeys((*ids, *special.values())))
        rest = tuple(text for text in texts if text not in special)
        return cls(ids, rest, tokenizer.decode)

    def reached(self, ids: Sequence[int]) -> bool:
        """Returns whether one of the texts is in these ids' text."""
        if not self.texts:
            return False
        text = self.decode(ids)
        return any(stop in text for stop in self.texts)

    def first(self, ids: Sequence[int], start: int = 0) -> int | None:
        """Returns how many ids it takes, at least `start`, to hold one of the texts."""
        if not self.reached(ids):
            return None
        return next(n for n in range(start, len(ids) + 1) if self.reached(ids[:n]))

    def cut(self, text: str) -> str:
        """Returns a text up to the first of the texts."""
        found = [at for stop in self.texts if (at := text.find(stop)) >= 0]
        return text[: min(found, default=len(text))]
