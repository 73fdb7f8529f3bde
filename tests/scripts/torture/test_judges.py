"""What the programs that break runs find wrong: each judge can say no."""

import json
from pathlib import Path

import pytest

from scripts.torture.kills import Life, _digest, _left_over
from scripts.torture.long_run import figures
from scripts.torture.overwrites import Seen, judged, parts

MIB = 1 << 20


def samples(bytes_a_step: int, **last: int) -> list[dict[str, int]]:
    """What is seen of 5,000 steps, the first fifth of which warms up."""
    seen = [
        {
            "step": step,
            "held_bytes": 500 * MIB + step * bytes_a_step - (300 * MIB) * (step < 500),
            "peak_bytes": 600 * MIB,
            "arrays": 40,
            "compiled": 9,
        }
        for step in range(50, 5001, 50)
    ]
    seen[-1] |= last
    return seen


@pytest.mark.parametrize(
    ("seen", "flat"),
    [
        (samples(0), True),
        (samples(1000), True),
        (samples(10_000), False),
        (samples(0, arrays=41), False),
        (samples(0, compiled=10), False),
    ],
)
def test_memory_is_flat_or_not_after_the_warm_up(seen, flat):
    found = figures(seen)
    assert found["flat"] is flat
    assert found["warm_up_steps"] == 1050


OLD: Seen = ((0, ""), {"settings": "1", "metrics 1": "1", "adapter": "a", "1": "a"})
NEW: Seen = ((0, ""), {"settings": "2", "metrics 1": "2", "adapter": "b", "1": "b"})


@pytest.mark.parametrize(
    ("status", "has", "said"),
    [
        (0, OLD[1], "old"),
        (0, NEW[1], "new"),
        (0, {"settings": "2", "metrics 1": "2"}, "new"),
        (2, {"settings": "1", "adapter": "a"}, "refused, old"),
        (0, OLD[1] | {"1": "b"}, "wrong"),
        (0, {"settings": "2", "adapter": "a"}, "wrong"),
        (0, NEW[1] | {"2": "c"}, "wrong"),
        (2, {}, "refused"),
        (1, {}, "wrong"),
    ],
)
def test_a_run_is_the_old_one_or_the_new_in_all_its_parts(status, has, said):
    assert judged("run", (status, ""), has, OLD, NEW) == said


def test_an_output_is_the_old_or_the_new_by_what_it_gives():
    old, new = (((0, loss), {}) for loss in ("1.5", "2.5"))
    assert judged("merge", (0, "1.5"), {}, old, new) == "old"
    assert judged("merge", (0, "2.5"), {}, old, new) == "new"
    assert judged("merge", (2, ""), {}, old, new) == "refused"
    assert judged("merge", (0, "2.0"), {}, old, new) == "wrong"


def test_a_digest_leaves_out_what_has_another_name_each_time(tmp_path: Path):
    out = tmp_path / "out"
    assert _digest(out) == ""
    (out / "arrays" / "d").mkdir(parents=True)
    (out / "adapter.json").write_text("1")
    before = _digest(out)
    (out / "arrays" / "d" / "17").write_text("x")
    assert _digest(out) == before
    (out / "adapter.json").write_text("2")
    assert _digest(out) != before


def test_what_is_left_over_is_named_and_parts_are_told_apart(tmp_path: Path):
    out = tmp_path / "run"
    for name in ("adapter", "checkpoints/2", "checkpoints/3.partial"):
        (out / name).mkdir(parents=True)
    for name, digest in (("adapter", "a"), ("checkpoints/2", "b")):
        (out / name / "adapter.json").write_text(json.dumps({"sha256": digest}))
    assert parts(out) == {}  # nothing opens it
    (out / "config.toml").write_text("x")
    assert parts(out) == {"settings": "x", "adapter": '"a"', "2": '"b"'}
    (out / ".begun.toml").write_text("x")
    (tmp_path / ".run.writing-1").mkdir()
    life = Life("run", out, list, list)
    assert _left_over(life) == [".run.writing-1", ".begun.toml", "3.partial"]
