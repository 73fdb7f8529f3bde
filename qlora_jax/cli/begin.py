"""Begins a run: clears away the run that it replaces, and writes its settings last.

A folder with config.toml is a run's. While a run begins, its settings stand in a hidden file,
so that a process that is killed meanwhile leaves a folder that nothing opens, and in which
the next `--overwrite` knows what there is as a run's. A folder that a `Trainer` alone wrote has
no settings, and its checkpoints say whose it is.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from qlora_jax import digests
from qlora_jax.config.run import FILE, RunConfig, has_run, read_run
from qlora_jax.disk import PROBE, explained
from qlora_jax.errors import CheckpointError, ConfigError, OutputExistsError, gathered
from qlora_jax.exchange.metadata import ADAPTER, BASE, BASE_NF4, METADATA
from qlora_jax.exchange.ours import is_ours
from qlora_jax.exchange.steps import CHECKPOINTS, END, read_position, steps
from qlora_jax.files import check_output, sync
from qlora_jax.toml import write_toml

BEGUN = ".begun.toml"
"""The settings of a run that begins; they get the name config.toml when all else is there."""
METRICS, REPORTS = "metrics.jsonl", ("report.html", "loss.png", "figures.json")
_FOLDERS = (ADAPTER, BASE, BASE_NF4, CHECKPOINTS)
_CLEARED = ".checkpoints.cleared"
"""The checkpoints of a run that is being replaced, which nothing opens under this name."""
_OF_A_STEP = {"_CHECKPOINT_METADATA", "adapter", "optimizer", "position"}
_UNFINISHED = re.compile(r"\.(?:(?:old|damaged)\.)?partial|\.orbax-checkpoint-tmp.*")
"""What the names of checkpoints end in that a run had not finished, or was removing."""


def check_run_folder(out: Path, overwrite: bool) -> None:
    """Refuses a folder that a run cannot begin in; it changes nothing.

    Only what a run wrote is cleared away for a new one, so anything else where a run's own
    files go is refused. Other files are left alone.

    Raises:
      OutputExistsError: the folder is not empty and overwrite is false, or it has something
        in the place of a run's files that no run wrote; all of that is named.
    """
    check_output(out, overwrite)
    _check_foreign(out)


def _check_foreign(out: Path) -> None:
    """Refuses a folder that has something else in the place of a run's files."""
    if not out.is_dir():
        return
    there = [
        name for name in (FILE, METRICS, *REPORTS, *_FOLDERS) if (out / name).exists()
    ]
    problems = []
    if _of_a_trainer(out):
        others = [x for x in there if x not in (METRICS, ADAPTER, CHECKPOINTS)]
        problems = [f"{name} is no {_called(name)} of a Trainer" for name in others]
    elif not (out / BEGUN).is_file():
        try:
            if read_run(out).model is None:
                raise ConfigError("it names no model")
        except ConfigError as error:
            problems = [f"{name} is no {_called(name)} of a run" for name in there]
            if has_run(out):
                problems[there.index(FILE)] += f": {error}"
    problems = problems or [one for name in _FOLDERS for one in _foreign(out, name)]
    if problems:
        raise OutputExistsError(
            gathered(
                f"{out} has what a run did not write where a run's files go; move it away, or "
                "choose another --out",
                problems,
            )
        )


def _of_a_trainer(out: Path) -> bool:
    """Whether a Trainer without the command wrote this: it keeps checkpoints, no settings."""
    folder = out / CHECKPOINTS
    there = [] if folder.is_symlink() else steps(folder)
    if not there or any(os.path.lexists(out / name) for name in (FILE, BEGUN)):
        return False
    try:
        positions = [read_position(folder / str(step)) for step in there]
    except CheckpointError:
        return False
    return all({"seed", "rows", "lora", END} <= one.keys() for one in positions)


def _called(name: str) -> str:
    return {ADAPTER: "adapter", BASE: "base", CHECKPOINTS: "folder"}.get(name, "file")


