"""Compiled programs kept on disk, so that the second run of a command starts at once.

jax's persistent cache does the work; this chooses the folder, its bounds, and what is said
when it cannot be used. It is the command's alone: importing the library sets nothing.

jax writes an entry in place, not atomically. Because the cache is bounded, jax holds a file
lock while it reads or writes, so two commands never see each other's unfinished entries; and
it writes an entry's access time after the entry, so one without was cut short by a kill or
a full disk. Those are removed at the start. Entries are compressed with a checksum: a
damaged one is noticed as it is read, removed, and compiled again.
"""

import hashlib
import logging
import os
import platform
import warnings
from pathlib import Path

import filelock
import jax
from jax.experimental.compilation_cache import compilation_cache

from qlora_jax.user_folder import cache_folder

VARIABLE = "QLORA_JAX_COMPILE_CACHE"
FLAG = "--no-compile-cache"

MAX_BYTES = 256 << 20
"""A folder of compiled programs is kept to this size; the entries used longest ago go first. A
fine-tune and what follows it take 1 to 5 MB. jax looks at every entry as it adds one, which
forbids far larger folders."""

MIN_COMPILE_SECONDS = 0.1
"""Programs that compile faster are not kept (scripts/results/README.md)."""

MOST_DAMAGED = 3
"""Entries that cannot be read, after which this run uses the cache no longer."""

_LOCK_SECONDS = 10.0

logger = logging.getLogger(__name__)


def use_cache(*, off: bool = False) -> Path | None:
    """Keeps compiled programs in the user's cache folder, from here on in this process.

    A cache that jax has been given already (JAX_COMPILATION_CACHE_DIR, or by code) is left
    as it is. A folder that cannot be used is named in a warning, and nothing fails.

    Args:
      off: Keep none, as QLORA_JAX_COMPILE_CACHE=off does.

    Returns:
      The folder; None where programs are not kept by us.
    """
    if off or jax.config.jax_compilation_cache_dir:  # pyright: ignore
        return None
    try:
        root = cache_folder(VARIABLE, "compiled")
        if root is None:
            return None
        folder = root / machine_digest()
        new = not folder.exists()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_unfinished(folder)
    except (OSError, RuntimeError) as error:
        logger.warning(
            "compiled programs are not kept, so the next run compiles again: %s. Name "
            "another folder in %s, or pass %s",
            error,
            VARIABLE,
            FLAG,
        )
        return None
    if new:
        logger.info(
            "compiled programs are kept in %s, at most %d MB, so that later runs start at "
            "once (%s names another folder; %s keeps none)",
            folder,
            MAX_BYTES >> 20,
            VARIABLE,
            FLAG,
        )
    _configure(folder)
    return folder


def machine_digest(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Returns a folder name for this kind of CPU, whose programs run on no lesser one.

    jax 0.12's key of an entry covers the CPU's features; for older ones nothing promises it,
    and a home folder may be shared by many kinds of machine.

    Args:
      cpuinfo: Where Linux describes the CPU.
    """
    parts = [platform.system(), platform.machine(), platform.processor()]
    names = ("flags", "features", "model name", "cpu implementer", "cpu part")
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    found: dict[str, str] = {}
    for line in lines:  # of the first core that has each
        name, _, value = line.partition(":")
        if name.strip().lower() in names:
            found.setdefault(name.strip().lower(), " ".join(sorted(value.split())))
    parts += [found.get(name, "") for name in names]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _remove_unfinished(folder: Path) -> None:
    """Removes entries that were cut short; raises OSError where it cannot be written to."""
    lock = filelock.FileLock(folder / ".lockfile")
    try:
        lock.acquire(timeout=_LOCK_SECONDS)
    except filelock.Timeout:
        raise OSError(f"another process holds {folder / '.lockfile'}") from None
    except NotImplementedError as error:
        raise OSError(f"{folder} is on a file system without locks") from error
    try:
        for entry in folder.glob("*-cache"):
            if not _access_time(entry).exists():
                entry.unlink(missing_ok=True)
    finally:
        lock.release()


def _access_time(entry: Path) -> Path:
    return entry.with_name(entry.name.removesuffix("-cache") + "-atime")


def _configure(folder: Path) -> None:
    """Points jax to the folder; bounds that the user gave jax stay."""
    values = {
        "jax_compilation_cache_max_size": MAX_BYTES,
        "jax_persistent_cache_min_compile_time_secs": MIN_COMPILE_SECONDS,
    }
    for name, value in values.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    damaged, shown = [], warnings.showwarning

    def show(message, category, filename, lineno, file=None, line=None):
        text = str(message)
        if text.startswith("Error writing persistent compilation cache"):
            logger.warning("a compiled program was not kept: %s", text)
        elif text.startswith("Error reading persistent compilation cache"):
            damaged.append(text)
            _remove_last_read(folder)
            logger.warning("a kept program is damaged and compiled again: %s", text)
            if len(damaged) == MOST_DAMAGED:
                logger.warning("kept programs are not used any more in this run")
                jax.config.update("jax_compilation_cache_dir", None)
                compilation_cache.reset_cache()
        else:
            shown(message, category, filename, lineno, file, line)

    warnings.showwarning = show


def _remove_last_read(folder: Path) -> None:
    """Removes the entry that jax has just read.

    jax names the program but not the entry. If another process read one since, that one is
    removed, and compiled again.
    """
    try:
        with filelock.FileLock(folder / ".lockfile", timeout=_LOCK_SECONDS):
            times = {
                path: int.from_bytes(path.read_bytes(), "little")
                for path in folder.glob("*-atime")
            }
            if times:
                last = max(times, key=lambda path: times[path])
                name = last.name.removesuffix("-atime") + "-cache"
                last.with_name(name).unlink(missing_ok=True)
                last.unlink(missing_ok=True)
    except (OSError, filelock.Timeout) as error:
        logger.warning("the damaged program stays in %s: %s", folder, error)
