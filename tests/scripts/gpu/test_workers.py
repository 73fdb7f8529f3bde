"""Worker processes: hangs, deaths, turns on the GPU, and the end of the time."""

import time
from pathlib import Path

import pytest
from gpu_cases import numbered

from scripts.bench import harness
from scripts.gpu import workers
from scripts.gpu.workers import Lane


def test_what_hangs_dies_or_fails_has_a_row_and_spoils_no_other(fake, tmp_path):
    tasks = numbered("a", "b", "misfit", "c", "hang", "d", "die", "e", "sick", "f")
    out = tmp_path / "rows.jsonl"
    run = workers.Run(fake, out, time.time() + 100, lambda task: (60.0, 1.0))
    run([Lane(list(tasks))])
    rows = harness.read_rows(out)
    assert [row["i"] for row in rows] == list(range(10))
    a, b, misfit, c, hang, d, die, e, sick, f = rows
    assert misfit["failed"] == "ValueError: does not fit" and "lost" not in misfit
    assert hang["failed"] == "no answer in 1 s" and hang["lost"]
    assert die["failed"] == "its process ended with status 7" and die["lost"]
    assert "CUDA_ERROR" in sick["failed"]
    # A process goes on as long as nothing went wrong on the GPU.
    assert a["pid"] == b["pid"] == c["pid"]
    assert len({row["pid"] for row in (c, d, e, f)}) == 4
    assert "what a library prints" in Path(f"{out}.log").read_text()


def test_what_hung_is_run_again_only_if_asked(fake, tmp_path):
    tasks = numbered("a", "hang", "misfit", "b")
    rows = [tasks[0] | {"us": 1.0}, tasks[1] | {"failed": "no answer", "lost": True}]
    rows += [tasks[2] | {"failed": "ValueError"}]
    assert workers.outstanding(tasks, rows) == [tasks[2], tasks[3]]
    assert workers.outstanding(tasks, rows, retry_lost=True) == tasks[1:]


def test_processes_run_one_at_a_time_and_not_while_others_compile(fake, tmp_path):
    out = tmp_path / "rows.jsonl"
    run = workers.Run(fake, out, time.time() + 100, lambda task: (60.0, 10.0))
    run([Lane(numbered(*"abcdef"), 3), Lane(numbered(*"ghi"), alone=True)])
    rows = harness.read_rows(out)
    assert len(rows) == 9
    spans = sorted(row["at"] for row in rows)
    assert all(
        end <= begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False)
    )
    for begin, end in spans:
        for compiled in (row["compiled"] for row in rows):
            assert compiled[1] <= begin or end <= compiled[0]
    assert len({row["pid"] for row in rows if row["what"] in "ghi"}) == 3


@pytest.mark.slow
def test_the_time_cuts_the_tail_and_leaves_no_row_of_it(fake, tmp_path):
    out = tmp_path / "rows.jsonl"
    began = time.time()
    run = workers.Run(fake, out, began + 3, lambda task: (500.0, 500.0))
    run([Lane(numbered("a", "hang", "b"))])
    assert time.time() - began < 20
    assert [row["what"] for row in harness.read_rows(out)] == ["a"]
