"""Sources of rows: what a name means, several sources, their weights."""

import dataclasses
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from qlora_jax.data import DataConfig, Dataset, read_dataset
from qlora_jax.data.dataset import Share
from qlora_jax.data.sources import Source, parse_sources
from qlora_jax.errors import DataError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b:2.jsonl", "c:2"):
        tiny.write_jsonl(tmp_path / name, tiny.sums(3))
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("a.jsonl", Source("a.jsonl", True)),
        ("a.jsonl:0.3", Source("a.jsonl", True, weight=0.3)),
        ("a.jsonl:2", Source("a.jsonl", True, weight=2.0)),
        ("b:2.jsonl", Source("b:2.jsonl", True)),
        ("c:2", Source("c:2", True)),
        ("c:2:1e-1", Source("c:2", True, weight=0.1)),
        ("folder:test:0.5", Source("folder", True, split="test", weight=0.5)),
        ("owner/name", Source("owner/name", False)),
        ("owner/name:train", Source("owner/name", False, split="train")),
        ("owner/name:train[:10%]:2",
         Source("owner/name", False, split="train[:10%]", weight=2.0)),
        ("owner/na.me/main@v1.0:test:3",
         Source("owner/na.me", False, "main", "v1.0", "test", 3.0)),
    ],
)  # fmt: skip
def test_what_a_name_means(here, text, source):
    assert Source.parse(text) == source
    again = Source.parse(str(source))
    name = str(here / source.name) if source.local else source.name
    assert again == dataclasses.replace(source, name=name)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["none.jsonl"], "none.jsonl is no file; expected rows"),
        (["data/none.jsonl.gz"], "data/none.jsonl.gz is no file"),
        (["a.jsonl:0"], "the weight is 0, expected more than 0"),
        (["a.jsonl:-1"], "the weight is -1, expected"),
        (["a.jsonl:nan"], "the weight is nan, expected"),
        (["a.jsonl:train"], "a.jsonl is a file, which has no splits"),
        (["a.jsonl", "a.jsonl:2"], r"a.jsonl is given twice; .*a.jsonl:2\)"),
        ([], "no rows are given"),
        (["x.jsonl", "y.jsonl"], "x.jsonl is no file[\\s\\S]*y.jsonl is no file"),
    ],
)
def test_what_no_name_means_is_said(here, texts, message):
    with pytest.raises(DataError, match=message):
        parse_sources(texts)


