"""What runs on which stack, and that no proof is lost between them."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import stacks

TESTS = [f"tests/test_{i // 2}.py::test_it[{i}]" for i in range(40)]


def write(path: Path, **outcomes: dict) -> Path:
    lines = [{"test": name, **outcome} for name, outcome in outcomes.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def chosen() -> Callable[..., list[str]]:
    """Which tests a stack runs, by the options it is given."""

    def choose(**options: object) -> list[str]:
        deselected: list = []
        hook = SimpleNamespace(pytest_deselected=lambda items: deselected.extend(items))
        options = {"proved": [], "sample": 4, "rotate": 1, "day": 0} | options
        config = SimpleNamespace(getoption=options.__getitem__, hook=hook)
        items = [Item(name) for name in TESTS]
        stacks.pytest_collection_modifyitems(config, items)  # type: ignore[arg-type]
        assert len(items) + len(deselected) == len(TESTS)
        return [item.nodeid for item in items]

    return choose


class Item:
    def __init__(self, nodeid: str):
        self.nodeid = nodeid

    def get_closest_marker(self, name: str) -> bool:
        """Whether a test rotates: the first ten do."""
        return name == "rotates" and self.nodeid in TESTS[:10]


def test_a_stack_runs_all_that_no_other_has_passed(
    chosen: Callable[..., list[str]], tmp_path: Path
):
    assert chosen() == TESTS
    skipped = {name: {"skipped": "needs jax"} for name in TESTS[:20]}
    failed = {name: {"failed": True} for name in TESTS[20:]}
    file = write(tmp_path / "a", **skipped, **failed)
    assert chosen(proved=[file]) == TESTS


def test_what_rotates_has_a_part_a_day_on_every_stack_and_the_rest_runs_whole(
    chosen: Callable[..., list[str]],
):
    days = [chosen(rotate=3, day=day) for day in range(3)]
    for day in days:
        assert day[-30:] == TESTS[10:]
    parts = [set(day) - set(TESTS[10:]) for day in days]
    assert set().union(*parts) == set(TESTS[:10])
    assert sum(map(len, parts)) == 10


def test_every_day_has_its_part_and_all_days_together_the_whole(
    chosen: Callable[..., list[str]], tmp_path: Path
):
    file = write(tmp_path / "a", **{name: {"passed": True} for name in TESTS[:30]})
    days = [chosen(proved=[file], day=day) for day in range(4)]
    for day in days:
        assert day[-10:] == TESTS[30:]
    parts = [set(day) - set(TESTS[30:]) for day in days]
    assert set().union(*parts) == set(TESTS[:30])
    assert sum(map(len, parts)) == 30 and all(parts)
    for part in parts:  # whole files, which have two tests each
        assert len({name.partition("::")[0] for name in part}) == len(part) / 2
    assert chosen(proved=[file], day=5) == days[1]
    assert chosen(proved=[file], sample=1) == TESTS


def added_up(capsys: pytest.CaptureFixture[str], *files: Path) -> tuple[int, str]:
    status = stacks.main(list(files))
    return status, capsys.readouterr().out


def test_what_ran_on_no_stack_is_said_and_fails_where_ci_is_set(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.delenv("CI", raising=False)
    one = write(
        tmp_path / "one",
        a={"passed": True},
        b={"skipped": "needs jax >= 0.11.2"},
        c={"skipped": "needs the shared folder, and x is none"},
        **{"f.py": {"skipped": "Mosaic GPU kernels need jax >= 0.11.2"}},
    )
    two = write(tmp_path / "two", b={"passed": True}, **{"f.py::t": {"passed": True}})
    status, out = added_up(capsys, one, tmp_path / "absent")
    assert status == 0
    assert "1 ran nowhere: needs jax >= 0.11.2" in out
    assert out.splitlines()[-1] == "1 passed, 0 failed, 3 skipped"
    monkeypatch.setenv("CI", "true")
    status, out = added_up(capsys, one)
    assert status == 1 and "a proof is missing" in out
    status, out = added_up(capsys, one, two)
    assert status == 0  # the shared folder is no part of the project
    assert out.splitlines()[-1] == "3 passed, 0 failed, 1 skipped"


def test_a_failure_on_one_stack_is_one_though_another_passed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    one = write(tmp_path / "one", a={"passed": True})
    two = write(tmp_path / "two", a={"error": True})
    status, out = added_up(capsys, one, two)
    assert status == 1 and "1 passed, 1 failed, 0 skipped" in out
