"""A run begins whole: what was there goes in an order that mixes nothing, and only ours."""

import json
import shutil
from pathlib import Path

import pytest
import tiny

from qlora_jax.adapters import Adapter
from qlora_jax.cli.begin import (
    beginning,
    check_run_folder,
    made,
    withdrawn_unless_saved,
)
from qlora_jax.config.run import RunConfig, has_run, read_run, write_run
from qlora_jax.disk import PROBE
from qlora_jax.errors import OutputError, OutputExistsError
from qlora_jax.exchange.ours import save_adapter
from qlora_jax.exchange.steps import newest
from qlora_jax.train.lock import locked
from scripts.torture.states import states

OLD, NEW = (RunConfig(model=name, data_file=("rows",)) for name in ("old", "new"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run that ended, as far as a new one clears it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    out.mkdir()
    write_run(out, OLD)
    adapter = Adapter.of(tiny.adapted(tiny.decoder()))
    save_adapter(out / "adapter", adapter.lora, adapter.config)
    for step in ("1", "2"):
        position = out / "checkpoints" / step / "position"
        position.mkdir(parents=True)
        (position / "metadata").write_text("{}")
    for name in ("metrics.jsonl", "report.html", "loss.png"):
        (out / name).write_text("old")
    (out / "notes.txt").write_text("mine")
    return out


def test_every_moment_is_the_old_run_or_the_new_or_none(finished: Path, tmp_path: Path):
    out = shutil.copytree(finished, tmp_path / "a" / "run")
    with states(tmp_path / "a", tmp_path / "states") as found, beginning(out, NEW):
        (out / "base").mkdir()
    assert read_run(out) == NEW and len(found) > 20
    assert {x.name for x in out.iterdir()} == {"config.toml", "base", "notes.txt"}
    seen = set()
    for state in found:
        left = state / "run"
        assert (left / "notes.txt").read_text() == "mine"
        adapter = (left / "adapter" / "adapter.json").exists()
        if not has_run(left):  # nothing is opened, and the next try goes on
            seen.add("none")
            assert not adapter and newest(left / "checkpoints") == (None, [])
        elif read_run(left) == OLD:  # finished, to be resumed, or without a checkpoint
            at, _ = newest(left / "checkpoints")
            seen.add(f"adapter {adapter}, {at and at.name}")
            assert at is not None or not adapter
        else:
            seen.add("new")
            assert not adapter and not (left / "checkpoints").exists()
        check_run_folder(left, overwrite=True)
        with beginning(left, NEW):
            pass
        assert {x.name for x in left.iterdir()} <= {"config.toml", "notes.txt"}
    assert seen >= {
        "adapter True, 2",
        "adapter False, 2",
        "adapter False, None",
        "none",
    }


@pytest.mark.parametrize(
    "left",
    ["3.partial", "2.old.partial", "2.damaged.partial", "4.orbax-checkpoint-tmp-17"],
)
def test_checkpoints_that_a_kill_left_go_with_the_run(
    finished: Path, tmp_path: Path, left: str
):
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "checkpoints" / left / "adapter").mkdir(parents=True)
    (out / "checkpoints" / "9.partial").mkdir()  # as it asks for room
    (out / "checkpoints" / "9.partial" / PROBE).touch()
    with beginning(out, NEW):
        pass
    assert not (out / "checkpoints").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("checkpoints/mine.txt", "checkpoints/mine.txt is no checkpoint"),
        ("checkpoints/7/model.pt", "checkpoints/7 is no checkpoint"),
        ("checkpoints/best/x", "checkpoints/best is no checkpoint"),
        ("adapter/mine.txt", "adapter/mine.txt is no file of a run"),
        ("base/mine.txt", "base/mine.txt is no file of a run"),
        ("base-nf4/mine.txt", "base-nf4/mine.txt is no file of a run"),
    ],
)
def test_what_others_put_among_a_runs_files_is_refused(
    finished: Path, tmp_path: Path, name: str, said: str
):
    out = shutil.copytree(finished, tmp_path / "run")
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("mine")
    before = sorted(out.rglob("*"))
    for begin in (lambda: check_run_folder(out, True), beginning(out, NEW).__enter__):
        with pytest.raises(OutputExistsError) as caught:
            begin()
        assert said in str(caught.value) and "move it away" in str(caught.value)
    assert sorted(out.rglob("*")) == before and (out / name).read_text() == "mine"


