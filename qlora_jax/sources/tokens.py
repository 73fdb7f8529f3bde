"""Tokens that a base does not have.

New rows begin as the mean of the rows of the pieces that the text was before, so that
the model starts out near what it read until now. They train as part of an adapter:
`LoRAConfig.tokens` for rows alone, `LoRAConfig.modules_to_save` for whole tables.
"""

from collections.abc import Sequence

from qlora_jax.errors import ConfigError
from qlora_jax.models import Decoder
from qlora_jax.models.vocabulary import resize_tokens
from qlora_jax.text.tokenizer import Tokenizer


def add_tokens(
    model: Decoder, tokenizer: Tokenizer, tokens: Sequence[str]
) -> tuple[Decoder, Tokenizer, tuple[int, ...]]:
    """Adds tokens to a vocabulary; pure.

    Args:
      model: A model without adapter. Its tables grow only if they have no spare rows
        (Qwen's have).
      tokenizer: Its tokenizer.
      tokens: Texts that become one token each; those that are one already stay so.

    Returns:
      (model, tokenizer, ids of `tokens`), the ids for `LoRAConfig.tokens`.

    Raises:
      ConfigError: a token is empty or named twice.
    """
    if wrong := [text for text in tokens if not text or list(tokens).count(text) > 1]:
        raise ConfigError(f"tokens {wrong!r}: each must be named once and have a text")
    larger, ids = tokenizer.with_tokens(tokens)
    pieces = {
        number: tokenizer.encode(text)
        for text, number in zip(tokens, ids, strict=True)
        if tokenizer.id_of(text) is None
    }
    return resize_tokens(model, larger.rows, pieces), larger, ids
