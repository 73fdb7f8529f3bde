"""Outputs are whole or not there: at every moment, for every kind of folder and failure."""

import errno
import logging
import os
from pathlib import Path

import pytest
import tiny

from qlora_jax import digests, disk, files
from qlora_jax.errors import CheckpointError, OutputError, OutputExistsError
from qlora_jax.files import new_file, new_folder, write_file
from scripts.torture.states import states


def make(out: Path, text: str) -> None:
    """Writes a small output of three files, one of them in a folder."""
    with new_folder(out, opened_by="config.json") as new:
        (new.path / "part").mkdir()
        for name in ("config.json", "weights", f"part/{text}", "part/both"):
            (new.path / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {
        name: (folder / name).read_text()
        for name in digests.files_in(folder)
        if name != digests.NAME and not name.startswith(".")
    }


def whole(text: str) -> dict[str, str]:
    return dict.fromkeys(("config.json", "weights", f"part/{text}", "part/both"), text)


def no_exchange(monkeypatch) -> None:
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)


def no_swap(monkeypatch) -> None:
    monkeypatch.setattr(files, "_may_swap", lambda folder, out: False)


def no_room_beside(monkeypatch) -> None:
    """No exchange is possible: the output is a mount point, or its parent is read-only."""

    def inside(out: Path) -> Path:
        folder = out / f".{out.name}.writing-00000000"
        folder.mkdir()
        return folder

    monkeypatch.setattr(files, "_hidden_folder", inside)


HOWS = [None, no_exchange, no_swap, no_room_beside]


@pytest.mark.parametrize("how", HOWS)
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path, monkeypatch, how):
    root, out = tmp_path / "a", tmp_path / "a" / "model"
    make(out, "old")
    (out / "notes").write_text("mine")
    if how is not None:
        how(monkeypatch)
    with states(root, tmp_path / "states") as found:
        make(out, "new")
    mine = {"notes": "mine"}
    assert content(out) == whole("new") | mine and len(found) > 10
    seen = set()
    for state in found:
        left = state / "model"
        if how is no_exchange and not left.exists():
            seen.add("away")  # and back as soon as anything is written there
        elif how in HOWS[2:] and not (left / "config.json").exists():
            seen.add("refused")
        else:
            now = content(left)
            assert now in (whole("old") | mine, whole("new") | mine), state
            seen.add(now["weights"])
        monkeypatch.undo()
        make(left, "next")
        assert content(left) == whole("next") | mine
        assert [x.name for x in state.iterdir()] == ["model"]  # nothing is left over
    others = {no_exchange: {"away"}, None: set()}.get(how, {"refused"})
    assert seen >= {"old"} | others


def test_a_folder_that_was_moved_away_comes_back(tmp_path, monkeypatch, caplog):
    out = tmp_path / "model"
    make(out, "old")
    out.rename(tmp_path / ".model.before-12345678")
    with pytest.raises(KeyboardInterrupt), new_folder(out, opened_by="x"):
        raise KeyboardInterrupt
    assert content(out) == whole("old") and "moved back" in caplog.text
    assert [x.name for x in tmp_path.iterdir()] == ["model"]


def test_an_error_leaves_nothing_of_a_new_folder(tmp_path):
    out = tmp_path / "a" / "b" / "model"
    with pytest.raises(ZeroDivisionError), new_folder(out, opened_by="x") as new:
        (new.path / "x").write_text("")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", [None, no_swap])
def test_what_others_put_into_a_folder_is_kept(tmp_path, monkeypatch, how):
    out, far = tmp_path / "model", tmp_path / "far"
    make(out, "old")
    far.mkdir()
    (far / "x").write_text("far")
    (out / "part" / "mine").write_text("mine")
    (out / "deep" / "er").mkdir(parents=True)
    (out / "deep" / "er" / "note").write_text("mine")
    (out / "deep" / "empty").mkdir()
    (out / "link").symlink_to(far)
    (out / "broken").symlink_to("nowhere")
    out.chmod(0o750)
    if how is not None:
        how(monkeypatch)
    make(out, "new")
    mine = {"part/mine": "mine", "deep/er/note": "mine"}
    assert content(out) == whole("new") | mine | {}
    assert (out / "deep" / "empty").is_dir() and (far / "x").read_text() == "far"
    assert os.readlink(out / "link") == str(far)
    assert os.readlink(out / "broken") == "nowhere"
    assert out.stat().st_mode & 0o777 == 0o750
    assert not (out / "part" / "old").exists()  # ours, and the new has none


def test_what_is_in_the_way_is_refused(tmp_path):
    out = tmp_path / "model"
    (out / "config.json").mkdir(parents=True)
    (out / "config.json" / "mine").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"config\.json is a folder.*move it"):
        make(out, "new")
    assert content(out) == {"config.json/mine": "mine"}
    write_file(tmp_path / "file", "mine")
    with pytest.raises(OutputExistsError, match="is a file"):
        make(tmp_path / "file", "new")
    assert [x.name for x in tmp_path.iterdir() if x.name.startswith(".")] == []


