"""Finds a model: in a folder, in a GGUF file, or by a download from the hub.

The hub is asked only where nothing on this disk can be meant: not for a/b where there is a
folder a, whose b is a slip of the pen. `hf://a/b` and `hub:a/b` mean the hub in any case; with
`--offline`, or HF_HUB_OFFLINE=1, only what was downloaded before is taken.
"""

import os
import re
from pathlib import Path

from qlora_jax.errors import CheckpointError

OFFLINE = "HF_HUB_OFFLINE"
"""The variable of huggingface_hub that keeps it from the network."""

PREFIXES = ("hf://", "hub:")
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PATTERNS = ["*.safetensors", "*.json", "*.model", "merges.txt", "*.jinja"]


def offline() -> bool:
    """Whether the network must not be asked."""
    return os.environ.get(OFFLINE, "").upper() in ("1", "ON", "YES", "TRUE")


def split_prefix(text: str) -> tuple[str, str]:
    """Returns the prefix that names the hub, or "", and what follows it."""
    prefix = next((one for one in PREFIXES if text.startswith(one)), "")
    return prefix, text.removeprefix(prefix)


def local_owner(name: str) -> str | None:
    """Says why a/b is not asked of the hub: there is an `a` here. None where there is none."""
    owner = Path(name).parts[:1]
    if not owner or not os.path.lexists(owner[0]):
        return None
    return (
        f"{name} is not here, and {owner[0]} is, so a path seems to be meant; the hub's "
        f"repository of this name is {PREFIXES[0]}{name}"
    )


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file."""
    return path.suffix == ".gguf" and path.is_file()


def find(path_or_repo: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Returns the local folder (or GGUF file) of a path or a hub id, fetching the latter.

    Raises:
      CheckpointError: it is neither.
    """
    prefix, text = split_prefix(os.fspath(path_or_repo))
    path = Path(text).expanduser()
    if not prefix and (path.is_dir() or is_gguf(path)):
        return path
    if (not prefix and path.exists()) or not _REPO_ID.fullmatch(text):
        raise CheckpointError(
            f"{text} is no folder and no hub id (owner/name); expected a Hugging Face "
            "model folder with config.json and model.safetensors"
        )
    if not prefix and (problem := local_owner(text)):
        raise CheckpointError(problem)
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                text,
                revision=revision,
                allow_patterns=_PATTERNS,
                local_files_only=offline(),
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        asked = "was not downloaded before, and the network is not asked (--offline)"
        raise CheckpointError(
            f"{text} is no local folder, and "
            + (asked if offline() else f"the hub did not give it: {error}")
        ) from None
