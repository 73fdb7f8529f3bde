"""What the programs that give figures share, and that they start from a bare clone."""

import json
import re
import sys

import pytest

from scripts.bench import harness

SCRIPTS = harness.ROOT / "scripts"


def test_calls_take_turns_and_warm_up_uncounted():
    calls, clock = [], iter(range(100))
    runs = {name: lambda n=name: calls.append(n) for name in "ab"}
    times = harness.take_turns(runs, 2, warm_up=1, clock=lambda: next(clock) ** 2)
    assert calls == [*"ababab"]
    # Each call lies between two ticks of the clock; the first four belong to the warm-up.
    assert times == {"a": [5**2 - 4**2, 9**2 - 8**2], "b": [7**2 - 6**2, 11**2 - 10**2]}


def test_a_ratio_is_the_median_of_the_rounds_not_of_the_sides():
    # A slow round slows both sides.
    assert harness.median_ratio([2.0, 20.0, 3.0], [1.0, 10.0, 3.0]) == 2.0
    assert harness.medians({"a": [1.0, 9.0, 2.0]}) == {"a": 2.0}


def test_a_record_names_no_folder_of_this_machine(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.jsonl"
    model = tmp_path / "model"
    words = ["program", "--model", str(model), f"--append={out}", "--rank", "8"]
    monkeypatch.setattr(sys, "argv", words)
    out.write_text('{"benchmark": "x"}\n{"half')  # as a killed run leaves it
    row = harness.record("matmul", out, ratio=1.5)
    assert json.loads(capsys.readouterr().out) == row
    assert harness.read_rows(out) == [{"benchmark": "x"}, row]
    assert row["command"] == (
        "python -m scripts.bench.matmul --model model --append=rows.jsonl --rank 8"
    )
    assert str(tmp_path) not in json.dumps(row) and row["ratio"] == 1.5
    assert {"jax", "python"} <= row["versions"].keys()


def test_a_childs_last_line_is_its_answer_and_its_failure_ends_the_program():
    code = "import os; print('so far'); print(os.environ['SAID'])"
    child = [sys.executable, "-c", code]
    assert harness.told(child, SAID='{"a": 2}') == {"a": 2}
    with pytest.raises(SystemExit, match="ended with 3"):
        harness.ran([sys.executable, "-c", "raise SystemExit(3)"])


def test_scripts_change_no_search_path_and_name_programs_that_are_there():
    for file in SCRIPTS.rglob("*.py"):
        assert "sys.path" not in file.read_text(), file
    pages = [*SCRIPTS.rglob("*.py"), *SCRIPTS.rglob("*.md"), *harness.ROOT.glob("*.md")]
    named = {
        name
        for page in pages
        for name in re.findall(
            r"-m\s+(scripts(?:\.[a-z_]+)+)(?![.\w])", page.read_text()
        )
    }
    assert len(named) > 20
    for name in named:
        path = harness.ROOT / f"{name.replace('.', '/')}.py"
        assert path.is_file() and "__main__" in path.read_text(), name


def test_a_result_is_of_a_program_that_is_there():
    for file in (SCRIPTS / "results").glob("*.jsonl"):
        first = json.loads(file.read_text().splitlines()[0])
        if "benchmark" in first:
            program = SCRIPTS / "bench" / f"{file.stem}.py"
            assert program.is_file() or (SCRIPTS / file.stem).is_dir(), file.name
        else:
            assert re.search("memory_|_suite", file.name), file.name
