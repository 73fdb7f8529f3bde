"""The time that chat templates write: now, or when the run that goes on had begun.

It stands in a variable of the environment, as rows are tokenized by several processes.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator

VARIABLE = "QLORA_JAX_NOW"


def stopped() -> datetime.datetime | None:
    """Returns the time that it is kept at; None where it goes on."""
    text = os.environ.get(VARIABLE)
    return datetime.datetime.fromisoformat(text) if text else None


def now() -> datetime.datetime:
    """Returns the time for templates."""
    return stopped() or datetime.datetime.now()


@contextlib.contextmanager
def stopped_at(time: str) -> Iterator[None]:
    """Makes it one time, given as ISO 8601 has it, while the context lasts."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = time
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
