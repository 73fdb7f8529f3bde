"""Files of rows: JSON lines, JSON, CSV, TSV and Parquet, compressed or not.

What a file holds is told by its content; only tables of text are told by their names (.csv,
.tsv). All text is UTF-8.
"""

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

from qlora_jax.data import parquet
from qlora_jax.data.json_values import not_utf8, values_of
from qlora_jax.data.problems import Problems
from qlora_jax.data.unpacking import (
    ROW_BYTES,
    Unpacking,
    grows,
    is_packed,
    most_bytes,
    open_bytes,
)
from qlora_jax.errors import DataError
from qlora_jax.inputs import parse_json

T = TypeVar("T")
Record = tuple[int, dict[str, Any]]
"""A row's place in its file (a line, or its number, from 1), and the row."""

Kind = Literal["lines", "json", "csv", "parquet", "prose"]

_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_MAX_LINE_BYTES = 64 << 20
_PACKED = (".gz", ".zst", ".bz2", ".xz")
_OTHERS = {
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or save it as CSV",
    b"\xd0\xcf\x11\xe0": "an old spreadsheet; save it as CSV in UTF-8",
    b"ARROW1": "an Arrow file; give the folder that `datasets` saved, or save it as Parquet",
    b"SQLite format 3": "a database; export its rows",
}


def kind_of(path: Path) -> Kind:
    """Tells what a file holds, by its content; 'prose' is whatever has no rows.

    Raises:
      DataError: there is no such file, or it is of a kind that holds no text.
    """
    with Unpacking(path), open_bytes(path) as stream:
        head = stream.read(1 << 16)
    if head.startswith(_UTF16):
        raise DataError(f"{path} is UTF-16; save it as UTF-8")
    if head.startswith(b"PAR1"):
        return "parquet"
    for magic, what in _OTHERS.items():
        if head.startswith(magic):
            raise DataError(f"{path} is {what}")
    if suffix_of(path) in (".csv", ".tsv"):
        return "csv"
    named = suffix_of(path) in (".jsonl", ".ndjson")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    # Prose may begin so too: "[Enter Hamlet]", "{sic}".
    if text.startswith(b"[") and text[1:].lstrip()[:1] in (b"{", b"[", b"]", b'"'):
        return "json"
    if not (text.startswith(b"{") and text[1:].lstrip()[:1] in (b'"', b"}")):
        return "lines" if named else "prose"
    line, broken, _ = text.partition(b"\n")
    # An object that goes on below its first line is laid out for people.
    laid_out = broken and not line.rstrip().rstrip(b",").endswith(b"}")
    return "json" if laid_out and (not named or line.strip() == b"{") else "lines"


def suffix_of(path: Path) -> str:
    """Returns what a file's name ends in, beside how it is packed."""
    name = path.name.lower()
    for packed in _PACKED:
        name = name.removesuffix(packed)
    return Path(name).suffix


def read_records(path: Path, problems: Problems) -> Iterator[Record]:
    """Yields the rows of a file; empty lines are passed over.

    Args:
      path: A file of any kind that has rows: JSON lines, a JSON array, .csv, .tsv or
        Parquet.
      problems: Gets what is no row; its `lines` is set to how places count here.

    Raises:
      DataError: the file as a whole cannot be read.
    """
    kind = kind_of(path)
    if kind == "prose":
        with Unpacking(path), open_bytes(path) as stream:
            begins = stream.read(40).decode(errors="backslashreplace")
        what = f"begins with {begins!r}" if begins.strip() else "is empty"
        raise DataError(
            f"{path} has no rows: it {what}, which is no JSON; expected JSON lines, a JSON "
            'array, .csv, .tsv or Parquet (plain text can be a row {"text": "..."})'
        )
    problems.lines = kind in ("lines", "csv")
    readers: dict[Kind, Callable[[Path, Problems], Iterator[Record]]] = {
        "lines": _json_lines,
        "json": _json,
        "csv": _csv,
        "parquet": _parquet,
    }
    with Unpacking(path):
        most = most_bytes(path) // ROW_BYTES if is_packed(path) else None
        for count, record in enumerate(readers[kind](path, problems)):
            if count == most:
                raise grows(path)
            yield record


def read_rows(path: Path, parse: Callable[[dict[str, Any]], T]) -> list[T]:
    """Reads a file whole.

    Args:
      path: A file of any kind that has rows, as in `read_records`.
      parse: Makes something of a row, or raises DataError.

    Raises:
      DataError: no file, no rows, or rows that cannot be used, by kind.
    """
    problems, parsed = Problems(str(path)), []
    for place, row in read_records(path, problems):
        try:
            parsed.append(parse(row))
        except DataError as error:
            problems.add(place, str(error))
    if problems:
        problems.fail()
    if not parsed:
        raise DataError(f"{path} has no rows")
    return parsed


