"""Finds the folders that a user's caches lie in."""

import os
from pathlib import Path


def cache_folder(variable: str, name: str) -> Path | None:
    """Returns the folder of one of this program's caches; None where the user wants none.

    Args:
      variable: The environment variable that names another folder, or says `off`.
      name: The folder's name below the one that this program has in the user's cache.

    Raises:
      RuntimeError: there is no home folder.
    """
    named = os.environ.get(variable, "")
    if named:
        return None if named == "off" else Path(named).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME", "")
    # As its specification has it, a relative path there counts as none.
    base = Path(home) if os.path.isabs(home) else Path.home() / ".cache"
    return base / "qlora_jax" / name
