"""The checkpoints of a run as folders of files: which there are, and which are whole.

`checkpoints/N` is what a run was after step N:

- `adapter/` and `optimizer/`: arrays, as Orbax writes them;
- `position/metadata`: a JSON object of what a run that goes on has to have in common with
  this one, and the digest of every array;
- `adapter.json`, `config.toml`, `metrics.jsonl` (up to this step) and, where tokens were
  added, the tokenizer: the folder is an adapter too, and the run can be made whole from it;
- `qlora_jax.sha256.json`: the digest of every other file.

Older versions wrote the first two alone. Those open unchecked.
"""

import functools
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from qlora_jax import digests
from qlora_jax.errors import CheckpointError, gathered
from qlora_jax.inputs import check_tree

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""The folder of a run that holds them."""
POSITION = Path("position") / "metadata"
DIGESTS, EVAL_LOSS, END, BEGUN = "digests", "eval_loss", "steps", "begun"
"""Keys of a position: the digests of arrays (older ones have none), the eval loss at its step
(None where there is none), the step that the run is to end at, and when it was begun."""


def steps(folder: Path) -> list[int]:
    """Returns the steps that a folder of checkpoints has, oldest first; [] without one."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir() if path.is_dir()]
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]*", name))


def damage(folder: Path) -> list[str]:
    """Returns what is wrong with the files of a checkpoint, a sentence for each.

    An older checkpoint, which has no digests, is only asked for its position.
    """
    if not any(folder.iterdir()):
        return ["the folder is empty"]
    try:
        check_tree(folder)
    except (CheckpointError, OSError) as error:
        return [str(error)]
    if (folder / digests.NAME).exists():
        return digests.damaged_files(folder)
    try:
        position = read_position(folder)
    except CheckpointError as error:
        return [str(error)]
    return [f"{digests.NAME} is missing"] if DIGESTS in position else []


def read_position(folder: Path) -> dict[str, Any]:
    """Reads the position of a checkpoint.

    Raises:
      CheckpointError: there is none, or it is no JSON object.
    """
    try:
        position = json.loads((folder / POSITION).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{POSITION} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{POSITION} cannot be read: {error}") from None
    if not isinstance(position, dict):
        raise CheckpointError(f"{POSITION} holds no JSON object")
    return position


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Returns the newest checkpoint whose files are whole, and what is wrong with newer ones.

    Returns:
      (None, []) where there is no checkpoint at all.

    Raises:
      CheckpointError: there are checkpoints, and all of them are damaged.
    """
    problems: list[str] = []
    for step in reversed(steps(folder)):
        found = damage(folder / str(step))
        if not found:
            return folder / str(step), problems
        problems += [f"{step}: {problem}" for problem in found]
    if problems:
        raise none_whole(folder, problems)
    return None, []


def say_damaged(used: Path, problems: list[str]) -> None:
    """Warns of damaged checkpoints, and says which older one is used in their place."""
    if problems:
        what = (
            f"{used.parent}: checkpoint {used.name} is used, as newer ones are damaged"
        )
        logger.warning("%s", gathered(what, problems))


def none_whole(folder: Path, problems: list[str]) -> CheckpointError:
    """Returns the error of a folder whose checkpoints are all damaged."""
    return CheckpointError(
        gathered(f"{folder} has no checkpoint that is whole; start anew", problems)
    )


def best(folder: Path, among: list[int]) -> tuple[int, float] | None:
    """Returns the step and the eval loss of the checkpoint with the least; None without any."""
    found = [(step, eval_loss_of(folder / str(step))) for step in among]
    losses = [(step, loss) for step, loss in found if loss is not None]
    return min(losses, key=lambda one: one[::-1], default=None)


def eval_loss_of(folder: Path) -> float | None:
    """Returns the eval loss at a checkpoint; None where none was measured, or it is damaged."""
    try:
        loss = read_position(folder).get(EVAL_LOSS)
    except CheckpointError:
        return None  # it is named when it is to be used
    return loss if isinstance(loss, float) else None


def place_of(path: str | os.PathLike[str]) -> Path:
    """Returns the folder that a path of a run, adapter or model means.

    RUN@12 is the checkpoint of a run after step 12, RUN@best the one with the least eval
    loss. Every other path is itself, and so is one with @ in it that exists.

    Raises:
      CheckpointError: the run has no such checkpoint, or it is damaged.
    """
    place = Path(path).expanduser()
    run, at, step = os.fspath(place).rpartition("@")
    if not at or place.exists() or not (Path(run) / CHECKPOINTS).is_dir():
        return place
    folder = Path(run) / CHECKPOINTS
    there = steps(folder)
    if step == "best":
        found = best(folder, there)
        step = "best" if found is None else str(found[0])
    if step not in map(str, there):
        names = ", ".join(map(str, there)) or "none"
        raise CheckpointError(
            f"{path}: {run} has no checkpoint {step}; it has {names}, and best where eval "
            "losses were measured"
        )
    if problems := damage(folder / step):
        raise CheckpointError(gathered(f"checkpoint {path} is damaged", problems))
    return folder / step


def unfinished(run: Path) -> Path | None:
    """Returns the newest whole checkpoint of a run that has not taken its last step.

    Returns:
      None where the run is finished, or has no checkpoint.

    Raises:
      CheckpointError: all checkpoints are damaged.
    """
    folder = run / CHECKPOINTS
    if not (there := steps(folder)):
        return None
    last = folder / str(there[-1])
    try:
        if read_position(last).get(END) == there[-1]:
            return None
    except CheckpointError:
        pass  # its damage is named below
    return _newest_as_of(folder, last.stat().st_mtime_ns)


@functools.lru_cache
def _newest_as_of(folder: Path, stamp: int) -> Path | None:
    """Returns `newest`; files are read, and damage said, once until there is another one."""
    found, problems = newest(folder)
    if found is not None:
        say_damaged(found, problems)
    return found


@functools.lru_cache
def say_unfinished(folder: Path) -> None:
    """Warns, once, that what is used of a run is a checkpoint of it."""
    end = read_position(folder).get(END)
    logger.warning(
        "%s is unfinished: its checkpoint %s of %s steps is used",
        folder.parents[1],
        folder.name,
        end,
    )
