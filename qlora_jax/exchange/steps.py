"""The checkpoints of a run as folders of files: which there are, and which are whole.

`checkpoints/N` is what a run was after step N:

- `adapter/` and `optimizer/`: arrays, as Orbax writes them;
- `position/metadata`: a JSON object of what a run that goes on has to have in common with
  this one, and the digest of every array;
- `adapter.json`, `config.toml`, `metrics.jsonl` (up to this step) and, where tokens were
  added, the tokenizer: the folder is an adapter too, and the run can be made whole from it;
- `SHA256SUMS`: the digest of every other file.

Older versions wrote the first two alone. Those open unchecked.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

from qlora_jax.errors import CheckpointError, gathered
from qlora_jax.exchange.digests import SUMS, damaged_files

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""The folder of a run that holds them."""
POSITION = Path("position") / "metadata"
DIGESTS = "digests"
"""The key of a position that has the digests of arrays; older ones have none."""


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
    if (folder / SUMS).exists():
        return damaged_files(folder)
    try:
        position = read_position(folder)
    except CheckpointError as error:
        return [str(error)]
    return [f"{SUMS} is missing"] if DIGESTS in position else []


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


def newest(folder: Path) -> Path | None:
    """Returns the newest checkpoint whose files are whole; None where there is none at all.

    Newer ones that are damaged are named, as a warning.

    Raises:
      CheckpointError: there are checkpoints, and all of them are damaged.
    """
    problems: list[str] = []
    for step in reversed(steps(folder)):
        found = damage(folder / str(step))
        if not found:
            say_damaged(folder / str(step), problems)
            return folder / str(step)
        problems += [f"{step}: {problem}" for problem in found]
    if problems:
        raise none_whole(folder, problems)
    return None


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