def test_a_folder_that_is_no_runs_keeps_what_it_has(tmp_path: Path):
    (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    (tmp_path / "report.html").write_text("mine")
    (tmp_path / "config.toml").write_text('[tool.mine]\nx = 1\nmodel = "m"\n')
    with pytest.raises(OutputExistsError, match="3 problems") as caught:
        check_run_folder(tmp_path, overwrite=True)
    for name in ("checkpoints", "report.html", "config.toml"):
        assert f"{name} is no f" in str(caught.value)
    assert (tmp_path / "report.html").read_text() == "mine"
    with pytest.raises(OutputExistsError, match="pass --overwrite"):
        check_run_folder(tmp_path, overwrite=False)


def test_links_are_not_followed(finished: Path, tmp_path: Path):
    out = shutil.copytree(finished, tmp_path / "run")
    far = tmp_path / "far.toml"
    (out / "config.toml").rename(far)
    (out / "config.toml").symlink_to(far)
    before = far.read_text()
    with beginning(out, NEW):
        pass
    assert far.read_text() == before and read_run(out) == NEW
    (tmp_path / "steps").mkdir()
    (out / "checkpoints").symlink_to(tmp_path / "steps")
    with pytest.raises(OutputExistsError, match="checkpoints is no folder of a run"):
        check_run_folder(out, overwrite=True)


def test_what_fails_as_a_run_begins_leaves_no_run(finished: Path, tmp_path: Path):
    out = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(ZeroDivisionError), beginning(out, NEW):
        raise ZeroDivisionError
    assert [x.name for x in out.iterdir()] == ["notes.txt"]
    new = tmp_path / "new"
    with pytest.raises(ZeroDivisionError), made(new), beginning(new, NEW):
        raise ZeroDivisionError
    assert not new.exists()


def test_an_error_before_the_first_checkpoint_leaves_nothing(
    finished: Path, tmp_path: Path
):
    class BadRowsError(Exception):
        """What a run fails with."""

    def fail(out: Path, saved: bool) -> None:
        with (
            pytest.raises(BadRowsError),
            made(out),
            locked(out),
            withdrawn_unless_saved(out),
        ):
            with beginning(out, NEW):
                pass
            (out / "metrics.jsonl").write_text("")
            (out / "checkpoints" / ("1" if saved else "1.partial")).mkdir(parents=True)
            raise BadRowsError

    fail(tmp_path / "a" / "new", saved=False)
    assert not (tmp_path / "a").exists()
    fail(tmp_path / "a" / "new", saved=True)
    assert (tmp_path / "a" / "new" / "config.toml").exists()
    out = shutil.copytree(finished, tmp_path / "run")
    fail(out, saved=False)
    assert [x.name for x in out.iterdir()] == ["notes.txt"]


@pytest.fixture
def of_a_trainer(finished: Path, tmp_path: Path) -> Path:
    """What a Trainer writes without the command: no settings."""
    out = shutil.copytree(finished, tmp_path / "trained")
    for name in ("config.toml", "report.html", "loss.png"):
        (out / name).unlink()
    for step in ("1", "2"):
        position = {"seed": 0, "rows": 8, "lora": {}, "steps": 2}
        place = out / "checkpoints" / step / "position" / "metadata"
        place.write_text(json.dumps(position))
    return out


def test_a_folder_of_a_trainer_alone_may_be_overwritten(of_a_trainer: Path):
    check_run_folder(of_a_trainer, overwrite=True)
    with beginning(of_a_trainer, NEW):
        pass
    assert {x.name for x in of_a_trainer.iterdir()} == {"config.toml", "notes.txt"}


@pytest.mark.parametrize(
    "name", ["report.html", "base/x", "adapter/mine", "checkpoints/3/mine"]
)
def test_what_no_trainer_wrote_is_refused_beside_what_it_did(
    of_a_trainer: Path, name: str
):
    (of_a_trainer / name).parent.mkdir(exist_ok=True)
    (of_a_trainer / name).write_text("mine")
    with pytest.raises(OutputExistsError, match=name.partition("/")[0]):
        check_run_folder(of_a_trainer, overwrite=True)


def test_a_full_disk_leaves_the_old_run(finished: Path, tmp_path: Path, monkeypatch):
    out = shutil.copytree(finished, tmp_path / "run")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}

    def full(path: Path, data: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with (
        pytest.raises(OutputError, match=r"begun\.toml cannot be written: No space"),
        beginning(out, NEW),
    ):
        raise AssertionError
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
