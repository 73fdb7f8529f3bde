"""`qlora data`, and rows of several files in `qlora train`."""

import json
from pathlib import Path

import command
import pytest
import tiny

from qlora_jax.cli import train
from qlora_jax.config import DataConfig
from qlora_jax.config.run import RunConfig
from qlora_jax.sources import source

WAYS = ("auto", "off", "drawn")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.write_folder(tmp_path / "base")


def test_what_a_run_will_see(tmp_path: Path, base: Path, capsys):
    rows = [{"input": "a" * i, "output": "b", "id": i} for i in range(1, 21)]
    rows += [{"prompt": "a", "completion": "a long answer" * 9}]
    one = tiny.write_jsonl(tmp_path / "one.jsonl", rows)
    two = tiny.write_jsonl(tmp_path / "two.jsonl", [{"text": "once"}] * 10)
    figures = command.call(
        *(capsys, "data", "--model", base, "--data", one, f"{two}:0.5"),
        *("--data.max-tokens", 24, "--data.too-long", "truncate", "--examples", 31),
        *("--train.micro-batch", 2, "--train.grad-accum", 3),
    )
    table = figures.pop("table")
    first, second = figures["sources"]
    assert first["forms"] == {"pair": 20, "completion": 1}
    assert (first["rows"], first["taken"], first["cut"]) == (21, 21, 1)
    assert first["unused_fields"] == {"id": 20}
    assert second["weight"] == 0.5 and "weight 0.5: 5 rows in an epoch" in table
    lengths = [i + 3 for i in range(1, 21)] + [24] + [6] * 10
    assert figures["tokens"] == sum(lengths) and figures["longest"] == 24
    assert figures["tokens_that_train"] == 20 * 2 + 22 + 10 * 5
    counts = [
        sum(length <= 16 for length in lengths),
        sum(length > 16 for length in lengths),
    ]
    assert figures["histogram"] == {"width": 16, "counts": counts}
    assert figures["packing"] == "on" and figures["batch_lengths"] == {"24": 4}
    assert figures["steps_per_epoch"] == 4 and figures["rows_per_step"] == 4
    assert 0 < figures["padding"] == figures["padding_packed"] < 1
    assert "1 of 21 rows over 24 tokens are cut" in table
    assert table.count("that train are between ⟦ and ⟧") == 31
    assert "<s>aaa⟦b</s>⟧\n" in table and "<s>⟦once</s>⟧\n" in table


def test_batches_are_shown_packed_and_not(tmp_path: Path, base, capsys):
    rows = [{"input": "a" * (i % 20), "output": "b"} for i in range(240)]
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    given = (capsys, "data", "--model", base, "--data", data, "--data.max-tokens", 64)
    found = {way: command.call(*given, "--data.packing", way) for way in WAYS}
    on, off = found["auto"], found["off"]
    assert on["packing"] == "on" and off["packing"] == "off"
    assert on["padding"] == on["padding_packed"] == off["padding_packed"] < 0.05
    assert off["padding"] == off["padding_unpacked"] == on["padding_unpacked"] > 0.3
    assert on["rows_per_step"] == 4 and off["rows_per_step"] == 16
    assert on["documents_per_step"] == pytest.approx(16, rel=0.15)
    assert off["documents_per_step"] == 16 and off["steps_per_epoch"] == 15
    assert sum(off["batch_lengths"].values()) == 15
    assert "packing on (this run): a step packs" in on["table"]
    assert "packing off: a step has 16 rows of like lengths" in on["table"]
    assert "packing off (this run)" in off["table"] and "packing on:" in off["table"]
    drawn = found["drawn"]["table"]
    assert "packing drawn (this run): a step has 16 rows of any length" in drawn
    adapters = command.refused(*given, "--objective", "no:name")
    assert "importing no failed" in adapters


