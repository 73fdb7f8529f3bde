"""Files of rows: what each kind gives, and what is said of those that cannot be read."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.data import json_values, records, unpacking
from qlora_jax.data import parquet as parquet_reader
from qlora_jax.data import problems as row_problems
from qlora_jax.data.problems import Problems
from qlora_jax.data.records import kind_of, read_records, read_rows
from qlora_jax.errors import DataError

ROWS = [{"input": "ä", "output": "1"}, {"input": 'b, "c"\nd', "output": "2"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = 'input,output\nä,1\n"b, ""c""\nd",2\n'


def read(path: Path) -> list[tuple[int, dict[str, Any]]]:
    problems = Problems(str(path))
    found = list(read_records(path, problems))
    if problems:
        problems.fail()
    return found


def zstd(data: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("name", "content", "kind", "places"),
    [
        ("a.jsonl", LINES, "lines", [1, 2]),
        ("a.json", LINES, "lines", [1, 2]),
        ("a", "\n" + LINES.replace("\n", "\r\n\r\n"), "lines", [2, 4]),
        ("a.jsonl", "\ufeff" + LINES, "lines", [1, 2]),
        ("a.json", json.dumps(ROWS), "json", [1, 2]),
        ("a.jsonl", json.dumps(ROWS, indent=2), "json", [1, 2]),
        ("a.jsonl", "\n".join(json.dumps(row, indent=1) for row in ROWS), "json", [1, 2]),
        ("a.json", json.dumps({"version": 1, "data": ROWS}), "lines", [1, 2]),
        ("a.json", json.dumps({"data": ROWS}, indent=1), "json", [1, 2]),
        ("a.json", "\n".join(json.dumps(row, indent=1) for row in ROWS), "json", [1, 2]),
        ("a.csv", TABLE, "csv", [2, 3]),
        ("a.csv", "\ufeff" + TABLE.replace(",1", ";1").replace(",2", ";2")
         .replace("input,", "input;"), "csv", [2, 3]),
        ("a.tsv", TABLE.replace(",1", "\t1").replace(",2", "\t2")
         .replace("input,", "input\t"), "csv", [2, 3]),
    ],
)  # fmt: skip
def test_every_kind_gives_the_same_rows(tmp_path, name, content, kind, places):
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert kind_of(path) == kind
    assert read(path) == list(zip(places, ROWS, strict=True))


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstd])
@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", LINES), ("a.csv", TABLE)], ids=["lines", "csv"]
)
def test_packed_files_are_known_by_their_content(tmp_path, pack, name, content):
    path = tmp_path / (name + ".gz")  # whatever the suffix says
    path.write_bytes(pack(content.encode()))
    assert [row for _, row in read(path)] == ROWS


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    path = tmp_path / "a.parquet"
    nested = [{**row, "messages": [{"role": "user", "content": "a"}]} for row in ROWS]
    parquet.write_table(Table.from_pylist(nested), path)
    assert kind_of(path) == "parquet"
    assert read(path) == list(enumerate(nested, 1))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="is no Parquet that can be read"):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", LINES.encode() + '{"input": "caf\xe9"}'.encode("latin-1"),
         r"a\.jsonl:3: is not UTF-8: byte 15 of the line is 0xe9; save"),
        ("a.json", ('[{"input":\n"caf\xe9"}]').encode("latin-1"),
         r"a\.json:2: is not UTF-8: byte 5 of the line is 0xe9"),
        ("a.csv", "input,output\na,caf\xe9\n".encode("latin-1"), r"a\.csv:2: is not UTF-8"),
        ("a.jsonl", LINES.encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("a.json", b"[1, {]", r"a\.json has no rows|a\.json:1: is not JSON"),
        ("a.json", b'[{"a": 1},\n{"b" 2}]', r"a\.json:2: is not JSON: .*\(column 6\)"),
        ("a.json", b'[{"a": 1}, 3, "x", 4]', r"a\.json, row 2: is int.*\(2 rows\)"),
        ("a.json", b'{"a": [{}], "b": [{}]}', "one object with several lists"),
        ("a.txt", b"Once upon a time", "begins with 'Once upon a time', which is no JSON"),
        ("a.txt", b"[Chapter 1]\n", r"begins with '\[Chapter 1\]"),
        ("a.txt", b" \n", "has no rows: it is empty"),
        ("a.csv", b"a,b\n1,2\n1\n1,2,3\n1\n", r"a\.csv:3: has 1 cells, expected 2.*\(2 rows\)"),
        ("a.csv", b"a,b,a\n1,2,3\n", r"a\.csv:1: has \['a'\] twice"),
        ("a.csv", b'a,b\n"1" 2,3\n', "is no table of text"),
        ("a.xlsx", b"PK\x03\x04..", "a zip archive or a spreadsheet"),
        ("a.jsonl.gz", gzip.compress(LINES.encode() * 50)[:-20], "cannot be unpacked"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00no", "cannot be unpacked"),
        ("a.jsonl.xz", lzma.compress(LINES.encode())[:-20], "cannot be unpacked"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000, "is not JSON: nested too deeply"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_read_is_said(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(path)


def test_all_problems_come_at_once_by_kind(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\nno\n3\n{"a": 2}\nno\n{"b": 1}\n')

    def parse(row: dict[str, Any]) -> int:
        if "a" not in row:
            raise DataError("has no 'a'")
        return row["a"]

    with pytest.raises(DataError) as caught:
        read_rows(path, parse)
    assert str(caught.value).splitlines()[1:] == [
        f"  {path}:2: is not JSON: Expecting value (2 rows)",
        f"  {path}:3: is int, expected an object",
        f"  {path}:6: has no 'a'",
    ]


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    for content in (b"PAR1....", b"\x28\xb5\x2f\xfd...."):
        path = tmp_path / "a"
        path.write_bytes(content)
        with pytest.raises(DataError, match="needs pyarrow; pip install pyarrow"):
            read(path)


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.json", '{"input": "a"}\n', True),
        ("a.txt", '\ufeff\n\n  {"input": "a"}\n', True),
        ("a.json", '[\n  {\n    "input": "a"}]', True),
        ("a.json", "{}\n", True),
        ("a.jsonl", "prose", True),
        ("a.json", "prose\n{}", False),
        ("a.txt", "{curly} [1] prose", False),
        ("a.txt", "[Enter Hamlet]", False),
        ("a.txt", "", False),
    ],
)
def test_rows_are_told_from_prose_by_their_beginning(tmp_path, name, content, rows):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    assert (kind_of(path) != "prose") == rows


@pytest.mark.parametrize("read_at_once", [1, 2, 3, 7])
def test_a_value_may_be_cut_anywhere_by_a_read(tmp_path, monkeypatch, read_at_once):
    monkeypatch.setattr(json_values, "_READ", read_at_once)
    rows = [{"a": "é\U0001f600\n", "b": [-1.5e3, True, {"c": None}]}, {"d": "x" * 40}]
    (path := tmp_path / "a.json").write_text(
        "\ufeff" + json.dumps(rows, indent=1, ensure_ascii=False), "utf-8"
    )
    assert [row for _, row in read(path)] == rows
    path.write_text("\n".join(json.dumps(row, indent=1) for row in rows))
    assert [row for _, row in read(path)] == rows
    path.write_text('[{},-1e+3,\n {"a": 1.5} 7]')
    with pytest.raises(DataError, match=r"json:2: is not JSON: Expecting ',' .*umn 13"):
        read(path)


def endless(pack, text=b'{"text": "' + b"a" * 500 + b'"}\n'):
    return pack(text * 5000)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", endless(gzip.compress), "unpacks to more than"),
        ("a.jsonl", endless(zstd), "unpacks to more than"),
        ("a.jsonl", gzip.compress(b"{}\n" * 5000), "unpacks to more than"),
        ("a.jsonl", b"1\n" * 99, r"int, expected an object \(50 rows\)"),
        ("a.jsonl", endless(lzma.compress), "unpacks to more than"),
        ("a.csv", endless(gzip.compress, b"a,b\n" * 100), "unpacks to more than"),
        ("a.csv", b'a,b\n1,"' + b"a\n" * 600, r"csv:\d+: has more than 999 bytes in a"),
        ("a.csv", b"a,b\n" + b"a," * 600, "csv:2: has more than 999 bytes in a row"),
        ("a.jsonl", b'{"a": "' + b"a" * 1000, "jsonl:1: has more than 999 bytes in a"),
        ("a.json", b'[{"a": "' + b"a" * 2000, "json:1: has a value of more than"),
        ("a.json", b'[{"a":' + b"[]," * 999, "json:1: has a value of more than"),
        ("a.json", b"[" * 99_999, "nested too deeply"),
        ("a.json", b'[{"a": ' + b"[" * 101 + b"]" * 101 + b"}]", "more than 100 levels"),
    ],
    ids=range(13),
)  # fmt: skip
def test_what_has_no_end_is_refused_before_it_fills_the_memory(
    tmp_path, monkeypatch, name, content, message
):
    monkeypatch.setattr(unpacking, "FREE_BYTES", 100_000)
    monkeypatch.setattr(unpacking, "GROWTH", 10)
    monkeypatch.setattr(row_problems, "_MOST", 50)
    monkeypatch.setattr(records, "_MAX_LINE_BYTES", 999)
    monkeypatch.setattr(json_values, "_READ", 200)
    monkeypatch.setattr(
        json_values, "MAX_VALUE", 1000 + 1000 * ("[]" not in str(content))
    )
    (path := tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(path)


@pytest.mark.parametrize("kind", ["nulls", "one value", "a long value"])
def test_parquet_that_grows_without_end_is_refused(tmp_path, monkeypatch, kind):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    monkeypatch.setattr(unpacking, "FREE_BYTES", 100_000)
    monkeypatch.setattr(parquet_reader, "MEMORY", 64 << 20)
    column = {
        "nulls": lambda: pyarrow.nulls(1_000_000),
        "one value": lambda: pyarrow.array(["a" * 999] * 9999).dictionary_encode(),
        "a long value": lambda: ["a" * 40_000_000],
    }[kind]()
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": column}), path, compression="zstd")
    with pytest.raises(DataError, match="unpacks to more than|more than 64 MiB"):
        read(path)


def test_packed_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    parquet.write_table(Table.from_pylist(ROWS), path := tmp_path / "a.parquet")
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert [row for _, row in read(path)] == ROWS


def test_values_that_python_has_not_are_refused_and_nothing_waits(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    dates = pyarrow.array([2**30] * 200, pyarrow.int32()).cast(pyarrow.date32())
    texts = ["a" * 10_000 + str(i) for i in range(200)]  # more than a pipe holds
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"date": dates, "text": texts}), path)
    with pytest.raises(DataError, match="is no Parquet that can be read: .*Error: "):
        read(path)


def test_parquet_whose_groups_of_rows_are_larger_than_the_memory(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    monkeypatch.setattr(parquet_reader, "MEMORY", 64 << 20)
    text = os.urandom(48 << 20).hex()
    texts = [text[i : i + 10_000] for i in range(0, len(text), 10_000)]
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": texts})
    parquet.write_table(table, path, compression="none", use_dictionary=False)
    assert sum(1 for _ in read_records(path, Problems("a"))) == len(texts)
