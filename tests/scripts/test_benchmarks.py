"""The GPU figures of BENCHMARKS.md and README.md are those of the records."""

import json
import re
from pathlib import Path

import pytest

from scripts.gpu import report

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


def compared(heading: str, record: str, silent: tuple[str, ...] = ()) -> set[tuple]:
    """Compares a table of products with its record; returns the products that it shows.

    A cell may be empty only where nothing was recorded, or where `silent` names its
    direction and rival: a figure that does not please cannot be left out.
    """
    every = report.table(recorded(record))
    at, direction, seen = "", "", set()
    for shape, way, m, us, *ratios in table(heading):
        at, direction = shape or at, way or direction
        n, k = map(int, at.split(" x "))
        found = every[n, k, direction, int(m)]
        seen.add((n, k, direction, int(m)))
        ours = found["decode"] if "decode" in us else report.choice(found)
        assert ours and same(us, ours["us"]), (m, us)
        whats = ("dense", "two_pass", "bitsandbytes")
        for what, cell in zip(whats, ratios, strict=True):
            if cell:
                ratio = found[what]["us"] / ours["us"]
                assert same(cell, ratio), (direction, m, what, cell, ratio)
            elif f"{direction} {what}" not in silent:
                assert what not in found, (direction, m, what, "recorded, not shown")
    return seen


def chosen(record: str) -> set[tuple]:
    """Products of which a record has the library's choice."""
    every = report.table(recorded(record))
    return {key for key, found in every.items() if report.choice(found)}


def test_the_librarys_choice_is_as_recorded_and_nothing_is_left_out():
    record = "nvidia_h200_suite.jsonl"
    shown = compared("### The library's choice", record)
    assert len(shown) >= 37 and shown >= chosen(record)


def test_what_the_first_run_alone_had_is_as_recorded():
    shown = compared("#### Of the first run", "h200_suite.jsonl", ("backward dense",))
    rest = chosen("h200_suite.jsonl") - chosen("nvidia_h200_suite.jsonl")
    assert len(rest) >= 8 and shown >= rest


def test_the_steps_are_as_recorded():
    rows = {
        (row["what"], row["batch"]): row
        for row in recorded("nvidia_h200_suite.jsonl")
        if row["section"] == "step"
    }
    cells = table("### A training step")
    assert len(cells) == len(rows) == 6
    for what, batch, rate, peak, note in cells:
        what = what.replace("qlora_jax", "ours").replace("PEFT + bitsandbytes", "peft")
        row, peft = rows[what, int(batch)], rows["peft", int(batch)]
        assert same(rate, row["tokens_per_s"]) and same(peak, row["peak_gib"])
        if note:
            ratio = row["tokens_per_s"] / peft["tokens_per_s"]
            assert same(note.replace("**", ""), ratio)


def test_memory_is_as_recorded():
    rows = {
        round(row["tokens_per_s"]): row
        for row in recorded("nvidia_h200_suite.jsonl")
        if row["section"] == "memory" and "failed" not in row
    }
    cells = table("### Memory")
    assert len(cells) == len(rows) == 6
    for _, _, rate, step, peak, xla, copies in cells:
        row = rows[number(rate)]
        account = row["xla"]["arguments"] + row["xla"]["temporaries"]
        assert same(step, row["step_s"]) and same(peak, row["peak_bytes"] / 1e9)
        assert same(xla, account / 1e9)
        assert not copies or same(copies, row["copies_s"])


def test_adapted_linears_are_as_recorded():
    rows = {
        (row["n"], row["k"], row["m"], row["what"].split()[0]): row["us"]
        for row in recorded("nvidia_h200_suite.jsonl")
        if row["section"] == "lora"
    }
    at, cells = "", table("### An adapted linear")
    assert 2 * len(cells) == len(rows)
    for shape, m, ours, rival, ratio in cells:
        at = shape or at
        n, k = map(int, at.split(" x "))
        us = [rows[n, k, int(m), what] for what in ("ours", "two_pass")]
        assert same(ours, us[0]) and same(rival, us[1])
        assert same(ratio, us[1] / us[0])


@pytest.mark.parametrize(
    ("pattern", "m"),
    [(r"forward is ([\d.]+) times", 4096), (r"token ([\d.]+) times", 1)],
)
def test_the_readme_says_what_one_run_measured(pattern, m):
    (said,) = re.findall(pattern, " ".join((ROOT / "README.md").read_text().split()))
    every = report.table(recorded("nvidia_h200_suite.jsonl"))
    found = every[14336, 4096, "forward", m]
    ours = report.choice(found)
    assert ours and same(said, found["dense"]["us"] / ours["us"])


