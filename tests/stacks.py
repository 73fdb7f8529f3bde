"""One proof in one place: tests on several stacks, and what came of them all together.

    --record FILE       append what came of each test to FILE, a JSON object a line
    --proved FILE       tests that passed by this file, or by another that is given so, are
                        sampled here; others run whole
    --sample K          one in K of the files of what is proved, others every day; by files,
                        since the tests of one share what they prepare and compile
    --rotate K          one in K of the tests marked `rotates`, which are slow and repeat for
                        many cases, another part of them every day

`python tests/stacks.py FILE ...` adds the records up: how many ran, and what ran nowhere, by
reason. With `CI` set, a proof that ran nowhere is a failure.
"""

import json
import os
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

EXCUSED = (
    "needs the shared folder",
    "needs the golden case",
    "needs models that no registry is asked for",
)
"""Reasons for which a test may run nowhere begin so: the project passes without these."""

DAY = int(time.time() // 86400)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("stacks")
    group.addoption("--record", type=Path, metavar="FILE")
    group.addoption("--proved", type=Path, action="append", default=[])
    group.addoption("--sample", type=int, default=8, metavar="K")
    group.addoption("--rotate", type=int, default=1, metavar="K")
    group.addoption("--day", type=int, default=DAY, help="whose part of the sample")


def pytest_report_header(config: pytest.Config) -> list[str]:
    said = []
    if config.getoption("proved"):
        said.append("one in {sample} of the files proved elsewhere: --day {day}")
    if config.getoption("rotate") > 1:
        said.append("one in {rotate} of what repeats for many cases: --day {day}")
    return [line.format(**vars(config.option)) for line in said]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    passed = passes(read(config.getoption("proved")))
    day = config.getoption("day")

    def of_today(name: str, parts: int) -> bool:
        return zlib.crc32(name.encode()) % parts == day % parts

    sample, rotate = config.getoption("sample"), config.getoption("rotate")
    left = [
        item
        for item in items
        if (item.nodeid in passed and not of_today(_file(item.nodeid), sample))
        or (item.get_closest_marker("rotates") and not of_today(item.nodeid, rotate))
    ]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says why tests did not run, a line a reason: a silent skip looks like a proof."""
    stats = terminalreporter.stats
    skipped = [(r.nodeid, _reason(r)) for r in stats.get("skipped", [])]
    for reason, count in Counter(reason for _, reason in skipped).most_common():
        terminalreporter.write_line(f"{count} skipped: {reason}")
    config = terminalreporter.config
    record = config.getoption("record")
    if record is None or hasattr(
        config, "workerinput"
    ):  # xdist's, which report upwards
        return
    lines = [{"test": test, "skipped": reason} for test, reason in skipped]
    for outcome in ("passed", "failed", "error"):
        lines += [{"test": r.nodeid, outcome: True} for r in stats.get(outcome, [])]
    with record.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def _reason(report: pytest.TestReport) -> str:
    assert isinstance(report.longrepr, tuple)
    return report.longrepr[2].removeprefix("Skipped: ")


def read(files: Iterable[Path]) -> list[dict]:
    """Returns the lines of records; a file that is not there has none."""
    return [
        json.loads(line)
        for file in files
        if file.exists()
        for line in file.read_text().splitlines()
    ]


def passes(lines: Iterable[dict]) -> set[str]:
    """Returns the tests that passed on some stack."""
    return {line["test"] for line in lines if "passed" in line}


def main(files: list[Path]) -> int:
    """Adds up; returns the exit status."""
    lines = read(files)
    passed = passes(lines)
    files_passed = {_file(test) for test in passed}
    failed = {line["test"] for line in lines if "failed" in line or "error" in line}
    nowhere = {
        line["test"]: line["skipped"]
        for line in lines
        if "skipped" in line and line["test"] not in passed | files_passed
    }
    runs = sum("passed" in line for line in lines)
    print(f"{runs} runs on all stacks; {len(nowhere)} tests or files ran on none")
    for reason, count in Counter(nowhere.values()).most_common():
        print(f"  {count} ran nowhere: {reason}")
    missing = [r for r in nowhere.values() if not r.startswith(EXCUSED)]
    if missing and os.environ.get("CI"):
        print(f"a proof is missing, and CI is set: {len(missing)} ran nowhere")
    print(f"{len(passed)} passed, {len(failed)} failed, {len(nowhere)} skipped")
    return bool(failed) or bool(missing and os.environ.get("CI"))


if __name__ == "__main__":
    sys.exit(main([Path(arg) for arg in sys.argv[1:]]))
