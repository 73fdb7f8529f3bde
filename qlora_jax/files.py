"""Outputs that are whole or not there: files and folders written beside, and then swapped in.

`write_file` and `new_file` write a file, `new_folder` a folder. All of them write under a
hidden name beside the output, `.NAME.writing-` and a random number, flush it to the disk, and
then give it its own name. A process that is killed leaves the old output or the new one, and
perhaps such a hidden entry, which the next writer of the same output removes.

What becomes of an old folder follows one rule. Files that its list of digests names (see
`qlora_jax.digests`) or that the writer knows as its own, and files that have the name of a new
one, are replaced. Every other file, folder and link in it is kept, and nothing behind a link
is ever written or removed.
"""

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qlora_jax import digests
from qlora_jax.disk import explained
from qlora_jax.errors import OutputError, OutputExistsError

logger = logging.getLogger(__name__)

_WRITING, _BEFORE = ".writing-", ".before-"
_NO_SWAP = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EBUSY, errno.EMLINK)
_NO_SWAP += (errno.ENOTSUP, errno.EINVAL, errno.ENOSYS, errno.EROFS)
"""Errors that say that a folder cannot be exchanged, or a file not be linked, where it is."""


def check_output(out: Path, overwrite: bool) -> None:
    """Refuses an output folder that has something in it.

    Raises:
      OutputExistsError: `out` is taken and `overwrite` is false, or is no folder.
    """
    if out.exists() and not out.is_dir():
        kind = "a file" if out.is_file() else "no folder"
        raise OutputExistsError(
            f"{out} is {kind}; give a folder that does not exist yet"
        )
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise OutputExistsError(
            f"{out} exists and is not empty; choose another --out, or pass --overwrite to "
            "write into it (a model there is replaced, and files of the same names; others "
            "are kept)"
        )


def write_file(path: Path, data: str | bytes) -> None:
    """Writes a whole file; a link of that name is replaced, not followed.

    Args:
      path: The file, whose folder exists.
      data: The file's content; text is written as UTF-8.

    Raises:
      OutputError: it cannot be written; a file that was there is as it was.
    """
    with new_file(path, overwrite=True) as beside:
        beside.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


