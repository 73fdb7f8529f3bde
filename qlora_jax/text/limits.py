"""What a chat template may take: steps, time, characters, and the size of each value.

Templates are programs that come with a download. A step is a round of a loop, and work of
about its size: calls, filters and values that are made count for several. What a result may
grow to is bounded before it is made, as one call in C would not come back to be asked.
"""

import contextvars
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jinja2

MAX_STEPS = 2_000_000
"""Steps of one rendering."""

MAX_SECONDS = 3.0
"""Time of the processor that one rendering may take, which ends what steps do not count."""

MAX_CHARACTERS = 8_000_000
"""Length of one rendering, and of any text in it."""

MAX_SOURCE = 256_000
"""Length of a template."""

MAX_BITS = 10_000
"""Size of a whole number."""

CALL = 10
"""Steps of a call."""

A_STEP = 16
"""Characters or items that count as a step."""

_PER_CLOCK = 16
"""Steps between looks at the clock."""


class Stopped(jinja2.TemplateError):
    """A rendering has reached one of the limits."""


class Rendering:
    """What is known of a rendering while it goes on.

    Attributes:
      marks: (start, end) of each generation block in the text.
      length: Characters of the text so far.
    """

    def __init__(self) -> None:
        self.marks: list[tuple[int, int]] = []
        self.length = 0
        self._steps, self._look, self._written = 0, _PER_CLOCK, 0
        self._ends = time.thread_time() + MAX_SECONDS

    def step(self, count: int = 1) -> None:
        """Counts steps, and now and then looks at the clock."""
        self._steps += count
        if self._steps > MAX_STEPS:
            raise Stopped(f"it takes more than {MAX_STEPS} steps")
        if self._steps >= self._look:
            self._look = self._steps + _PER_CLOCK
            if time.thread_time() > self._ends:
                raise Stopped(f"it takes more than {MAX_SECONDS:g} s")

    def write(self, count: int) -> None:
        """Counts characters that are put into a text, here or in one of its blocks."""
        self._written += count
        # Blocks in blocks are counted once at each level.
        if self._written > 4 * MAX_CHARACTERS or self.length > MAX_CHARACTERS:
            raise Stopped(f"it writes more than {MAX_CHARACTERS} characters")

    def made(self, value: Any) -> Any:
        """Returns a value that an operation has made, when it is not too large."""
        if isinstance(value, str):
            size = len(value)
        elif isinstance(value, (list, tuple, dict)):
            size = size_of(value)
        elif isinstance(value, int):
            size = 0
            if value.bit_length() > MAX_BITS:
                raise Stopped(f"it makes a number of over {MAX_BITS} bits")
        else:
            return value
        if size >= A_STEP:
            self.step(size // A_STEP)
        if size > MAX_CHARACTERS:
            raise Stopped(f"it makes a value of over {MAX_CHARACTERS}")
        return value

    def power(self, left: Any, right: Any) -> None:
        """Refuses a power that would be too large a number."""
        if isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > MAX_BITS:
                raise Stopped(f"it makes a number of over {MAX_BITS} bits")

    def product(self, value: Any, others: Iterable[Any]) -> None:
        """Refuses an operation whose result may have its operands' sizes multiplied.

        Args:
          value: What it is done to: a text that is formatted, replaced in, repeated.
          others: Its other operands; a number counts as itself, as a width or a count is.
        """
        more = sum(map(_extent, others))
        if (1 + size_of(value)) * (1 + more) > 16 * MAX_CHARACTERS:
            raise Stopped(f"it may make a value of over {MAX_CHARACTERS}")


CURRENT: contextvars.ContextVar[Rendering] = contextvars.ContextVar("rendering")


def size_of(value: Any) -> int:
    """Returns how much a value has in it: characters and items, however deep.

    What is in it twice counts twice, as it would be printed. It stops above MAX_CHARACTERS.
    """
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, (list, tuple, Mapping, range)):
        return 1
    size, waiting = 0, [value]
    while waiting and size <= MAX_CHARACTERS:
        one = waiting.pop()
        if isinstance(one, str):
            size += 1 + len(one)
        elif isinstance(one, range):
            size += len(one)
        elif isinstance(one, (list, tuple)):
            size += 1 + len(one)
            waiting += one
        elif isinstance(one, Mapping):
            size += 1 + 2 * len(one)
            waiting += one.keys()
            waiting += one.values()
    return size


def _extent(value: Any) -> int:
    if isinstance(value, int):
        return abs(value)
    return size_of(value)


def widths(text: Any) -> list[int]:
    """Returns the numbers in a text that formats others, such as 9 in '%9d'."""
    if not isinstance(text, str):
        return []
    return [int(number[:18]) for number in re.findall(r"\d+", text[:MAX_CHARACTERS])]


def each(values: Iterable[Any], run: Rendering) -> Iterator[Any]:
    """Yields values of a loop, each a step."""
    for value in values:
        run.step()
        yield value
