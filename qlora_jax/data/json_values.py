"""The values of a JSON file, one after another, in the memory of the largest of them."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from qlora_jax.errors import DataError
from qlora_jax.inputs import MAX_CONTAINERS, check_depth

MAX_VALUE = 64 << 20
"""Characters of a value in an array."""

MAX_WHOLE = 1 << 30
"""Characters of a value that is not in an array: it may hold all rows."""

_PER_CONTAINER = 16
"""Characters that a list or an object has at least, beyond MAX_CONTAINERS of them."""

_READ = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")


def not_utf8(path: Path, line: int, column: int, byte: int) -> str:
    """Says that a byte of a file, the first in its line being 1, is no UTF-8."""
    return (
        f"{path}:{line}: is not UTF-8: byte {column} of the line is 0x{byte:02x}; save "
        "the file as UTF-8 (editors on Windows write Windows-1252)"
    )


def values_of(stream: Any, path: Path) -> Iterator[tuple[Any, bool]]:
    """Yields values that stand one after another, those of an array singly.

    Args:
      stream: The bytes of the file.
      path: The file to name in an error.

    Returns:
      Each value, and whether it stands in the array that the file begins with.

    Raises:
      DataError: it is not UTF-8 or not JSON, or a value is too large.
    """
    window = _Window(stream, path)
    if window.next() == "[":
        window.at += 1
        mark = window.next()
        while mark != "]":
            yield window.value(MAX_VALUE), True
            mark = window.next()
            if mark not in (",", "]"):
                window.refuse("Expecting ',' delimiter")
            if mark == ",":
                window.at += 1
                if window.next() == "]":
                    window.refuse("Expecting value")
        window.at += 1
    while window.next():
        yield window.value(MAX_WHOLE), False


class _Window:
    """The text of a file, of which as much is held as one value needs.

    Attributes:
      text: What is held.
      at: The place in it up to which it is used.
    """

    def __init__(self, stream: Any, path: Path):
        self.text, self.at = "", 0
        self._stream, self._path = stream, path
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._line, self._column, self._ended = 1, 0, False
        self._lines_read, self._since = (
            1,
            0,
        )  # line breaks, and the bytes after the last
        self._scan = json.JSONDecoder().raw_decode
        self._more()

    def next(self) -> str:
        """Passes over space; returns the character that comes next, "" at the end."""
        while True:
            found = _SPACE.match(self.text, self.at)
            assert found is not None
            self.at = found.end()
            if self.at < len(self.text) or self._ended:
                return self.text[self.at : self.at + 1]
            self._more()

    def value(self, most: int) -> Any:
        """Returns the value that comes next, of at most so many characters."""
        while True:
            try:
                value, end = self._scan(self.text, self.at)
                number = isinstance(value, (int, float))
                # One that is cut is a shorter one: 1 of 1e+9.
                if not number or end + 3 <= len(self.text) or self._ended:
                    break
            except json.JSONDecodeError as error:
                if self._ended:
                    self.refuse(error.msg, error.pos)
            except RecursionError:
                raise DataError(
                    f"{self._path} is not JSON: nested too deeply"
                ) from None
            except ValueError:
                raise DataError(
                    f"{self._path} has a number of more digits than any has"
                ) from None
            self._more()
            size = len(self.text)
            count = self.text.count("[") + self.text.count("{")
            if size > most or count > 2 * MAX_CONTAINERS + size // _PER_CONTAINER:
                raise DataError(
                    f"{self._path}:{self._line}: has a value of more than {most >> 20} MiB, "
                    f"or of more than {MAX_CONTAINERS} lists and objects"
                )
        check_depth(value, self._path, DataError)
        self.at = end
        return value

    def refuse(self, message: str, at: int | None = None) -> NoReturn:
        """Raises the error of what is no JSON, at the next character or another."""
        at = self.at if at is None else at
        breaks = self.text.count("\n", 0, at)
        column = at - self.text.rfind("\n", 0, at)
        column += 0 if breaks else self._column
        raise DataError(
            f"{self._path}:{self._line + breaks}: is not JSON: {message} (column {column})"
        )

    def _more(self) -> None:
        """Drops what is used, and reads about as much as is held."""
        breaks = self.text.count("\n", 0, self.at)
        self._line += breaks
        since = self.at - (self.text.rfind("\n", 0, self.at) + 1)
        self._column = since if breaks else self._column + since
        kept = self.text[self.at :]
        data = self._stream.read(max(_READ, len(kept)))
        self._ended = not data
        try:
            self.text, self.at = kept + self._utf8.decode(data, self._ended), 0
        except UnicodeDecodeError as error:
            at = len(data) - len(error.object) + error.start  # before 0: read earlier
            line = self._lines_read + data.count(b"\n", 0, max(0, at))
            before = 0 if line > self._lines_read else self._since
            column = before + at - data.rfind(b"\n", 0, max(0, at))
            raise DataError(
                not_utf8(self._path, line, column, error.object[error.start])
            ) from None
        self._lines_read += data.count(b"\n")
        _, broken, after = data.rpartition(b"\n")
        self._since = len(after) + (0 if broken else self._since)