def _foreign(out: Path, name: str) -> list[str]:
    """Returns what a run did not write in one of its folders, a sentence each."""
    folder = out / name
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return [f"{name} is no folder of a run"]
    if not folder.is_dir():
        return []
    if name == CHECKPOINTS:
        return [
            f"{name}/{entry.name} is no checkpoint"
            for entry in folder.iterdir()
            if not _is_checkpoint(entry)
        ]
    if name == ADAPTER:
        others = [x.name for x in folder.iterdir() if not is_ours(x.name)]
    else:
        listed = digests.listed(folder)
        others = [x for x in digests.files_in(folder) if x not in listed]
        if digests.NAME in others:
            others.remove(digests.NAME)
        elif _made_a_base(out, name):
            others = []  # of an older version, which wrote no list
    return [f"{name}/{other} is no file of a run" for other in others]


def _made_a_base(out: Path, name: str) -> bool:
    """Whether the run in a folder made its base in the folder of that name."""
    if (out / BEGUN).is_file():
        return True
    run = read_run(out)
    if name == BASE:
        return run.lora.init == "pissa"
    return run.model is not None and Path(run.model).name == name


def _is_checkpoint(entry: Path) -> bool:
    """Whether a run wrote this, and perhaps was killed as it did."""
    if entry.is_symlink() or not entry.is_dir():
        return False
    step, dot, rest = entry.name.partition(".")
    inside = {x.name.partition(".")[0] for x in entry.iterdir() if x.name != PROBE}
    return (
        step.isdigit()
        and (not dot or _UNFINISHED.fullmatch(f".{rest}") is not None)
        and (not inside or bool(inside & _OF_A_STEP))
    )


@contextlib.contextmanager
def beginning(out: Path, config: RunConfig) -> Iterator[None]:
    """Makes a folder that of a run; what else the run begins with is written in between.

    Args:
      out: The folder, which is `made` and `check_run_folder` allows; a run in it is replaced.
      config: The run's settings.

    Raises:
      OutputExistsError: something of others has come to be in the place of a run's files.
      OutputError: the folder cannot be written.
    """
    _check_foreign(out)
    with explained(out):
        write_toml(out / BEGUN, config)
        _clear(out)
    try:
        yield
        os.replace(out / BEGUN, out / FILE)
        sync(out)
    except BaseException:  # an interrupt, too
        _withdraw(out)
        raise


@contextlib.contextmanager
def made(out: Path) -> Iterator[None]:
    """Makes the folder of a run; after an error it goes again, if it is empty then.

    Raises:
      OutputError: it cannot be made.
    """
    missing = [one for one in (out, *out.parents) if not one.exists()]
    try:
        with explained(out):
            out.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:  # an interrupt, too
        for one in missing:
            with contextlib.suppress(OSError):  # which has something in it
                one.rmdir()
        raise


@contextlib.contextmanager
def withdrawn_unless_saved(out: Path) -> Iterator[None]:
    """Clears a new run away after an error that comes before its first checkpoint.

    There is nothing to go on from, and the same command can be given again.
    """
    try:
        yield
    except BaseException:  # an interrupt, too
        if not steps(out / CHECKPOINTS):
            _withdraw(out)
        raise


def _withdraw(out: Path) -> None:
    """Removes what a run has begun with; a kill meanwhile leaves what is known as a run's."""
    if any(_foreign(out, name) for name in _FOLDERS):
        return  # others have put something there meanwhile; --overwrite names it
    if (out / FILE).is_file():
        os.replace(out / FILE, out / BEGUN)
    _clear(out)
    (out / BEGUN).unlink(missing_ok=True)


def _clear(out: Path) -> None:
    """Removes what an older run left; what opens it goes first.

    Until its checkpoints are moved away, the old run can go on from them.
    """
    if (out / _CLEARED).is_dir():
        shutil.rmtree(out / _CLEARED)
    (out / ADAPTER / METADATA).unlink(missing_ok=True)
    if (out / CHECKPOINTS).is_dir():
        os.rename(out / CHECKPOINTS, out / _CLEARED)
        sync(out)
    (out / FILE).unlink(missing_ok=True)
    sync(out)
    for name in (METRICS, *REPORTS):
        (out / name).unlink(missing_ok=True)
    for name in (*_FOLDERS, _CLEARED):
        if (out / name).is_dir():
            shutil.rmtree(out / name)
    sync(out)
