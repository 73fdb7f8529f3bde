"""scripts/gpu/suite.py as a command: resume, exit status, what was not reached, report."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from gpu_cases import case, numbered

from scripts.bench import harness
from scripts.gpu import report, suite, tasks

ROOT = Path(__file__).parents[3]

PROGRAM = """
import sys
from scripts.gpu import suite, tasks
made = [
    {"section": "numerics", "what": "a", "direction": "forward", "dtype": "bfloat16"}
    | {"check": "bits", "m": m, "n": 1, "k": 1}
    for m in range(40)
]
tasks.numerics = lambda device: made
sys.exit(suite.main(sys.argv[2:], [sys.executable, "-c", sys.argv[1]]))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(fake, tmp_path):
    out = tmp_path / "rows.jsonl"
    args = ["--only", "numerics", "--out", str(out), "--workers", "2"]
    command = [sys.executable, "-c", PROGRAM, fake[2], *args]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    first = subprocess.Popen(command, cwd=ROOT, **quiet)
    while len(harness.read_rows(out)) < 4:
        assert first.poll() is None, "it ended before it was killed"
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    done = [row for row in harness.read_rows(out) if "m" in row]
    assert 3 <= len(done) < 40
    with open(out, "a") as stream:  # as a kill in the middle of a row leaves it
        stream.write('{"section": "numerics", "what": "a", "m')
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    rows = [row for row in harness.read_rows(out) if "m" in row]
    assert sorted(row["m"] for row in rows) == list(range(40))
    assert rows[: len(done)] == done


REAL = """
import dataclasses, os
from pallas_kernels.packed_matmul import IMPLEMENTATIONS
from scripts.gpu import suite, workers
if os.environ.get("SPOIL"):
    one = IMPLEMENTATIONS["xla"]
    IMPLEMENTATIONS["xla"] = dataclasses.replace(
        one, backward=lambda *args: one.backward(*args) * 1.02
    )
workers.serve(suite.handle)
"""


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [False, True])
def test_the_command_fails_if_a_product_is_wrong(spoil, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPOIL", "1" if spoil else "")
    cases = [case(w, d) for w in ("xla", "two_pass") for d in tasks.DIRECTIONS]
    monkeypatch.setattr(tasks, "numerics", lambda device: cases)
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-c", REAL]
    args = ["--only", "numerics", "--out", str(out), "--workers", "1"]
    assert suite.main(args, command) == (1 if spoil else 0)
    said = capsys.readouterr().out
    assert ("FAILED section=numerics what=xla direction=backward" in said) == spoil
    assert said.count("| passed |") == (3 if spoil else 4)
    run, *rows = harness.read_rows(out)
    assert run["section"] == "run" and run["versions"]["jax"] == jax.__version__
    assert str(tmp_path) not in json.dumps(run)
    assert len(rows) == 4
    # Again: nothing is left to do, and the verdict stays.
    assert suite.main(args, command) == (1 if spoil else 0)
    assert len(harness.read_rows(out)) == 5


@pytest.mark.parametrize("minutes", ["0", "1"])
def test_what_was_not_reached_is_said(minutes, fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "numerics", lambda device: numbered("a", "misfit"))
    args = ["--out", str(tmp_path / "rows.jsonl"), "--minutes", minutes]
    suite.main(args, fake)
    said = capsys.readouterr().out
    assert ("not reached in 0 minutes: 2 of numerics" in said) == (minutes == "0")


def test_the_report_reads_the_shipped_results(capsys):
    shipped = ROOT / "scripts" / "results" / "h200_suite.jsonl"
    assert suite.main(["--report", str(shipped)]) == 0
    said = capsys.readouterr().out
    assert "copy (x + 1 over 4 GiB): 3.37 TB/s" in said
    # One token of the largest linear: cuBLAS took 2.79 times as long.
    lines = said[said.index("## 14336 x 4096 forward") :].splitlines()
    (line,) = [line for line in lines[:12] if line.startswith("| 1 |")]
    assert line == "| 1 | **14.7** | 115.0 | 40.8 | 29.3 | 61% | bytes | 2.79 | 2.00 |"
    assert "ours batch 4: 5,518 tokens/s, peak 9.56 GiB" in said


def test_the_report_shows_the_choice_its_share_and_the_goals():
    ceilings = [
        {"section": "ceilings", "what": "copy", "us": 2 * (1 << 32) / 4e12 * 1e6},
        {"section": "ceilings", "what": "product", "us": 2 * 8192**3 / 8e14 * 1e6},
    ]

    def row(what, m, us, **fields):
        at = {"section": "sweep", "what": what, "direction": "forward", "m": m}
        return at | {"n": 4096, "k": 4096, "us": us} | fields

    rows = [
        *ceilings,
        row("decode", 1, 4.0, chosen=True),
        row("hopper", 1, 9.0, chosen=False),
        row("dense", 1, 12.0),
        row("hopper", 4096, 200.0, chosen=True),
        row("dense", 4096, 180.0),
        row("two_pass", 4096, 99.0, failed="an older try"),
        row("two_pass", 4096, 210.0),
    ]
    said = "\n".join(report.report(rows))
    share = (4096 * 4096 * 4.127 / 8 + 4 * 4096) / 4e12 * 1e6 / 4.0
    assert f"| 1 | **4.0** | 9.0 |  | 12.0 | {share:.0%} | bytes | 3.00 |" in said
    assert "| 4096 |  | **200.0** | 210.0 | 180.0 | 86% | operations | 0.90 |" in said
    assert "forward: dense / choice | 3 | 3.00" in said and "| 1 of 1 |" in said
    assert "| 0.95 | 0.90 (4096 x 4096, m=4096)" in said and "| 0 of 1 |" in said
    assert "an older try" not in said
