"""metrics.jsonl: what is lost or damaged is named, and restored where there is a copy."""

import json
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.train.figures import figures_of, skipped_last
from qlora_jax.train.metrics import MetricsLog, read_metrics

ROWS = [{"step": 0, "eval_loss": 3.0}]
ROWS += [{"step": i, "loss": 1.0 / i, "tokens": 8.0} for i in range(1, 5)]
LINES = [json.dumps(row).encode() + b"\n" for row in ROWS]


def resumed(path: Path, copy: Path | None) -> list[dict]:
    log = MetricsLog(path, 4, copy)
    log.write(step=5, loss=0.5)
    log.close()
    return read_metrics(path)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (None, "metrics.jsonl is lost;"),
        ([], "lacks line 1 to 5;"),
        (LINES[:3], "lacks line 4 to 5;"),
        ([*LINES[:4], LINES[4][:9]], "was changed or damaged in line 5;"),
        ([LINES[0], b"[1]\n", *LINES[2:]], "was changed or damaged in line 2;"),
        ([LINES[0], b"\xff\xfe\n", *LINES[2:4]], "in line 2 and lacks line 5;"),
        ([*LINES, b'{"step": 5, "lo'], None),
        ([*LINES, b'{"step": 5, "loss": 9.0}\n'], None),
    ],
)
def test_what_a_checkpoint_has_is_restored(tmp_path: Path, caplog, there, said):
    path, copy = tmp_path / "metrics.jsonl", tmp_path / "copy.jsonl"
    copy.write_bytes(b"".join(LINES))
    if there is not None:
        path.write_bytes(b"".join(there))
    assert resumed(path, copy) == [*ROWS, {"step": 5, "loss": 0.5}]
    assert (said or "") in caplog.text and bool(caplog.text) == (said is not None)


def test_without_a_copy_steps_that_are_missing_are_named(tmp_path: Path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join([LINES[0], LINES[1], b"junk\n", LINES[4]]))
    assert [row["step"] for row in resumed(path, None)] == [0, 1, 4, 5]
    assert "line 3 left out: no JSON object of a step" in caplog.text
    assert "has no metrics of step 2 to 3" in caplog.text


@pytest.mark.parametrize(
    "line",
    [b"[1]", b"7", b'{"loss": 1}', b'{"step": "x"}', b'{"step": true}', b"\xff"]
    + [b'{"step": -1}', b'{"step": 1, "loss": "x"}', b"[" * 100_000]
    + [b'{"step": 1, "loss": 1%s}' % (b"0" * 5000), b'{"step": 1, "loss": [1]}'],
    ids=range(11),
)
def test_lines_that_are_no_step_are_named_by_number(tmp_path: Path, caplog, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(LINES[0] + line + b"\n" + LINES[1])
    assert read_metrics(path) == ROWS[:2]
    assert f"{path}: line 2 left out" in caplog.text


def test_what_is_not_finite_is_null_and_left_out_of_figures(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, -1)
    log.write(step=1, loss=float("nan"), grad_norm=float("inf"))
    log.close()
    assert path.read_text() == '{"step": 1, "loss": null, "grad_norm": null}\n'
    rows = read_metrics(path)
    assert figures_of(rows) == {"tokens": 0.0}
    rows = [
        {"loss": np.nan},
        {"loss": None},
        {"loss": 2.0, "tokens": None, "skipped": 2.0},
    ]
    assert figures_of([*rows[:2], rows[2]] * 10)["loss"] == 2.0
    assert figures_of(rows)["skipped"] == 2.0


def test_steps_skipped_in_a_row_are_counted():
    counts = [0, 1, 1, 2, 3, 4]
    rows = [{"loss": 1.0, "skipped": float(x)} for x in counts]
    assert [skipped_last(rows[: i + 1]) for i in range(6)] == [0, 1, 0, 1, 2, 3]
    assert skipped_last([{"loss": 1.0}]) == 0
