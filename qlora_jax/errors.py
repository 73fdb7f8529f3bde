"""The exceptions of qlora_jax.

Each is also the builtin that fits, so that callers who catch ValueError keep working. A
message says what was wrong with its value, where, what was expected and what to do.
"""

from collections.abc import Sequence


class QLoRAError(Exception):
    """Base of every error that qlora_jax raises for a user's input."""


class ShapeError(QLoRAError, ValueError):
    """An array's shape or dtype does not fit."""


class ConfigError(QLoRAError, ValueError):
    """A configuration has wrong values or unknown keys."""


class CheckpointError(QLoRAError, ValueError):
    """A model folder or its tensors cannot be used."""


class DataError(QLoRAError, ValueError):
    """A dataset cannot be used."""


class AdapterMismatchError(QLoRAError, ValueError):
    """An adapter does not fit the model it was given to."""


class OutputExistsError(QLoRAError, FileExistsError):
    """An output path is taken and overwriting was not asked for."""


class OutputError(QLoRAError, OSError):
    """An output cannot be written: a full disk, a folder that is read-only, a limit."""


class LockedError(QLoRAError, BlockingIOError):
    """Another process works in the folder."""


class SaveError(QLoRAError, OSError):
    """A checkpoint could not be written; those before it are as they were."""


class OutOfMemoryError(QLoRAError, MemoryError):
    """The device has not the memory that a run needs."""


def first_line(error: Exception) -> str:
    """Returns the kind of another library's error, and the first line of what it says."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:200]}"


def gathered(summary: str, problems: Sequence[str], limit: int = 20) -> str:
    """Returns one message for all problems of one input, at most `limit` of them."""
    shown = [f"  {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        shown.append(f"  ... and {len(problems) - limit} more")
    count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
    return "\n".join([f"{summary} ({count}):", *shown])