def drawn(dataset: Dataset, epochs: int, batch: int = 4) -> list[list[int]]:
    """Returns the numbers of the rows of each epoch."""
    batches = dataset.batches(
        documents=batch, micro_batch=batch, seed=7, packing="drawn"
    )
    count = epochs * dataset.epoch_rows
    flat: list[int] = []
    for step in range(-(-count // batch)):
        flat += batches.numbers(step)
    size = dataset.epoch_rows
    return [flat[i * size : (i + 1) * size] for i in range(epochs)]


def test_a_weight_takes_other_rows_each_epoch_and_all_before_any_again():
    rows = tiny.rows([5] * 14).rows
    shares = [Share(np.arange(4), 1.0), Share(np.arange(4, 14), 0.3)]
    epochs = drawn(Dataset(rows, 32, shares=shares), 10)
    assert [len(epoch) for epoch in epochs] == [7] * 10
    for epoch in epochs:
        assert sorted(i for i in epoch if i < 4) == [0, 1, 2, 3]
    parts = Counter(i for epoch in epochs for i in epoch if i >= 4)
    assert parts == {i: 3 for i in range(4, 14)}
    assert len(set(tuple(sorted(epoch)) for epoch in epochs[:3])) == 3


def test_a_weight_of_two_takes_every_row_twice():
    rows = tiny.rows([5] * 5).rows
    shares = [Share(np.arange(3), 2.0), Share(np.arange(3, 5), 1.0)]
    for epoch in drawn(Dataset(rows, 32, shares=shares), 2):
        assert Counter(epoch) == {0: 2, 1: 2, 2: 2, 3: 1, 4: 1}


def test_shares_of_one_change_nothing():
    rows = tiny.rows(range(3, 13)).rows
    plain, shared = (
        Dataset(rows, 32),
        Dataset(rows, 32, shares=[Share(np.arange(10), 1.0)]),
    )
    assert drawn(plain, 3) == drawn(shared, 3)


def test_rows_held_out_leave_their_shares():
    rows = tiny.rows([5] * 14).rows
    shares = [Share(np.arange(4), 1.0), Share(np.arange(4, 14), 0.5)]
    rest, held = Dataset(rows, 32, shares=shares).split(4, seed=3)
    assert len(held) == 4 and not held.shares
    kept = [id(row) for row in rest.rows]
    assert sorted(np.concatenate([s.rows for s in rest.shares]).tolist()) == list(
        range(10)
    )
    first = {kept[i] for i in rest.shares[0].rows.tolist()}
    assert first == {id(row) for row in rows[:4]} & set(kept)
    one = [Share(np.arange(1), 1.0), Share(np.arange(1, 14), 0.5)]
    with pytest.raises(DataError, match="leaves a file without a row"):
        for seed in range(20):
            Dataset(rows, 32, shares=one).split(12, seed=seed)


def test_several_files_are_read_in_order_and_refused_at_once(here):
    made = read_dataset(["a.jsonl:2", "c:2"], tiny.tokenizer(), DataConfig())
    assert len(made) == 6 and made.epoch_rows == 9
    (here / "bad.jsonl").write_text("no\n")
    (here / "worse.jsonl").write_text('{"question": "a"}\n')
    with pytest.raises(DataError) as caught:
        read_dataset(
            ["bad.jsonl", "a.jsonl", "worse.jsonl"], tiny.tokenizer(), DataConfig()
        )
    assert "bad.jsonl:1: is not JSON" in str(caught.value)
    assert "worse.jsonl:1: has 'question'" in str(caught.value)
    with pytest.raises(DataError) as caught:
        short = DataConfig(max_tokens=4)
        read_dataset(["a.jsonl", "c:2"], tiny.tokenizer(), short)
    assert str(caught.value).count("are longer than --data.max-tokens 4") == 2


def write_table(path: Path, rows: list[Any]) -> Path:
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    parquet.write_table(Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "gz"])
def test_all_kinds_of_files_give_the_same_rows(tmp_path, kind):
    import csv
    import gzip

    rows = [{"input": "a, b", "output": "c\nd"}, {"input": "ä", "output": "1"}]
    path = tmp_path / f"rows.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "jsonl":
        path.write_text(lines)
    elif kind == "gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, ["input", "output"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        write_table(path, rows)
    made = read_dataset(path, tiny.tokenizer(), DataConfig())
    assert [row.answer for row in made.rows] == ["c\nd", "1"]
    assert tiny.tokenizer().decode(made.rows[1].tokens.tolist()) == "ä1"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The datasets library, which keeps its files in the test's folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


def test_a_folder_with_a_dataset_is_opened_by_its_splits(tmp_path, library, caplog):
    folder = tmp_path / "dataset"
    folder.mkdir()
    tiny.write_jsonl(folder / "train.jsonl", tiny.sums(5))
    tiny.write_jsonl(folder / "test.jsonl", tiny.sums(2))
    caplog.set_level("INFO")
    made = read_dataset(folder, tiny.tokenizer(), DataConfig())
    assert len(made) == 5 and "split 'train' of train, test" in caplog.text
    assert len(read_dataset(f"{folder}:test", tiny.tokenizer(), DataConfig())) == 2
    with pytest.raises(DataError, match="other"):
        read_dataset(f"{folder}:other", tiny.tokenizer(), DataConfig())


def test_a_dataset_that_was_saved_to_disk(tmp_path, library):
    rows = [{"input": "a", "output": "b"}, {"input": "c", "question": "d"}]
    saved = library.DatasetDict(train=library.Dataset.from_list(rows))
    saved.save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"saved:train, row 2: 'output' is NoneType"):
        read_dataset(tmp_path / "saved", tiny.tokenizer(), DataConfig())
    library.Dataset.from_list(rows[:1]).save_to_disk(tmp_path / "one")
    (row,) = read_dataset(tmp_path / "one", tiny.tokenizer(), DataConfig()).rows
    assert row.answer == "b"


def test_the_library_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    for name in (str(tmp_path), "owner/name"):
        with pytest.raises(DataError, match="needs the datasets library: pip install"):
            read_dataset(name, tiny.tokenizer(), DataConfig())


def test_the_hub_is_asked_only_where_nothing_local_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(DataError, match="runs is, so a path seems .*hf://runs/typo"):
        Source.parse("runs/typo:train")
    source = Source.parse("hf://runs/typo:train:2")
    assert (source.name, source.local, source.split) == ("runs/typo", False, "train")
    assert str(source) == "hf://runs/typo:train:2"
    assert Source.parse(str(source)) == source == Source.parse("hub:runs/typo:train:2")
    assert str(Source.parse("owner/name")) == "owner/name"


def test_a_fifo_is_no_file_of_rows(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="a.jsonl is no file and no folder"):
        Source.parse(str(tmp_path / "a.jsonl"))
