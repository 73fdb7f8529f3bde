"""Calls of the package tokenizers, which do what a model's tokenizer.json says.

Its patterns may be made so that matching them takes for ever, and the package cannot be
stopped. So what it does with a text is done in a thread, and after a limit an error is raised;
the thread goes on until the process ends.
"""

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import tokenizers

from qlora_jax.errors import CheckpointError

T = TypeVar("T")

MAX_SECONDS = 8.0
"""Time, also of the processor, that a call may take beside what its texts' length allows."""

CHARACTERS_PER_SECOND = 200_000
"""Characters for which a call gets another second: a fifth of what the slowest do."""

MAX_PATTERNS = 20_000
"""Characters of all patterns of a tokenizer.json; the package takes 12 kB for one of them."""

_KEY = b"".join(rb"(?:%c|\\u%04x)" % (letter, letter) for letter in b"Regex")
_PATTERN = re.compile(rb'"' + _KEY + rb'"\s*:\s*"((?:[^"\\]|\\.)*)"')


def encode(
    tokenizer: tokenizers.Tokenizer, texts: Sequence[str], *, special: bool = False
) -> list[Any]:
    """Encodes texts.

    Args:
      tokenizer: The package's tokenizer.
      texts: The texts.
      special: Put what the tokenizer itself puts around a text.

    Raises:
      CheckpointError: the package fails, or it takes too long.
    """
    texts = list(texts)
    return _bounded(
        lambda: tokenizer.encode_batch(texts, add_special_tokens=special),
        sum(map(len, texts)),
        "characters",
    )


def decode(
    tokenizer: tokenizers.Tokenizer, ids: Sequence[int], *, special: bool
) -> str:
    """Decodes ids, with special tokens or without; errors as `encode` has them."""
    # `decode` would keep all other threads waiting.
    return _bounded(
        lambda: tokenizer.decode_batch([list(ids)], skip_special_tokens=not special),
        len(ids),
        "tokens",
    )[0]


def check_patterns(data: bytes, where: object) -> None:
    """Refuses a tokenizer.json whose patterns would take much memory when they are compiled.

    Raises:
      CheckpointError: they are too long.
    """
    size = sum(len(found[1]) for found in _PATTERN.finditer(data))
    if size > MAX_PATTERNS:
        raise CheckpointError(
            f"{where} has regular expressions of {size} bytes, expected at most "
            f"{MAX_PATTERNS}"
        )


@contextlib.contextmanager
def no_panic() -> Iterator[None]:
    """Raises CheckpointError for what the package tokenizers panics with.

    That is no Exception. It comes of a tokenizer.json whose parts do not fit each other.
    """
    try:
        yield
    except BaseException as error:  # a panic is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"tokenizer.json is damaged: the package tokenizers fails with {error}"
        ) from None


def _bounded(call: Callable[[], T], size: int, unit: str) -> T:
    """Returns what a call gives, which leaves other threads free while it works."""
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:  # of any kind, and a panic: raised below
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    allowed = MAX_SECONDS + size / CHARACTERS_PER_SECOND
    began, worked = time.monotonic(), time.process_time()
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
        # A process that was stopped, or got no processor, has not worked.
        spent = min(time.monotonic() - began, time.process_time() - worked)
        if spent > allowed and thread.is_alive():
            raise CheckpointError(
                f"the tokenizer takes more than {allowed:.0f} s for {size} {unit}: a pattern "
                "in its tokenizer.json can be matched with such a text in too many ways; use "
                "another tokenizer.json, or leave such texts out (long runs of one character)"
            )
    if errors:
        with no_panic():
            raise errors[0]
    return results[0]