def test_a_link_to_a_folder_stays_one(tmp_path):
    make(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    make(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real") == whole("new")


def test_the_working_folder_is_replaced_in_place(tmp_path, monkeypatch):
    make(tmp_path / "model", "old")
    monkeypatch.chdir(tmp_path / "model")
    make(Path("."), "new")
    assert Path("config.json").read_text() == "new"
    assert content(tmp_path / "model") == whole("new")


def test_a_writer_that_lives_is_left_alone(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    out, dead = tmp_path / "model", tmp_path / ".model.writing-00000000"
    dead.mkdir()
    (dead / "weights").write_text("half")
    with new_folder(out, opened_by="x") as new:
        assert not dead.exists() and str(dead) in caplog.text
        make(out, "other")
        assert new.path.exists()
    (tmp_path / ".other.writing-00000000").mkdir()
    make(out, "new")
    assert (tmp_path / ".other.writing-00000000").exists()  # another output's


def test_a_file_is_replaced_whole_and_never_through_a_link(tmp_path):
    far, path = tmp_path / "far", tmp_path / "config.toml"
    far.write_text("far")
    path.symlink_to(far)
    write_file(path, "new")
    assert far.read_text() == "far" and not path.is_symlink()
    assert path.read_text() == "new"
    with states(tmp_path, tmp_path.parent / f"{tmp_path.name}-states") as found:
        write_file(path, b"newer")
    texts = {(state / "config.toml").read_text() for state in found}
    assert texts <= {"new", "newer"} and len(found) >= 2
    with pytest.raises(ZeroDivisionError), new_file(path, overwrite=True) as beside:
        beside.write_text("half")
        raise ZeroDivisionError
    with (
        pytest.raises(OutputExistsError, match="exists"),
        new_file(path, overwrite=False) as beside,
    ):
        beside.write_text("other")
    assert path.read_text() == "newer"
    assert {x.name for x in tmp_path.iterdir()} == {"far", "config.toml"}


def test_a_limit_on_files_is_one_message(tmp_path):
    out = tmp_path / "model"
    make(out, "old")
    with (
        pytest.raises(OutputError, match=r"model cannot be written: .*ulimit -f"),
        tiny.file_limit(100),
        new_folder(out, opened_by="x") as new,
    ):
        (new.path / "x").write_bytes(bytes(1000))
    with pytest.raises(OutputError, match="ulimit"), tiny.file_limit(100):
        write_file(out / "config.json", bytes(1000))
    assert content(out) == whole("old")
    assert [x.name for x in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "No space left on device; free some space"),
        (errno.EDQUOT, "your quota"),
        (errno.EROFS, "choose a place that can be written to"),
        (errno.EACCES, "that you may write to"),
    ],
)
def test_what_ails_the_disk_is_said_with_what_to_do(
    tmp_path, monkeypatch, number, said
):
    out = tmp_path / "model"
    make(out, "old")

    def fail(path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(files, "sync", fail)
    with pytest.raises(OutputError, match=said) as caught:
        make(out, "new")
    assert str(out) in str(caught.value)
    assert content(out) == whole("old")
    assert [x.name for x in tmp_path.iterdir()] == ["model"]


def test_an_error_without_a_number_on_a_full_disk_is_that(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_left", lambda path: (0, 5))
    with (
        pytest.raises(OutputError, match="No space left on device; free some"),
        new_file(tmp_path / "x", overwrite=False),
    ):
        raise OSError("11008 requested and 8768 written")
    with (
        pytest.raises(OutputError, match="No space left on device"),
        new_folder(tmp_path / "y", opened_by="x") as new,
    ):  # as shutil.copyfile names both files
        raise OSError(errno.ENOSPC, "", "source", None, str(new.path / "x"))
    monkeypatch.setattr(disk, "_left", lambda path: (0, 0))
    with (
        pytest.raises(OutputError, match="no inodes are left there; remove files"),
        new_file(tmp_path / "x", overwrite=False),
    ):
        raise OSError(errno.ENOSPC, "")
    assert not list(tmp_path.iterdir())


def test_room_is_asked_for_before_a_library_writes(tmp_path):
    disk.check_room(tmp_path, 1 << 20)
    with pytest.raises(OSError) as caught, tiny.file_limit(1 << 18):
        disk.check_room(tmp_path, 1 << 18)
    assert caught.value.errno == errno.EFBIG and not list(tmp_path.iterdir())


def test_an_error_in_reading_another_file_stays_that(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="source"),
        new_folder(tmp_path / "model", opened_by="x"),
    ):
        (tmp_path / "source").read_text()


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"format": 1}',
        '{"format": 2, "files": {}}',
        '{"format": 1, "files": {"a": 1}}',
        '{"format": 1, "files": {"a": {"bytes": 1}}}',
        '{"format": 1, "files": {"a": {"bytes": true, "sha256": ""}}}',
        '{"format": 1, "files": {"a": {"bytes": 1, "header": "", "tensors": []}}}',
        '{"format": 1, "files": {"a": {"bytes": 1, "tensors": {"b": 1}}}}',
        '{"format": 1, "files": {}}',
    ],
)
def test_a_damaged_list_is_refused(tmp_path, text):
    (tmp_path / digests.NAME).write_text(text)
    with pytest.raises(CheckpointError, match=r"sha256\.json is damaged .*make the"):
        digests.read(tmp_path)
    assert digests.listed(tmp_path) == set()