@contextlib.contextmanager
def new_file(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Gives the hidden path to write a file at, which gets its own name at the end.

    Args:
      path: The file, whose folder exists.
      overwrite: Replace a file that is there by then.

    Raises:
      OutputExistsError: a file is there, and overwrite is false.
      OutputError: it cannot be written; a file that was there is as it was.
    """
    sweep(path)
    beside = _hidden(path, _WRITING)
    with explained(path):
        handle = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _lock(handle)
            with explained(path):  # while what there is of it takes its room
                yield beside
                if not overwrite and os.path.lexists(path):
                    raise OutputExistsError(f"{path} exists; give another file")
                sync(beside)
                os.replace(beside, path)
                sync(path.parent)
        finally:
            os.close(handle)
            beside.unlink(missing_ok=True)


class NewFolder:
    """A folder that is being written.

    Attributes:
      path: The hidden folder to write into.
      out: The folder that it becomes.
      digests: Entries of its list of digests that the writer knows already, by name; the
        other files are read for theirs.
    """

    def __init__(self, path: Path, out: Path, replaces: Callable[[str], bool]):
        self.path, self.out, self._replaces = path, out, replaces
        self.digests: dict[str, dict[str, Any]] = {}

    def kept(self) -> list[str]:
        """Returns the paths in the old folder that stay in it, as far as is written now.

        They are relative and in order; a folder is named before what is in it.
        """
        if not self.out.is_dir():
            return []
        ours = {digests.NAME, *digests.listed(self.out)}
        found = []
        for name in _walk(self.out):
            old = self.out / name
            folder = old.is_dir() and not old.is_symlink()
            if folder and any(_walk(old)):
                continue  # it comes with what is in it
            new = os.path.lexists(self.path / name)
            top = name.partition("/")[0]
            hidden = top.startswith(".") and (_WRITING in top or _BEFORE in top)
            if not (name in ours or new or hidden or self._replaces(name)):
                found.append(name)
        return found


@contextlib.contextmanager
def new_folder(
    out: Path,
    *,
    opened_by: str,
    replaces: Callable[[str], bool] = lambda name: False,
) -> Iterator[NewFolder]:
    """Gives a hidden folder to write into, which takes the place of `out` at the end.

    A list of digests is written into it. It is exchanged with an old folder in one step.
    Where that cannot be (the old folder is a mount point, is another user's or has the
    working directory in it, the folder above cannot be written to, or the file system has no
    hard links to keep other files by), the old folder is made unusable first, by removing
    `opened_by`, then files are moved in one by one, and that one last.

    Args:
      out: The folder; a link to a folder stays a link.
      opened_by: Name of the file without which nothing opens such a folder.
      replaces: Says of a file in the old folder, by its relative path, whether it is one of
        this kind of output, where no list of digests says so.

    Raises:
      OutputExistsError: something of another kind is in the way of a new file.
      OutputError: it cannot be written; what was there is as it was.
    """
    out = Path(os.path.realpath(out))
    check_output(out, overwrite=True)
    with explained(out), _parents(out):
        sweep(out)
        folder = _hidden_folder(out)
        handle = os.open(folder, os.O_RDONLY)
        new = NewFolder(folder, out, replaces)
        try:
            _lock(handle)
            with explained(out):
                yield new
                digests.write(folder, new.digests)
                sync_tree(folder)
                _put_in_place(new, out, opened_by)
        finally:
            os.close(handle)
            _remove(folder)


def sweep(path: Path) -> None:
    """Removes what killed writers of an output left beside it or in it, and says so.

    A folder that such a writer had moved away, and put no other in place of, is moved back.
    """
    for parent in (path.parent, path):
        if not parent.is_dir():
            continue
        for kind in (_BEFORE, _WRITING):
            for entry in sorted(parent.glob(f".{_escaped(path.name)}{kind}*")):
                if not _abandoned(entry):
                    continue
                if kind == _BEFORE and not os.path.lexists(path):
                    os.rename(entry, path)
                    logger.warning("%s was moved back, as it was before", path)
                else:
                    _remove(entry)
                    logger.warning("removed %s, which a killed process left", entry)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}{kind}{secrets.token_hex(4)}")


def _hidden_folder(out: Path) -> Path:
    """Makes the folder to write into: beside `out`, or in it where that cannot be."""
    beside = _hidden(out, _WRITING)
    try:
        if out.is_dir() and out.stat().st_dev != out.parent.stat().st_dev:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        beside.mkdir()
    except OSError as error:
        if error.errno not in _NO_SWAP or not out.is_dir():
            raise
        beside = out / beside.name
        beside.mkdir()
    return beside


@contextlib.contextmanager
def _parents(out: Path) -> Iterator[None]:
    """Makes the folders above an output, and removes them again after an error."""
    missing = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:  # an interrupt leaves no empty folders either
        for parent in missing:
            with contextlib.suppress(OSError):  # which has something in it by now
                parent.rmdir()
        raise


def _put_in_place(new: NewFolder, out: Path, opened_by: str) -> None:
    """Makes a folder that was written the output."""
    if not out.exists():
        os.rename(new.path, out)
        sync(out.parent)
        return
    kept = new.kept()
    _check_way(new.path, out)
    if not (_may_swap(new.path, out) and _swapped(new.path, out, kept)):
        logger.info("%s cannot be exchanged as a whole; its files are replaced", out)
        try:
            _move_in(new.path, out, opened_by, set(kept))
        except OSError as error:
            raise OutputError(
                f"{out} could not be replaced whole ({error}); nothing opens it until the "
                "command has been run again"
            ) from error


def _check_way(folder: Path, out: Path) -> None:
    """Refuses an old folder that has a folder where a new file goes, or the reverse."""
    for name in _walk(folder):
        old, new = out / name, folder / name
        if not os.path.lexists(old):
            continue
        a_folder = old.is_dir() and not old.is_symlink()
        if a_folder != new.is_dir():
            kind = "a folder" if a_folder else "no folder"
            raise OutputExistsError(
                f"{old} is {kind}, and is in the way of the new one; move it away"
            )


def _may_swap(folder: Path, out: Path) -> bool:
    """Whether an exchange of two folders would change nothing but what is in them."""
    new, old = folder.stat(), out.stat()
    with contextlib.suppress(FileNotFoundError):  # a working directory that is gone
        if Path.cwd().is_relative_to(out):
            return False
    same_owner = (new.st_uid, new.st_gid) == (old.st_uid, old.st_gid)
    return same_owner and folder.parent == out.parent and not os.path.ismount(out)


def _swapped(folder: Path, out: Path, kept: list[str]) -> bool:
    """Exchanges a folder with the output; False where the file system cannot."""
    try:
        for name in kept:
            _link(out, folder, name)
        if kept:
            sync_tree(folder)
        folder.chmod(stat.S_IMODE(out.stat().st_mode))
        if not _exchange(folder, out):
            before = _hidden(out, _BEFORE)
            os.rename(out, before)
            try:
                os.rename(folder, out)
            except OSError:
                os.rename(before, out)
                raise
            sync(out.parent)
            _remove(before)
    except OSError as error:
        if error.errno not in _NO_SWAP:
            raise
        return False
    sync(out.parent)
    return True


def _link(out: Path, folder: Path, name: str) -> None:
    """Puts a kept entry into a new folder under a second name; a folder is made anew."""
    old, new = out / name, folder / name
    for parent in reversed([p for p in Path(name).parents if p.name]):
        if not (folder / parent).is_dir():
            (folder / parent).mkdir()
            shutil.copystat(out / parent, folder / parent)
    if old.is_dir() and not old.is_symlink():
        new.mkdir()
        shutil.copystat(old, new)
    else:
        os.link(old, new, follow_symlinks=False)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges the names of two folders in one step; False where the system has no such."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _move_in(folder: Path, out: Path, opened_by: str, kept: set[str]) -> None:
    """Replaces an old folder's files by new ones; nothing opens it in between."""
    (out / opened_by).unlink(missing_ok=True)
    sync(out)
    files = [name for name in _walk(folder) if not (folder / name).is_dir()]
    inside = f"{folder.relative_to(out)}/" if folder.is_relative_to(out) else None
    for name in reversed(list(_walk(out))):
        if name in kept or name in files or (inside and f"{name}/".startswith(inside)):
            continue
        if (out / name).is_dir() and not (out / name).is_symlink():
            with contextlib.suppress(OSError):  # which has something in it
                (out / name).rmdir()
        else:
            (out / name).unlink()
    # The list goes first: what is moved in after it is known as ours, whatever happens.
    rest = [name for name in files if name not in (digests.NAME, opened_by)]
    for name in (digests.NAME, *rest, opened_by):
        if name == opened_by:
            sync_tree(out)
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / name, out / name)
    sync(out)


def _walk(folder: Path) -> Iterator[str]:
    """Yields the relative path of everything in a folder, a folder before what is in it."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        yield entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from (f"{entry.name}/{name}" for name in _walk(Path(entry.path)))


def _remove(path: Path) -> None:
    """Removes a file or a folder of ours; what cannot be removed is named."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s is left over and cannot be removed: %s", path, error)


def _lock(handle: int) -> None:
    """Marks what is being written as that of a living process."""
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _abandoned(path: Path) -> bool:
    """Whether no living process writes this; False too where that cannot be known."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """Waits until the disk has a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # no such for folders
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Waits until the disk has all that is in a folder, and then the names of it."""
    for name in _walk(folder):
        mode = (folder / name).lstat().st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            sync(folder / name)
    sync(folder)