def _json_lines(path: Path, problems: Problems) -> Iterator[Record]:
    with open_bytes(path) as stream:
        rows = _objects(stream, path, problems)
        if (first := next(rows, None)) is None:
            return
        if (second := next(rows, None)) is None:
            # One object may hold all rows.
            held = _within(path, first[1])
            if held[0] is not first[1]:
                problems.lines = False
                yield from enumerate(held, 1)
                return
        yield first
        if second is not None:
            yield second
            yield from rows


def _objects(stream: Any, path: Path, problems: Problems) -> Iterator[Record]:
    for number, line in enumerate(_lines(stream), 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        if len(line) > _MAX_LINE_BYTES:
            raise DataError(
                f"{path}:{number}: has more than {_MAX_LINE_BYTES} bytes in a line"
            )
        text = _text(line, path, number)
        try:
            row = parse_json(text, "", error=DataError, strict=False, places=False)
        except DataError as error:
            problems.add(number, str(error).strip())
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            problems.add(number, f"is {type(row).__name__}, expected an object")


def _lines(stream: Any) -> Iterator[bytes]:
    """Yields the lines of a stream; one that is too long is cut."""
    while line := stream.readline(_MAX_LINE_BYTES + 1):
        yield line


def _json(path: Path, problems: Problems) -> Iterator[Record]:
    """Reads an array, an object that holds one, or objects one after another."""
    with open_bytes(path) as stream:
        values = values_of(stream, path)
        first = next(values, None)
        second = next(values, None)
        known = [one for one in (first, second) if one is not None]
        if len(known) == 1 and not known[0][1] and isinstance(known[0][0], dict):
            known = [(row, False) for row in _within(path, known[0][0])]
        for number, (row, _) in enumerate(chain(known, values), 1):
            if isinstance(row, dict):
                yield number, row
            else:
                problems.add(number, f"is {type(row).__name__}, expected an object")


def _within(path: Path, value: dict[str, Any]) -> list[Any]:
    """Returns the rows that an object holds, or itself as the only row."""
    lists = [
        key
        for key, one in value.items()
        if isinstance(one, list) and one and all(isinstance(x, dict) for x in one)
    ]
    known = {
        "messages",
        "conversations",
        "conversation",
        "prompt",
        "tools",
        "documents",
    }
    if not lists or known.intersection(value):
        return [value]
    if len(lists) > 1:
        names = ", ".join(map(repr, lists))
        raise DataError(
            f"{path} is one object with several lists ({names}); give a file of one of them"
        )
    return value[lists[0]]


def _csv(path: Path, problems: Problems) -> Iterator[Record]:
    """Reads a table whose first line has the names; a missing or a further cell is named."""
    with open_bytes(path) as stream:
        lines = _TableLines(stream, path)
        first = next(lines, "")
        delimiter = "\t" if suffix_of(path) == ".tsv" else ","
        if (
            delimiter not in first
        ):  # spreadsheets write ';' where ',' is the decimal sign
            delimiter = next((mark for mark in ";\t" if mark in first), delimiter)
        limit = csv.field_size_limit(_MAX_LINE_BYTES)
        try:
            reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
            names = next(reader, [])
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise DataError(
                    f"{path}:1: has {sorted(twice)} twice as names of columns"
                )
            line = reader.line_num
            for cells in reader:
                place, line, lines.held = line + 1, reader.line_num, 0
                if not cells:
                    continue
                if len(cells) == len(names):
                    yield place, dict(zip(names, cells, strict=True))
                else:
                    problems.add(
                        place,
                        f"has {len(cells)} cells, expected {len(names)} as in line 1",
                    )
        except csv.Error as error:
            raise DataError(f"{path}: is no table of text: {error}") from None
        finally:
            csv.field_size_limit(limit)


class _TableLines:
    """The lines of a table; what is in quotation marks may have several.

    Attributes:
      held: Bytes of the row that is being read.
    """

    def __init__(self, stream: Any, path: Path):
        self.held = 0
        self._path, self._lines = path, self._each(stream)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._lines)

    def _each(self, stream: Any) -> Iterator[str]:
        for number, line in enumerate(_lines(stream), 1):
            self.held += len(line)
            if self.held > _MAX_LINE_BYTES:
                raise DataError(
                    f"{self._path}:{number}: has more than {_MAX_LINE_BYTES} bytes in a row "
                    "of a table; is a quotation mark missing?"
                )
            text = _text(line, self._path, number)
            if number == 1:
                text = text.removeprefix("\ufeff")
            # Some tables have lines that end in \r alone.
            yield from io.StringIO(text, newline="") if "\r" in text[:-2] else (text,)


def _parquet(path: Path, problems: Problems) -> Iterator[Record]:
    yield from enumerate(parquet.rows_of(path), 1)


def _text(data: bytes, path: Path, line: int) -> str:
    """Decodes a line of UTF-8.

    Raises:
      DataError: it is something else; with the line and the byte.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise DataError(not_utf8(path, line, error.start + 1, byte)) from None