def test_the_readmes_steps_are_as_recorded():
    text = " ".join((ROOT / "README.md").read_text().split())
    pattern = (
        r"takes ([\d.]+) GiB at batch 1 \(PEFT \+ bitsandbytes: ([\d.]+)\) at ([\d,]+) "
        r"tokens a second \(([\d,]+)\), ([\d.]+) GiB at batch 4 \(([\d.]+)\) at "
        r"([\d,]+) \(([\d,]+)\)\. A 70B-shaped one trained there in 48 GB, ([\d.]+) at its "
        r"peak, at ([\d,]+) tokens a second"
    )
    (said,) = re.findall(pattern, text)
    rows = recorded("nvidia_h200_suite.jsonl")
    steps = {(r["what"], r["batch"]): r for r in rows if r["section"] == "step"}
    large = [
        row
        for row in rows
        if row["section"] == "memory" and "70b in 48" in row["what"] and "step_s" in row
    ]
    (large,) = large
    wanted = []
    for batch in (1, 4):
        both = [steps[what, batch] for what in ("ours", "peft")]
        wanted += [f"{row['peak_gib']:.1f}" for row in both]
        wanted += [f"{round(row['tokens_per_s'], -2):,.0f}" for row in both]
    wanted += [f"{large['peak_bytes'] / 1e9:.1f}"]
    wanted += [f"{round(large['tokens_per_s'], -2):,.0f}"]
    assert list(said) == wanted


def test_what_fits_by_the_readme_is_as_recorded():
    all_away = {
        "embedding": "4bit",
        "head": "4bit",
        "checkpoint": "host",
        "offload": True,
    }
    wanted = [
        ("llama-8b", {"embedding": "4bit", "head": "4bit"}),
        ("llama-70b", {}),
        ("llama-70b", all_away),
        ("llama-70b", all_away | {"max_tokens": 8192}),
        ("llama-70b", all_away | {"stream": True}),
        ("llama-70b", all_away | {"stream": True, "max_tokens": 8192}),
        ("qwen3.5-27b", {}),
        ("qwen3.5-27b", {"max_tokens": 8192}),
        ("gemma4-31b", {}),
        ("gemma4-26b-a4b", {}),
        ("gemma4-e2b", {}),
        ("qwen3-30b-a3b", {}),
        ("gpt-oss-20b", {"mxfp4": "keep"}),
        ("gpt-oss-120b", {"mxfp4": "keep"}),
    ]
    texts = [
        (ROOT / "scripts/results" / name).read_text()
        for name in ("memory_h200.jsonl", "memory_unseen.jsonl")
    ]
    rows = [json.loads(line) for text in texts for line in text.splitlines()]
    rows = [row for row in rows if row["target"] == "h200"]
    found = {(r["model"], json.dumps(r["changes"], sort_keys=True)): r for r in rows}
    text = (ROOT / "README.md").read_text()
    lines = text[text.index("| model | rows of |") :].split("\n\n")[0].splitlines()[2:]
    for line, (model, changes) in zip(lines, wanted, strict=True):
        name, length, _, device, host = (x.strip() for x in line[1:-1].split("|"))
        plain = name.lower().replace(" 3 ", "-").replace("gemma 4", "gemma4")
        assert model == plain.replace(" ", "-")
        assert int(length) == changes.get("max_tokens", 2048)
        xla = found[model, json.dumps(changes, sort_keys=True)]["xla"]
        assert same(device, (xla["arguments"] + xla["temporaries"]) / 1e9), line
        assert same(host, xla["host"] / 1e9) if host else not xla["host"], line


def test_files_that_are_named_are_there():
    for text in ("scripts/BENCHMARKS.md", "pallas_kernels/README.md"):
        words = re.findall(r"[\w./]+\.(?:py|jsonl?|md)\b", (ROOT / text).read_text())
        assert words
        for word in words:
            places = ["", "scripts", "scripts/results", "pallas_kernels"]
            places += [f"pallas_kernels/packed_matmul{one}" for one in ("", "/decode")]
            places += [f"pallas_kernels/formats{one}" for one in ("", "/absmax4")]
            assert any((ROOT / place / word).exists() for place in places), (text, word)
