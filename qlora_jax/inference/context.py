"""Says once where tokens pass what a model was made for."""

import logging
from typing import Any

logger = logging.getLogger(__name__)
_SAID: set[int] = set()


def say_beyond_context(config: Any, tokens: int, what: str) -> None:
    """Warns, once for each context length, that rows are longer than it.

    Args:
      config: The model's, with `max_position_embeddings`.
      tokens: The longest row's.
      what: Names the rows.
    """
    most = config.max_position_embeddings
    if tokens > most and most not in _SAID:
        _SAID.add(most)
        logger.warning(
            "%s take %d tokens; the model was made for %d positions, and what it says "
            "beyond them means little",
            what,
            tokens,
            most,
        )
