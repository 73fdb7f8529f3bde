"""Checks a folder that qlora_jax wrote against the digests in it: `qlora inspect --verify`."""

from pathlib import Path
from typing import Any, NamedTuple

from qlora_jax import digests
from qlora_jax.config.run import has_run
from qlora_jax.errors import CheckpointError, gathered
from qlora_jax.exchange.metadata import ADAPTER, BASE, BASE_NF4, METADATA
from qlora_jax.exchange.peft.names import CONFIG
from qlora_jax.exchange.steps import CHECKPOINTS, damage, steps
from qlora_jax.text.folder import FILES, TEMPLATES

_PARTS = (ADAPTER, BASE, BASE_NF4)
"""Folders in a run's folder that have digests of their own."""
_READ = (*FILES, CONFIG, METADATA, "config.json", "model.safetensors.index.json")


class Verified(NamedTuple):
    """What was compared.

    Attributes:
      files: The number of files that are as they were written.
      problems: A sentence for each file or tensor that is damaged or missing, and for each
        file that was added where it would be read.
      others: Files that were added and that nothing reads, such as a README.md.
    """

    files: int
    problems: list[str]
    others: list[str]


def verify(path: Path) -> dict[str, Any]:
    """Compares all that a folder holds with what was written into it.

    Args:
      path: A model's folder, an adapter's, a PEFT folder or a run's folder.

    Returns:
      {"verified": path, "files": so many files that are whole, "others": files that were
      added, and that nothing reads}.

    Raises:
      CheckpointError: something is damaged, missing or added; all of it is named. Or there
        is nothing to compare with.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder")
    if (path / digests.NAME).exists():
        found = _folder(path)
    elif has_run(path):
        found = _run(path)
    else:
        raise CheckpointError(
            f"{path} has no {digests.NAME} to compare with; an older version or another "
            "program wrote it"
        )
    if found.problems:
        raise CheckpointError(
            gathered(f"{path} is not as it was written", found.problems)
        )
    return {"verified": str(path), "files": found.files, "others": found.others}


def _run(out: Path) -> Verified:
    """Checks the parts of a run's folder, and its checkpoints."""
    files, problems, others = 0, [], []
    for name in _PARTS:
        if not (out / name).is_dir():
            continue
        if not (out / name / digests.NAME).exists():
            problems.append(
                f"{name}/{digests.NAME} is missing, so {name} cannot be checked"
            )
            continue
        found = _folder(out / name)
        files += found.files
        problems += [f"{name}/{problem}" for problem in found.problems]
        others += [f"{name}/{other}" for other in found.others]
    for step in steps(out / CHECKPOINTS):
        folder = out / CHECKPOINTS / str(step)
        wrong = damage(folder)
        files += 0 if wrong else len(digests.files_in(folder))
        problems += [f"{CHECKPOINTS}/{step}: {problem}" for problem in wrong]
    return Verified(files, problems, others)


def _folder(folder: Path) -> Verified:
    """Checks a folder that has a list of digests."""
    listed = digests.read(folder)
    problems, whole = [], 0
    for name, entry in listed.items():
        found = digests.damage(folder, name, entry)
        problems += found
        whole += not found
    inside = {name.partition("/")[0] for name in listed if "/" in name}
    added = [
        name
        for name in digests.files_in(folder)
        if name not in listed and name != digests.NAME
    ]
    read = [name for name in added if _is_read(name, inside)]
    problems += [f"{name} was added, and would be read with the rest" for name in read]
    return Verified(whole, problems, [name for name in added if name not in read])


def _is_read(name: str, inside: set[str]) -> bool:
    """Whether a file that was added to a folder may change what is read from it."""
    top = name.partition("/")[0]
    return name in _READ or top in {TEMPLATES, *inside} or name.endswith(".safetensors")
