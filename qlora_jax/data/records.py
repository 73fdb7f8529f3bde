"""Files of rows: JSON lines, JSON, CSV, TSV and Parquet, compressed or not.

What a file holds is told by its content; only tables of text are told by their names (.csv,
.tsv). All text is UTF-8.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from qlora_jax.data.problems import Problems
from qlora_jax.errors import DataError
from qlora_jax.inputs import parse_json

T = TypeVar("T")
Record = tuple[int, dict[str, Any]]
"""A row's place in its file (a line, or its number, from 1), and the row."""

Kind = Literal["lines", "json", "csv", "parquet", "prose"]

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_BZIP2, _XZ = b"BZh", b"\xfd7zXZ\x00"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_MAX_LINE_BYTES = 64 << 20
_MAX_WHOLE_BYTES = 1 << 30
ROWS = "rows (.jsonl, .json, .csv, .tsv, .parquet; also as .gz, .zst, .bz2 or .xz)"
"""What a file of rows may be, for messages."""

_PACKED = (".gz", ".zst", ".bz2", ".xz")
_OTHERS = {
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or save it as CSV",
    b"\xd0\xcf\x11\xe0": "an old spreadsheet; save it as CSV in UTF-8",
    b"ARROW1": "an Arrow file; give the folder that `datasets` saved, or save it as Parquet",
    b"SQLite format 3": "a database; export its rows",
}


def open_bytes(path: Path) -> Any:
    """Opens a file as a binary stream, unpacked (gzip, Zstandard, bzip2 or xz).

    Raises:
      DataError: there is no such file, or Zstandard needs a package that is missing.
    """
    if not path.is_file():
        raise DataError(
            f"{path} is no file; expected {ROWS}, or a dataset id such as owner/name"
        )
    with path.open("rb") as stream:
        magic = stream.read(6)
    if magic.startswith(_GZIP):
        return gzip.open(path)
    if magic.startswith(_BZIP2):
        return bz2.open(path)
    if magic.startswith(_XZ):
        return lzma.open(path)
    if magic.startswith(_ZSTD):
        stream = _arrow(path).CompressedInputStream(str(path), "zstd")
        return io.BufferedReader(stream)
    return path.open("rb")


def _arrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise DataError(
            f"{path}: reading it needs pyarrow; pip install pyarrow (the extra 'data' of "
            "qlora_jax brings it)"
        ) from None
    return pyarrow


def kind_of(path: Path) -> Kind:
    """Tells what a file holds, by its content; 'prose' is whatever has no rows.

    Raises:
      DataError: there is no such file, or it is of a kind that holds no text.
    """
    with _unpacking(path), open_bytes(path) as stream:
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


class _Unpacking:
    """Turns what goes wrong in a packed file into a DataError."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        """Begins."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Raises DataError for a file that is cut short or damaged."""
        damaged = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)
        plain = isinstance(error, OSError) and error.errno is not None
        if isinstance(error, (*damaged, OSError)) and not plain:
            raise DataError(
                f"{self.path} cannot be unpacked: {error}; it is damaged, or cut short"
            ) from None


def _unpacking(path: Path) -> _Unpacking:
    return _Unpacking(path)


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
        with _unpacking(path), open_bytes(path) as stream:
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
    with _unpacking(path):
        yield from readers[kind](path, problems)


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


def _whole(path: Path) -> str:
    """Reads a file that is one value, or one table."""
    with open_bytes(path) as stream:
        data = stream.read(_MAX_WHOLE_BYTES + 1)
    if len(data) > _MAX_WHOLE_BYTES:
        raise DataError(
            f"{path} has more than {_MAX_WHOLE_BYTES >> 20} MiB, unpacked; save it as JSON "
            "lines, which are read one by one"
        )
    return _text(data, path).removeprefix("\ufeff")


def _json(path: Path, problems: Problems) -> Iterator[Record]:
    """Reads an array, an object that holds one, or objects one after another."""
    text = _whole(path)
    decoder, values, at = json.JSONDecoder(), [], 0
    space = re.compile(r"\s*")
    try:
        while (at := space.match(text, at).end()) < len(text):  # pyright: ignore
            value, at = decoder.raw_decode(text, at)
            values.append(value)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: is not JSON: {error.msg} (column {error.colno})"
        ) from None
    except RecursionError:
        raise DataError(f"{path} is not JSON: nested too deeply") from None
    except ValueError:
        raise DataError(f"{path} has a number of more digits than any has") from None
    rows = values
    if len(values) == 1:
        rows = values[0] if isinstance(values[0], list) else _within(path, values[0])
    for number, row in enumerate(rows, 1):
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
    text = io.StringIO(_whole(path), newline="")
    first = text.readline()
    text.seek(0)
    delimiter = "\t" if suffix_of(path) == ".tsv" else ","
    if delimiter not in first:  # spreadsheets write ';' where ',' is the decimal sign
        delimiter = next((mark for mark in ";\t" if mark in first), delimiter)
    limit = csv.field_size_limit(1 << 30)
    try:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        names = next(reader, [])
        if twice := {name for name in names if names.count(name) > 1}:
            raise DataError(f"{path}:1: has {sorted(twice)} twice as names of columns")
        line = reader.line_num
        for cells in reader:
            place, line = line + 1, reader.line_num
            if not cells:
                continue
            if len(cells) == len(names):
                yield place, dict(zip(names, cells, strict=True))
            else:
                problems.add(
                    place, f"has {len(cells)} cells, expected {len(names)} as in line 1"
                )
    except csv.Error as error:
        raise DataError(f"{path}: is no table of text: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path, problems: Problems) -> Iterator[Record]:
    arrow = _arrow(path)
    import pyarrow.parquet

    try:
        with open_bytes(path) as stream, pyarrow.parquet.ParquetFile(stream) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    # It decodes the names of columns by itself, and lets that error through.
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no Parquet that can be read: {error}") from None


def _text(data: bytes, path: Path, line: int = 1) -> str:
    """Decodes UTF-8.

    Args:
      data: Bytes of the file, from the beginning of a line.
      path: The file to name in an error.
      line: The number of that line.

    Raises:
      DataError: it is something else; with line and byte.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        _fail_encoding(data, error.start, path, line)


def _fail_encoding(data: bytes, at: int, path: Path, line: int) -> NoReturn:
    line += data.count(b"\n", 0, at)
    column = at - data.rfind(b"\n", 0, at)
    raise DataError(
        f"{path}:{line}: is not UTF-8: byte {column} of the line is 0x{data[at]:02x}; save "
        "the file as UTF-8 (editors on Windows write Windows-1252)"
    )
