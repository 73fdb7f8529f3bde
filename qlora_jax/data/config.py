"""DataConfig: how rows become tokens."""

import dataclasses
from typing import Literal

from qlora_jax.errors import ConfigError

TooLong = Literal["error", "drop", "truncate"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How rows become tokens and weights."""

    max_tokens: int = 1024
    """Longest row, in tokens, prompt and answer together."""

    too_long: TooLong = "error"
    """What to do with a longer row: error (count and name them), drop, or truncate (cut
    the end of the answer)."""

    train_on_prompt: bool = False
    """Count the loss on the prompt too, not on the answer alone."""

    input_key: str = "input"
    """Name of the prompt's field in input/output rows."""

    output_key: str = "output"
    """Name of the answer's field in input/output rows."""

    chat_template: str | None = None
    """Template for rows with messages: a file in Jinja's language, or the name of one of the
    model's own, where it has several; None for the model's."""

    eval_rows: int = 0
    """Rows held out of the training file for the eval loss (ignored with eval data)."""

    def __post_init__(self):
        if self.max_tokens < 2:
            raise ConfigError(
                f"--data.max-tokens is {self.max_tokens}, expected at least 2"
            )
        if self.eval_rows < 0:
            raise ConfigError(
                f"--data.eval-rows is {self.eval_rows}, expected 0 or more"
            )
