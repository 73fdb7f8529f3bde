"""Rows made by several processes, and rows kept on disk: the same as made at once."""

import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import chat_cases
import numpy as np
import pytest
import tiny
from chat_templates import TEMPLATES

from qlora_jax.data import DataConfig, cache, forming, read_dataset, tokenize
from qlora_jax.data.forming import Formed, Forming
from qlora_jax.data.tokenize import Row
from qlora_jax.errors import DataError
from qlora_jax.text import Tokenizer
from qlora_jax.user_folder import cache_folder

RECORDS: list[Any] = [
    (i, {"messages": chat_cases.turns(f"a{i}", "b", "c", "d" * (i % 7)), "id": i})
    for i in range(1, 40)
]


def same(one: list[Row], other: list[Row]) -> bool:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.weights, b.weights)
        assert a[2:] == b[2:]
        assert (a.tokens.dtype, a.weights.dtype) == (np.int32, np.float32)
    return True


def test_several_processes_make_what_one_makes(monkeypatch):
    records = [*RECORDS, (40, {"text": 3}), (41, {"messages": []})]
    made = Forming(tiny.tokenizer(), DataConfig()).all_of(records)
    monkeypatch.setattr(forming, "ALONE", 10)
    monkeypatch.setattr(forming, "CHUNK", 7)
    monkeypatch.setattr(forming, "_cores", lambda: 2)
    told: list[int] = []
    shared = Forming(tiny.tokenizer(), DataConfig()).all_of(records, told.append)
    assert same(made.rows, shared.rows)
    assert made[1:] == shared[1:]
    assert told[-1] == 41 and len(told) > 3
    assert made.forms == {"messages": 39} and made.unused == {"id": 39}
    assert [place for place, _ in made.problems] == [40, 41]


def test_a_process_that_dies_is_said(monkeypatch):
    workers = forming._Workers(Forming(tiny.tokenizer(), DataConfig()))
    workers._forming = b"no pickle"
    with pytest.raises(DataError, match="ended with status 1"):
        workers.make(RECORDS)
    workers.stop()


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cache, "MIN_SECONDS", 0.0)
    return tmp_path / "rows"


def read(path: Path, folder: Path, tokenizer: Any = None, **config: Any) -> list[Row]:
    tokenizer = tokenizer or tiny.tokenizer()
    return read_dataset(path, tokenizer, DataConfig(**config), keep=folder).rows


def test_rows_are_kept_and_read_again(tmp_path, kept, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [row for _, row in RECORDS])
    first = read(path, kept)
    (file,) = kept.iterdir()
    assert "id" in caplog.text and "tokenized before" not in caplog.text
    caplog.clear()
    monkeypatch.setattr(Forming, "all_of", None)  # nothing is tokenized
    again = read(path, kept)
    assert same(first, again)
    assert "39 rows, tokenized before, are read from" in caplog.text
    assert "'id' (39 rows)" in caplog.text  # warnings come again
    # What counts after tokenizing makes no other rows.
    cut = read(path, kept, max_tokens=16, too_long="truncate", packing="off")
    assert [len(row.tokens) for row in cut] == [min(16, len(r.tokens)) for r in first]
    assert max(len(row.tokens) for row in first) > 16
    assert [f.name for f in kept.iterdir()] == [file.name]


def test_whatever_rows_follow_from_makes_others(tmp_path, kept):
    path = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.sums(3))
    read(path, kept)
    read(path, kept, train_on_prompt=True)
    read(path, kept, chat=True)
    other = tiny.tokenizer(bos=False)
    read(path, kept, other)
    path.write_text(path.read_text() + path.read_text())
    assert len(read(path, kept)) == 6
    template = tmp_path / "t.jinja"
    for text in ("{{ input }}", "{{ input }}!"):
        template.write_text(text)
        read(path, kept, prompt_template=str(template))
    assert len(list(kept.iterdir())) == 7


def test_a_template_that_writes_the_date_is_kept_for_a_day(tmp_path, monkeypatch):
    path = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.sums(1))

    def names(template: str) -> set[str]:
        tokenizer = Tokenizer(tiny.byte_tokenizer(), chat_template=template)
        found = set()
        for day in (1, 2):

            class Day(cache.datetime.date):
                @classmethod
                def today(cls) -> Any:
                    return cls(2026, 1, day)  # noqa: B023

            with monkeypatch.context() as patched:
                patched.setattr(cache.datetime, "date", Day)
                found.add(cache.digest_of(path, tokenizer, DataConfig()))
        return found

    assert len(names(TEMPLATES["chatml"])) == 1
    assert len(names("{{ strftime_now('%d') }}" + TEMPLATES["chatml"])) == 2


