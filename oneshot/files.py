"""Files that are either the old or the new one, never half of one."""

from __future__ import annotations

import errno
import io
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast, final

from .errors import ConfigurationError

if sys.platform != "win32":
    import fcntl

__all__ = ["atomic_write", "errors_about", "remove_leftovers", "user_cache"]

_PREFIX = ".oneshot-tmp-"
_TEMPORARY_NAME = re.compile(re.escape(_PREFIX) + r"[0-9a-f]{16}")
_NO_FOLDER_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM}
_OLD = 86_400.0  # seconds without a write, after which a file that cannot be locked has no writer any more


def atomic_write(
    path: str | os.PathLike[str],
    write: Callable[[BinaryIO], object],
    keep_previous: str | os.PathLike[str] | None = None,
) -> None:
    """Write a file so that at every instant the old or the new one stands at ``path``, complete.

    The bytes go to a temporary file in the same folder, are flushed to the disk (fsync), and the file is then
    renamed onto ``path``. When anything raises before that rename, the temporary file is removed and ``path``
    is untouched. A process killed in between leaves a temporary file behind; the next ``atomic_write`` into the
    folder, by whatever process, removes it (``remove_leftovers``).

    Args:
        path: the file to write; its folder must exist. A symbolic link here is replaced, not followed.
        write: called once with a binary file object, opened for writing. It must not close it.
        keep_previous: where the file that stood at ``path`` until now is kept, in place of whatever stood
            there. It is a hard link, or a copy where the file system has no links, and is made before the
            rename, so ``path`` is never missing. Nothing happens when ``path`` does not exist yet.

    Raises:
        ConfigurationError: a folder does not exist, or ``keep_previous`` is ``path``.
        OSError: the disk is full, or the like; ``filename`` says which file. It comes out also where ``write``
            hides it behind an error of its own; all else that ``write`` raises comes out unchanged.

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
    with errors_about(path):
        with _temporary_in(path.parent) as (temporary, file):
            _write(file, write)
            if previous is not None and path.exists():
                _keep(path, previous)
            _rename(temporary, file, path)
        _fsync_folder(path.parent)
    for folder in {path.parent} if previous is None else {path.parent, previous.parent}:
        remove_leftovers(folder)


@contextmanager
def errors_about(path: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError inside is about ``path``, unless it names a file itself: those of writing (the disk is full) do not.

    >>> with errors_about("run/log.jsonl"):
    ...     raise OSError(28, "No space left on device")
    Traceback (most recent call last):
    OSError: [Errno 28] No space left on device: 'run/log.jsonl'
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise


def remove_leftovers(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove the temporary files that killed processes left in a folder; returns their paths, sorted.

    Other processes may be writing there: ``atomic_write`` holds a shared lock (flock) on its temporary file from its
    making to its rename, which ends with the process, and only files that can be locked exclusively are removed. Where
    there are no such locks, only files are removed into which nothing was written for a day. Sub-folders are not
    searched. A folder that does not exist, or that cannot be listed, has no leftovers.
    """
    try:
        entries = list(Path(folder).iterdir())
    except OSError:
        return []
    named = sorted(entry for entry in entries if _TEMPORARY_NAME.fullmatch(entry.name))
    return [entry for entry in named if entry.is_file() and not entry.is_symlink() and _remove_abandoned(entry)]


def _check_folder(path: Path) -> None:
    if not path.parent.is_dir():
        raise ConfigurationError(
            f"atomic_write: cannot write {str(path)!r}, there is no folder {str(path.parent)!r}. Make it first."
        )


@final
class _File(io.BufferedRandom):
    """A binary file that remembers what the system has refused: some writers hide it behind errors of their own."""

    refused: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.refused = error
            raise


def _write(file: _File, write: Callable[[BinaryIO], object]) -> None:
    """All of the content, on the disk."""
    try:
        write(cast("BinaryIO", file))
    except Exception:
        if file.refused is not None:
            raise file.refused from None
        raise
    file.flush()
    os.fsync(file.fileno())


def _new_name(folder: Path) -> Path:
    # Not tempfile: it makes files that only their owner can read, and the mode would stay after the rename.
    return folder / f"{_PREFIX}{secrets.token_hex(8)}"


@contextmanager
def _temporary_in(folder: Path) -> Iterator[tuple[Path, _File]]:
    """A new file with a lock that says it is in use, and that is gone afterwards if it still has this name."""
    while True:
        temporary = _new_name(folder)
        file = _File(io.FileIO(temporary, "x+"))
        try:
            _lock(file.fileno(), wait=True)
            # Before it had its lock, another process may have taken the file for one that was left over.
            if temporary.exists():
                yield temporary, file
                return
        finally:
            with suppress(OSError):  # of bytes that could not be written before either
                file.close()
            temporary.unlink(missing_ok=True)


def _rename(temporary: Path, file: _File, path: Path) -> None:
    if sys.platform == "win32":  # an open file cannot be renamed there
        file.close()
    os.replace(temporary, path)


def _keep(path: Path, previous: Path) -> None:
    """Make ``previous`` a second name (or a copy) of ``path`` in one step."""
    if not _keep_by_link(path, previous):
        _copy(path, previous)
    _fsync_folder(previous.parent)


def _keep_by_link(path: Path, previous: Path) -> bool:
    """Whether that could be done: some file systems have no links."""
    temporary = _new_name(previous.parent)
    with path.open("rb") as file:
        _lock(file.fileno(), wait=False)
        try:
            try:
                os.link(path, temporary)
            except OSError:
                return False
            os.replace(temporary, previous)
        finally:
            # Also after success: POSIX rename does nothing, and keeps both names, when they are already one file,
            # which is so when an earlier call failed after this step.
            temporary.unlink(missing_ok=True)
    return True


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as old, _temporary_in(target.parent) as (temporary, new):
        _write(new, lambda file: shutil.copyfileobj(old, file))
        _rename(temporary, new, target)


def _lock(descriptor: int, *, wait: bool) -> None:
    """Say that a file is in use, where the system has such locks."""
    if sys.platform != "win32":
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH if wait else fcntl.LOCK_SH | fcntl.LOCK_NB)


def _remove_abandoned(temporary: Path) -> bool:
    """Remove a temporary file that nobody uses; whether it was one."""
    try:
        if sys.platform == "win32":
            abandoned = _is_old(temporary)
        else:
            with temporary.open("r+b") as file:
                abandoned = _can_be_locked(file.fileno(), temporary)
                if abandoned:
                    temporary.unlink()  # as long as it is locked: its writer may be waiting for that
        if abandoned:
            temporary.unlink(missing_ok=True)
    except OSError:  # it has gone meanwhile, or is another user's
        return False
    return abandoned


def _can_be_locked(descriptor: int, temporary: Path) -> bool:
    if sys.platform != "win32":
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # no such locks on this file system
            return _is_old(temporary)
    return True


def _is_old(temporary: Path) -> bool:
    return time.time() - temporary.stat().st_mtime > _OLD


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
