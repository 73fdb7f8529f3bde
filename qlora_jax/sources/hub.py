"""Finds a model: in a folder, in a GGUF file, or by a download from the hub."""

import os
import re
from pathlib import Path

from qlora_jax.errors import CheckpointError

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PATTERNS = ["*.safetensors", "*.json", "*.model", "merges.txt", "*.jinja"]


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file."""
    return path.suffix == ".gguf" and path.is_file()


def find(path_or_repo: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Returns the local folder (or GGUF file) of a path or a hub id, fetching the latter.

    Raises:
      CheckpointError: it is neither.
    """
    path = Path(path_or_repo).expanduser()
    if path.is_dir() or is_gguf(path):
        return path
    text = os.fspath(path_or_repo)
    if path.exists() or not _REPO_ID.fullmatch(text):
        raise CheckpointError(
            f"{text} is no folder and no hub id (owner/name); expected a Hugging Face "
            "model folder with config.json and model.safetensors"
        )
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                text, revision=revision, allow_patterns=_PATTERNS
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{text} is no local folder, and the hub did not give it: {error}"
        ) from None
