"""qlora generate and evaluate with several adapters, and generate from a file."""

import json
from pathlib import Path

import pytest
import tiny
from command import call, refused

from qlora_jax.adapters.value import Adapter
from qlora_jax.exchange.ours import save_adapter

SHORT = ["--max-new-tokens", "3", "--dtype", "float32"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tiny.write_adapters(tmp_path_factory.mktemp("several"))
    other = Adapter.of(tiny.adapted(tiny.decoder(seed=3)))
    save_adapter(root / "far", other.lora, other.config)
    return root


def generate(folders: Path) -> list[object]:
    return ["generate", "--model", folders / "base", *SHORT]


def both(folders: Path) -> list[object]:
    return ["--adapters", f"a={folders / 'a'}", f"b={folders / 'b-peft'}"]


@pytest.mark.slow
def test_each_prompt_is_answered_by_its_adapter(folders: Path, capsys):
    prompts = ["--prompt", "xy", "xy", "xy"]
    said = call(
        *(capsys, *generate(folders), *prompts, *both(folders)),
        *("--route", "a", "base", "b"),
    )
    assert said["adapters"].keys() == {"a", "b"}
    a, _, _ = call(capsys, *generate(folders), *prompts, "--adapter", folders / "a")[
        "texts"
    ]
    _, base, _ = call(capsys, *generate(folders), *prompts)["texts"]
    _, _, b = call(capsys, *generate(folders), *prompts, "--adapter", folders / "b")[
        "texts"
    ]
    assert said["texts"] == [a, base, b]
    assert len({a, base, b}) == 3


def test_a_file_of_prompts_is_answered_row_by_row(folders: Path, tmp_path, capsys):
    names = ["a", None, "b", "base", "a"]
    rows = [
        {"prompt": "xyz"[: 1 + i % 3], "adapter": name, "id": i}
        for i, name in enumerate(names)
    ]
    del rows[1]["adapter"]
    source = tiny.write_jsonl(tmp_path / "in.jsonl", rows)
    out = tmp_path / "out.jsonl"
    args = [*generate(folders), *both(folders), "--prompts", source, "--batch-size", 2]
    said = call(capsys, *args, "--out", out)
    assert said["rows"] == 5 and said["out"] == str(out)
    given = [json.loads(line) for line in out.read_text().splitlines()]
    completions = [row.pop("completion") for row in given]
    assert given == rows  # in their order, with all that they had
    route = [name or "base" for name in names]
    prompts = ["--prompt", *(row["prompt"] for row in rows)]
    one = call(capsys, *generate(folders), *both(folders), *prompts, "--route", *route)
    assert completions == one["texts"]
    assert said["new_tokens"] == sum(one["new_tokens"])
    assert "out.jsonl is a file already" in refused(capsys, *args, "--out", out)


def test_a_file_of_prompts_needs_no_adapter(folders: Path, tmp_path, capsys):
    source = tiny.write_jsonl(tmp_path / "in.jsonl", [{"prompt": "xy", "adapter": 3}])
    args = [*generate(folders), "--prompts", source, "--out", tmp_path / "out.jsonl"]
    call(capsys, *args, "--batch-size", 3)
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    expected = call(capsys, *generate(folders), "--prompt", "xy", "xy", "xy")["texts"]
    assert row == {"prompt": "xy", "adapter": 3, "completion": expected[0]}


def test_sampling_differs_from_batch_to_batch(folders: Path, tmp_path, capsys):
    source = tiny.write_jsonl(tmp_path / "in.jsonl", [{"prompt": "xy"}] * 3)
    args = [*generate(folders), "--prompts", source, "--batch-size", 1]
    call(capsys, *args, "--temperature", 3, "--out", tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert len({json.loads(line)["completion"] for line in lines}) == 3


@pytest.fixture(scope="module")
def rows(folders: Path) -> tuple[Path, Path]:
    plain = list(tiny.sums(6))
    names = ["a", "b", None, "a", "base", "b"]
    mixed = [
        row | ({} if name is None else {"adapter": name})
        for row, name in zip(plain, names, strict=True)
    ]
    return (
        tiny.write_jsonl(folders / "plain.jsonl", plain),
        tiny.write_jsonl(folders / "mixed.jsonl", mixed),
    )


@pytest.mark.slow
def test_evaluate_compares_the_base_and_every_adapter(
    folders: Path, rows, tmp_path, capsys
):
    evaluate = ["evaluate", "--model", folders / "base", "--dtype", "float32"]
    evaluate += ["--data", rows[0], "--exact-match", "--max-new-tokens", 3]
    out = tmp_path / "p.jsonl"
    said = call(capsys, *evaluate, *both(folders), "--predictions", out)
    assert said["rows"] == 6
    assert said["by_adapter"].keys() == {"base", "a", "b"}
    for name, flags in (("base", []), ("a", ["--adapter", folders / "a"])):
        alone = call(capsys, *evaluate, *flags)
        theirs = said["by_adapter"][name]
        assert theirs["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert theirs["exact_match"] == alone["exact_match"]
    given = [json.loads(line)["adapter"] for line in out.read_text().splitlines()]
    assert given == ["base"] * 6 + ["a"] * 6 + ["b"] * 6


def test_evaluate_takes_each_row_by_its_adapter(folders: Path, rows, tmp_path, capsys):
    evaluate = ["evaluate", "--model", folders / "base", "--dtype", "float32"]
    said = call(capsys, *evaluate, *both(folders), "--data", rows[1])
    each = said["by_adapter"]
    lines = [json.loads(line) for line in rows[1].read_text().splitlines()]
    for name, flags in (("base", []), ("b", ["--adapter", folders / "b"])):
        mine = [row for row in lines if row.get("adapter", "base") == name]
        part = tiny.write_jsonl(tmp_path / f"{name}.jsonl", mine)
        alone = call(capsys, *evaluate, *flags, "--data", part)
        assert each[name]["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert each[name]["tokens"] == alone["tokens"]
    assert each.keys() == {"base", "a", "b"}


@pytest.mark.slow
def test_evaluate_gives_the_perplexity_of_a_text_by_adapter(
    folders: Path, tmp_path, capsys
):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 4)
    evaluate = ["evaluate", "--model", folders / "base", "--data", text]
    evaluate += ["--window", 16, "--dtype", "float32"]
    said = call(capsys, *evaluate, *both(folders))["by_adapter"]
    alone = call(capsys, *evaluate, "--adapter", folders / "a")
    assert said["a"]["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-5)
    assert said["base"]["perplexity"] != said["b"]["perplexity"]


def test_predictions_of_mixed_rows_are_in_their_order(folders, rows, tmp_path, capsys):
    out = tmp_path / "p.jsonl"
    args = ["evaluate", "--model", folders / "base", "--data", rows[1], *both(folders)]
    args += ["--dtype", "float32", "--predictions", out]
    assert "--predictions goes with --exact-match" in refused(capsys, *args)
    said = call(capsys, *args, "--exact-match", "--max-new-tokens", 3)["by_adapter"]
    given = [json.loads(line) for line in out.read_text().splitlines()]
    lines = [json.loads(line) for line in rows[1].read_text().splitlines()]
    assert [row["adapter"] for row in given] == [
        row.get("adapter", "base") for row in lines
    ]
    assert [row["expected"] for row in given] == [row["output"] for row in lines]
    for name, figures in said.items():
        mine = [row["correct"] for row in given if row["adapter"] == name]
        assert figures["exact_match"] == sum(mine) / len(mine)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give either --prompt or --prompts"),
        (["--prompt", "a", "--out", "o"], "--prompts and --out go together"),
        (["--prompt", "a", "--adapter", "x", "--adapters", "a=x", "--route", "a"],
         "give either --adapter or --adapters"),
        (["--prompt", "a", "--route", "a"], "--route goes with --adapters and --prompt"),
        (["--prompt", "a", "b", "--adapters", "a=x", "--route", "a"],
         "--route has 1 names for 2 prompts"),
        (["--prompts", "p", "--out", "o", "--batch-size", "0"], "--batch-size is 0"),
        (["--prompt", "a", "--adapters", "a", "b=", "c=x", "c=y", "--route", "a"],
         "--adapters: 'a', expected NAME=FOLDER; 'b=', expected NAME=FOLDER; c twice"),
        (["--prompts", "nowhere.jsonl", "--out", "{tmp}/o"], "nowhere.jsonl is no file"),
        (["--prompts", "p", "--out", "{tmp}/no/o"], "--out: "),
    ],
)  # fmt: skip
def test_wrong_flags_end_with_one_message(folders, tmp_path, capsys, args, message):
    args = [arg.format(tmp=tmp_path) for arg in args]
    assert message in refused(capsys, *generate(folders), *args)


def test_adapters_that_do_not_fit_are_all_named(folders: Path, capsys):
    flags = ["--adapters", f"far={folders / 'far'}", f"none={folders}"]
    error = refused(
        *(capsys, *generate(folders), "--prompt", "a", *flags, "--route", "far")
    )
    assert "far: " in error and "other weights" in error
    assert "none: " in error and "holds no adapter" in error


def test_unknown_routes_and_rows_are_named(folders: Path, tmp_path, capsys):
    args = [*generate(folders), *both(folders)]
    error = refused(capsys, *args, "--prompt", "x", "--route", "c")
    assert "no adapter 'c'; there are base, a, b" in error
    source = tiny.write_jsonl(tmp_path / "in.jsonl", [{"prompt": "x", "adapter": "c"}])
    args += ["--prompts", source, "--out", tmp_path / "o.jsonl"]
    error = refused(capsys, *args)
    assert "in.jsonl:1: 'adapter' is 'c', expected one of base, a, b" in error
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.slow
def test_runs_that_held_the_base_in_different_ways_need_a_choice(
    folders: Path, tmp_path, capsys
):
    flags = ["--adapters"]
    for name, codebook in (("a", "nf4"), ("b", "none")):
        run = tmp_path / name
        run.mkdir()
        (run / "adapter").symlink_to(folders / name)
        (run / "config.toml").write_text(f'[quant]\ncodebook = "{codebook}"\n')
        flags.append(f"{name}={run}")
    args = [*generate(folders), "--prompt", "x", *flags, "--route", "a"]
    assert "held the base in different ways" in refused(capsys, *args)
    assert call(capsys, *args, "--quant.codebook", "nf4")["base"].startswith("nf4")
