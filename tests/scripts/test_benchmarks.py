"""The GPU figures of BENCHMARKS.md and README.md are those of the records."""

import json
import re
from pathlib import Path

import gpu_report
import pytest

ROOT = Path(__file__).parents[2]

TEXT = (ROOT / "scripts" / "BENCHMARKS.md").read_text()


def recorded(name: str) -> list[dict]:
    lines = (ROOT / "scripts" / "results" / name).read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def table(heading: str) -> list[list[str]]:
    """Cells of the first table under a heading."""
    text = TEXT[TEXT.index(heading) :].split("\n\n| ", 1)[1].split("\n\n")[0]
    lines = text.splitlines()[2:]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


def number(cell: str) -> float | None:
    found = re.match(r"\**([\d.,]+)", cell)
    return float(found[1].replace(",", "")) if found else None


def same(cell: str, value: float) -> bool:
    """Whether a cell is a value, rounded to the digits that it shows."""
    shown = number(cell)
    digits = len(cell.strip("*").split()[0].partition(".")[2])
    return shown is not None and abs(shown - value) <= 0.51 * 10**-digits


def test_the_librarys_choice_is_as_recorded():
    every = gpu_report.table(recorded("h200_suite.jsonl"))
    at, direction, seen = "", "", 0
    for shape, way, m, us, *ratios in table("### The library's choice"):
        at, direction = shape or at, way or direction
        n, k = map(int, at.split(" x "))
        found = every[n, k, direction, int(m)]
        assert same(us, found["ours"]["us"]), (m, us)
        whats = ("dense", "two_pass", "bitsandbytes")
        for what, cell in zip(whats, ratios, strict=True):
            if cell:
                ratio = found[what]["us"] / found["ours"]["us"]
                assert same(cell, ratio), (direction, m, what, cell, ratio)
                seen += 1
    assert seen > 30


def test_the_products_alone_are_as_recorded():
    rows = recorded("h200_kernels.jsonl") + [
        row | {"direction": "forward", "what": "decode"}
        for row in recorded("h200_decode.jsonl")
    ]
    at, seen = "", 0
    for shape, m, *cells in table("### Products alone"):
        at = shape or at
        n, k = map(int, at.split(" x "))
        for direction, us, ratio in (
            ("forward", *cells[:2]), ("backward", *cells[2:])):  # fmt: skip
            if not us:
                continue
            mine = [
                row
                for row in rows
                if "us" in row
                and (row["n"], row["k"], row["m"]) == (n, k, int(m))
                and row["direction"] == direction
            ]
            name = "decode" if "decode" in us else "hopper"
            best = min(row["us"] for row in mine if row["what"] == name)
            assert same(us, best), (at, m, direction, us, best)
            if ratio:
                (dense,) = (row["us"] for row in mine if row["what"] == "dense")
                assert same(ratio, dense / best), (at, m, direction, ratio)
                seen += 1
    assert seen > 15


def test_the_steps_are_as_recorded():
    rows = {
        (row["what"], row["batch"]): row
        for row in recorded("h200_suite.jsonl")
        if row["section"] == "step"
    }
    for what, batch, rate, peak, *_ in table("### A training step"):
        row = rows["ours" if what == "qlora_jax" else "peft", int(batch)]
        assert same(rate, row["tokens_per_s"]) and same(peak, row["peak_gib"])


@pytest.mark.parametrize(
    ("pattern", "m"),
    [(r"forward is ([\d.]+) times", 4096), (r"token ([\d.]+) times", 1)],
)
def test_the_readme_says_what_one_run_measured(pattern, m):
    (said,) = re.findall(pattern, " ".join((ROOT / "README.md").read_text().split()))
    every = gpu_report.table(recorded("h200_suite.jsonl"))
    found = every[14336, 4096, "forward", m]
    assert same(said, found["dense"]["us"] / found["ours"]["us"])


def test_files_that_are_named_are_there():
    for text in ("scripts/BENCHMARKS.md", "pallas_kernels/README.md"):
        words = re.findall(r"[\w./]+\.(?:py|jsonl?|md)\b", (ROOT / text).read_text())
        assert words
        for word in words:
            places = ("", "scripts", "scripts/results", "pallas_kernels")
            assert any((ROOT / place / word).exists() for place in places), (text, word)