def test_damaged_rows_are_made_again(tmp_path, kept, caplog):
    path = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.sums(5))
    first = read(path, kept)
    (file,) = kept.iterdir()
    whole = file.read_bytes()
    flipped = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    for damaged in (whole[:-1], flipped, b"", whole + b"x"):
        file.write_bytes(damaged)
        caplog.clear()
        assert same(first, read(path, kept))
        assert "is damaged; what it kept is made again" in caplog.text
        assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_to_is_no_error(tmp_path, kept, caplog):
    path = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.sums(5))
    kept.write_text("a file")
    assert len(read(path, kept)) == 5
    assert "tokenized rows are not kept" in caplog.text


def test_rows_with_problems_are_not_kept(tmp_path, kept):
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [*tiny.sums(5), {"input": "a"}])
    with pytest.raises(DataError):
        read(path, kept)
    assert not kept.exists()


def test_odd_answers_and_all_fields_come_back(tmp_path):
    row = Row(np.array([1, 2], np.int32), np.array([0, 0.5], np.float32), 1, "ä\ud800")
    other = row._replace(answer="", chat=True, prompt=2)
    counts = [Counter({name: 2}) for name in "abc"]
    made = Formed([row, other], [3, 2**40], 9, *counts, problems=[], lines=False)
    cache.write(tmp_path, "a" * 32, made)
    back = cache.read(tmp_path, "a" * 32)
    assert back is not None and same(back.rows, made.rows) and back[1:] == made[1:]


def test_files_used_longest_ago_go_first(tmp_path, monkeypatch):
    made = Forming(tiny.tokenizer(), DataConfig()).all_of(RECORDS)
    for i, name in enumerate("abc"):
        cache.write(tmp_path, name * 32, made)
        os.utime(tmp_path / (name * 32), (i, i))
    (tmp_path / "writing-old").write_text("")
    os.utime(tmp_path / "writing-old", (0, 0))
    (tmp_path / "writing-new").write_text("")
    (tmp_path / "notes.txt").write_text("a user's own")
    assert cache.read(tmp_path, "a" * 32) is not None  # used now
    size = (tmp_path / ("a" * 32)).stat().st_size
    monkeypatch.setattr(cache, "MAX_BYTES", 3 * size)
    cache.write(tmp_path, "d" * 32, made)
    names = {
        path.name[0] if len(path.name) == 32 else path.name
        for path in tmp_path.iterdir()
    }
    assert names == {"a", "c", "d", "writing-new", "notes.txt"}


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"QLORA_JAX_DATA_CACHE": "off"}, None),
        ({"QLORA_JAX_DATA_CACHE": "/x/y"}, Path("/x/y")),
        ({"QLORA_JAX_DATA_CACHE": "", "XDG_CACHE_HOME": "/c"}, Path("/c/qlora_jax/rows")),
        ({"QLORA_JAX_DATA_CACHE": "", "XDG_CACHE_HOME": "c", "HOME": "/h"},
         Path("/h/.cache/qlora_jax/rows")),
    ],
)  # fmt: skip
def test_where_rows_are_kept(environment, folder, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder(cache.VARIABLE, "rows") == folder


def test_texts_are_tokenized_so_many_at_a_time_and_none_that_is_too_long(monkeypatch):
    make = Forming(tiny.tokenizer(), DataConfig()).maker()
    records = [(i, {"text": "ab" * i}) for i in range(1, 30)]
    whole = make(records)
    monkeypatch.setattr(tokenize, "MAX_TEXT", 40)
    asked: list[int] = []
    encode = Tokenizer.encode_offsets

    def counted(self, texts):
        asked.append(sum(map(len, texts)))
        return encode(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_offsets", counted)
    made = make(records)
    assert max(asked) <= 40 and len(asked) > 10
    kept = [row.tokens.tolist() for row in whole.rows[:20]]
    assert [row.tokens.tolist() for row in made.rows] == kept
    assert made.problems[0] == (
        21,
        "has a text of 42 characters, expected at most 40; split it into rows",
    )
