"""Files that are either the old or the new one, never half of one."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from .errors import ConfigurationError

__all__ = ["atomic_write", "remove_leftovers", "user_cache"]

_PREFIX = ".oneshot-tmp-"
_TEMPORARY_NAME = re.compile(re.escape(_PREFIX) + r"[0-9a-f]{16}")
_NO_FOLDER_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM}


def atomic_write(
    path: str | os.PathLike[str],
    write: Callable[[BinaryIO], object],
    keep_previous: str | os.PathLike[str] | None = None,
) -> None:
    """Write a file so that at every instant the old or the new one stands at ``path``, complete.

    The bytes go to a temporary file in the same folder, are flushed to the disk (fsync), and the file is then
    renamed onto ``path``. When anything raises before that rename, the temporary file is removed and ``path``
    is untouched. A process killed in between leaves a temporary file behind: see ``remove_leftovers``.

    Args:
        path: the file to write; its folder must exist. A symbolic link here is replaced, not followed.
        write: called once with a binary file object, opened for writing. It must not close it.
        keep_previous: where the file that stood at ``path`` until now is kept, in place of whatever stood
            there. It is a hard link, or a copy where the file system has no links, and is made before the
            rename, so ``path`` is never missing. Nothing happens when ``path`` does not exist yet.

    Raises:
        ConfigurationError: a folder does not exist, or ``keep_previous`` is ``path``.
        OSError: the disk is full, or the like. Whatever ``write`` raises comes out unchanged.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path, previous = Path(folder, "arch.json"), Path(folder, "arch.previous.json")
    ...     for text in (b"1", b"2", b"3"):
    ...         atomic_write(path, lambda file, text=text: file.write(text), keep_previous=previous)
    ...     path.read_bytes(), previous.read_bytes(), len(os.listdir(folder))
    (b'3', b'2', 2)
    """
    path = Path(path)
    previous = None if keep_previous is None else Path(keep_previous)
    _check_folder(path)
    if previous is not None:
        _check_folder(previous)
        if previous.resolve() == path.resolve():
            raise ConfigurationError(
                f"atomic_write: keep_previous {str(previous)!r} and path {str(path)!r} are one file; "
                "give the previous file a name of its own."
            )
    temporary = _temporary_in(path.parent)
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            _keep(path, previous)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _fsync_folder(path.parent)


def remove_leftovers(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove the temporary files that a killed ``atomic_write`` left in a folder; returns their paths, sorted.

    Only call it while nobody else writes into the folder: a temporary file in use looks the same. Sub-folders
    are not searched. A folder that does not exist has no leftovers.
    """
    folder = Path(folder)
    if not folder.exists():
        return []
    leftovers = sorted(
        entry
        for entry in folder.iterdir()
        if _TEMPORARY_NAME.fullmatch(entry.name) and entry.is_file() and not entry.is_symlink()
    )
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    return leftovers


def _check_folder(path: Path) -> None:
    if not path.parent.is_dir():
        raise ConfigurationError(
            f"atomic_write: cannot write {str(path)!r}, there is no folder {str(path.parent)!r}. Make it first."
        )


def _temporary_in(folder: Path) -> Path:
    # Not tempfile: it makes files that only their owner can read, and the mode would stay after the rename.
    return folder / f"{_PREFIX}{secrets.token_hex(8)}"


def _keep(path: Path, previous: Path) -> None:
    """Make ``previous`` a second name (or a copy) of ``path`` in one step."""
    temporary = _temporary_in(previous.parent)
    try:
        try:
            os.link(path, temporary)
        except OSError:
            _copy(path, temporary)
        os.replace(temporary, previous)
    finally:
        # Also after success: POSIX rename does nothing, and keeps both names, when they are already one file,
        # which is so when an earlier call failed after this step.
        temporary.unlink(missing_ok=True)
    _fsync_folder(previous.parent)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as old, target.open("xb") as new:
        shutil.copyfileobj(old, new)
        new.flush()
        os.fsync(new.fileno())


def _fsync_folder(folder: Path) -> None:
    """Put a rename on the disk, so that it survives a power cut, where the platform can."""
    if os.name == "nt":  # a folder cannot be opened there
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # The file itself is in place; some file systems and folder modes merely do not offer this.
        if error.errno not in _NO_FOLDER_FSYNC:
            raise


def user_cache() -> Path:
    """The folder of what was measured or read before.

    $ONESHOT_CACHE, else $XDG_CACHE_HOME/oneshot, else ~/.cache/oneshot.
    """
    own, shared = os.environ.get("ONESHOT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(shared or os.path.expanduser("~/.cache"), "oneshot")
