"""qlora evaluate: rows or prose by content, choices, answers, and what is refused."""

import json
from pathlib import Path

import pytest
import tiny
from command import call, refused

from qlora_jax.cli import evaluate
from qlora_jax.data import DataConfig
from qlora_jax.errors import ConfigError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("evaluate") / "base")


def command(base: Path, data: Path) -> list[object]:
    return ["evaluate", "--model", base, "--data", data, "--dtype", "float32"]


def test_rows_are_rows_whatever_the_file_is_called(base, tmp_path, capsys):
    lines, plain = (
        tiny.write_jsonl(tmp_path / name, tiny.sums(3)) for name in ("a.jsonl", "a.txt")
    )
    said, same = (call(capsys, *command(base, data)) for data in (lines, plain))
    assert said["read_as"] == same["read_as"] == "rows"
    for key in ("loss", "loss_stderr", "perplexity", "perplexity_stderr", "tokens"):
        assert said[key] == same[key] > 0
    plain.write_text("after a: prose")
    assert call(capsys, *command(base, plain), "--window", 8)["read_as"] == "prose"


def test_choices_are_scored_with_shots(base, tmp_path, capsys):
    rows = [
        {"question": f"{i}?", "choices": ["x", "yes"], "answer": i % 2, "subject": "s"}
        for i in range(3)
    ]
    data = tiny.write_jsonl(tmp_path / "q.json", rows)
    out = tmp_path / "p.jsonl"
    args = [*command(base, data), "--choices", "--shots", 1, "--predictions", out]
    said = call(capsys, *args, "--shots-data", data)
    assert said["read_as"] == "choices" and said["rows"] == 3
    assert said["by_subject"]["s"]["questions"] == 3 and said["accuracy_stderr"] >= 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert said["accuracy"] == sum(line["correct"] for line in lines) / 3
    assert said["acc_norm"] == sum(line["correct_norm"] for line in lines) / 3
    body = "{}?\nA. x\nB. yes\nAnswer:".format
    about = "The following are multiple choice questions (with answers) about s.\n\n"
    prompts = [
        about + body(i) + a + "\n\n" for i, a in ((1, " B"), (0, " A"), (0, " A"))
    ]
    assert [line["prompt"] for line in lines] == [
        prompt + body(i) for i, prompt in enumerate(prompts)
    ]
    for line, row in zip(lines, rows, strict=True):
        assert line["choices"] == ["A", "B"] and line["expected"] == "AB"[row["answer"]]
        best = line["log_likelihoods"].index(max(line["log_likelihoods"]))
        assert line["chosen"] == "AB"[best]


def test_answers_end_at_a_stop_and_a_pattern_takes_them_out(base, tmp_path, capsys):
    rows = [{"input": "abc", "output": "#### 7"}, {"input": "xy", "output": "#### 8"}]
    data, out = tiny.write_jsonl(tmp_path / "r.json", rows), tmp_path / "p.jsonl"
    args = [*command(base, data), "--exact-match", "--max-new-tokens", 6]
    call(capsys, *args, "--predictions", out)
    first = [json.loads(line) for line in out.read_text().splitlines()]
    stop = first[0]["given"][2:4]
    args += ["--stop", stop, "--answer-pattern", "gsm8k"]
    said = call(capsys, *args, "--predictions", tmp_path / "q.jsonl")
    assert said["exact_match"] == 0 and said["answers_without_match"] == 2
    again = [
        json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()
    ]
    for line, whole in zip(again, first, strict=True):
        assert line["given"] == whole["given"].partition(stop)[0]
        assert line["given_answer"] is None and line["expected_answer"] in "78"
    assert "no match" in refused(capsys, *args[:-1], r"is (\d+)")


ROWS, PROSE = '{"input": "a", "output": "b"}\n', "It was a dark night.\n"


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (
            PROSE,
            {"exact_match": True},
            "holds prose .*and --exact-match goes with rows",
        ),
        (PROSE, {"choices": True}, "holds prose .*and --choices goes with rows"),
        (
            ROWS,
            {"window": 9, "bos": False},
            "holds rows, and --window, --no-bos goes with",
        ),
        (ROWS, {"max_chars": 9}, "holds rows, and --max-chars goes with prose"),
        (
            ROWS,
            {"exact_match": True, "choices": True},
            "either --exact-match or --choices",
        ),
        (ROWS, {"stop": ("x",)}, "--stop goes with --exact-match"),
        (ROWS, {"exact_match": True, "stop": ("",)}, "--stop has an empty text"),
        (ROWS, {"answer_pattern": "x"}, "--answer-pattern goes with --exact-match"),
        (
            ROWS,
            {"exact_match": True, "answer_pattern": "("},
            "is no regular expression",
        ),
        (ROWS, {"predictions": Path("p")}, "--predictions goes with --exact-match or"),
        (ROWS, {"shots": 2}, "--shots goes with --choices"),
        (ROWS, {"data": DataConfig(packing="off")}, "--data.packing goes with train"),
        (
            ROWS,
            {"exact_match": True, "data": DataConfig(too_long="split")},
            "--data.too-long split leaves no whole answer to ask for",
        ),
        (ROWS, {"choices_as": "texts"}, "--choices-as goes with --choices"),
        (
            ROWS,
            {"choices": True, "shots_data": Path("p")},
            "--shots-data goes with --shots",
        ),
    ],
)
def test_flags_that_would_be_ignored_are_refused(tmp_path, content, flags, message):
    (tmp_path / "data.json").write_text(content)
    args = evaluate.Args(model="none", data_file=str(tmp_path / "data.json"), **flags)
    with pytest.raises(ConfigError, match=message):
        evaluate.run(args)