def test_an_objective_of_whole_rows_is_not_packed(
    tmp_path: Path, base, capsys, monkeypatch
):
    (tmp_path / "whole_rows.py").write_text(
        "import dataclasses\nfrom qlora_jax.objectives import SFT\n"
        "OURS = dataclasses.replace(SFT, name='ours', packs=False)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.sums(20))
    given = (capsys, "data", "--model", base, "--data", data)
    given = (*given, "--objective", "whole_rows:OURS")
    figures = command.call(*given)
    assert figures["packing"] == "off" and "padding_packed" not in figures
    reason = "objective ours takes rows of one document"
    assert f"rows are not packed: {reason}" in figures["table"]
    refused = command.refused(*given, "--data.packing", "on")
    assert f"--data.packing on: {reason}; choose auto or off" in refused


def test_what_a_run_would_refuse_is_shown_and_not_refused(tmp_path: Path, base, capsys):
    rows = [{"input": "a", "output": "b" * 9}, {"input": "a" * 6, "output": "b"}]
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    given = (capsys, "data", "--model", base, "--data", data, "--data.max-tokens")
    figures = command.call(*given, 9)
    assert figures["sources"][0]["refused_for_length"] == 1
    assert "1 of 2 rows over 9 tokens: a run refuses them" in figures["table"]
    figures = command.call(*given, 7, "--data.too-long", "truncate")
    assert figures["sources"][0]["nothing_to_learn"] == 1
    figures = command.call(*given, 7, "--data.too-long", "split")
    assert figures["sources"][0]["split"] == 2 and figures["longest"] == 6
    assert "2 of 2 rows over 7 tokens are split" in figures["table"]
    figures = command.call(*given, 2)
    assert figures["sources"][0]["taken"] == 0 and "tokens" not in figures


def test_long_parts_are_shortened_and_colours_are_kept_from_files(
    tmp_path: Path, base, capsys, monkeypatch
):
    data = tiny.write_jsonl(
        tmp_path / "rows.jsonl", [{"input": "a" * 990, "output": "b"}]
    )
    given = (capsys, "data", "--model", base, "--data", data)
    table = command.call(*given)["table"]
    assert "[... 293 characters ...]" in table
    monkeypatch.setenv("FORCE_COLOR", "1")
    table = command.call(*given)["table"]
    assert "\x1b[32mb</s>\x1b[0m" in table and "⟦" not in table


def test_rows_that_cannot_be_used_are_refused(tmp_path: Path, base, capsys):
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}])
    given = (capsys, "data", "--model", base, "--data", data)
    assert "--data.columns input=question output=answer" in command.refused(*given)
    assert "--examples is -1" in command.refused(*given, "--examples", -1)
    assert "is no file" in command.refused(
        capsys, "data", "--model", base, "--data", "no.jsonl"
    )


def test_a_run_on_several_files_opens_its_base_once_and_resumes(
    tmp_path: Path, base, capsys, monkeypatch
):
    one = tiny.write_jsonl(tmp_path / "one.jsonl", tiny.sums(6))
    two = tmp_path / "two.json"
    two.write_text(json.dumps([{"q": "1+1=", "a": "2"}] * 4))
    out = tmp_path / "run"
    given = ["train", "--model", base, "--out", out, "--train.micro-batch", 2]
    given += ["--train.grad-accum", 1, "--data", f"{two}:0.5", one]
    columns = ["--data.columns", "input=q", "output=a"]
    assert "has 'input', 'output', and not what --data.columns names: input=q" in (
        command.refused(capsys, *given, *columns)
    )
    two.write_text(json.dumps([{"input": "1+1=", "output": "2"}] * 4))
    weighted = command.refused(capsys, *given, "--eval-data", f"{one}:2")
    assert "every row is evaluated once" in weighted
    opened = []
    for name in ("Checkpoint", "read_json"):
        real = getattr(source, name)
        monkeypatch.setattr(
            source, name, lambda path, real=real: opened.append(path) or real(path)
        )
    made = command.call(capsys, *given, "--eval-data", one, "--train.epochs", 1)
    assert sorted(opened) == [base, base / "config.json"]
    assert made["steps"] == 4 and made["rows"] == 10  # 2 of 4, and 6
    stored = (out / "config.toml").read_text()
    assert f'"{two}:0.5"' in stored and "eval_loss" in made
    assert command.call(capsys, "train", "--resume", out)["steps"] == 4


def test_paths_are_made_absolute_and_ids_and_templates_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("m", "rows.jsonl", "t.jinja"):
        (tmp_path / name).touch()
    data = DataConfig(
        chat_template="t.jinja", prompt_template="{{ " + "x" * 300 + " }}"
    )
    config = train.Args(
        model="m",
        original="owner/name",
        data_file=("rows.jsonl:2", "a/b:train"),
        data=data,
    ).run
    assert isinstance(config, RunConfig) and not isinstance(config, train.Args)
    assert config.model == str(tmp_path / "m") and config.original == "owner/name"
    assert config.data_file == (f"{tmp_path}/rows.jsonl:2", "a/b:train")
    assert config.data.chat_template == str(tmp_path / "t.jinja")
    assert config.data.prompt_template == data.prompt_template
