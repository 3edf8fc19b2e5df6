"""atomic_write under injected failures: what stands at the path is always the old or the new file."""

from __future__ import annotations

import errno
import io
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oneshot.files
from oneshot.errors import ConfigurationError
from oneshot.files import atomic_write, remove_leftovers


class Injected(Exception):
    """Raised by a test in the middle of a write."""


def writing(content: bytes) -> Callable[[BinaryIO], object]:
    return lambda file: file.write(content)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def raising(error: BaseException) -> Callable[..., None]:
    def call(*args: object, **kwargs: object) -> None:
        raise error

    return call


def test_writes_a_new_and_replaces_an_old_file(tmp_path: Path) -> None:
    path = tmp_path / "arch.json"
    atomic_write(path, writing(b"first"))
    assert path.read_bytes() == b"first"
    atomic_write(str(path), writing(b"second"))
    assert path.read_bytes() == b"second"
    assert names(tmp_path) == ["arch.json"]


def test_the_mode_is_that_of_an_ordinary_new_file(tmp_path: Path) -> None:
    atomic_write(tmp_path / "ours", writing(b"x"))
    (tmp_path / "ordinary").write_bytes(b"x")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)


@pytest.mark.parametrize("error", [Injected(), KeyboardInterrupt()])
def test_when_write_raises_the_old_files_stay(tmp_path: Path, error: BaseException) -> None:
    path, previous = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"old")
    previous.write_bytes(b"older")

    def write(file: BinaryIO) -> None:
        file.write(b"half of the n")
        raise error

    with pytest.raises(type(error)):
        atomic_write(path, write, keep_previous=previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"old", b"older")
    assert names(tmp_path) == ["a", "b"]


def test_when_write_raises_no_file_appears(tmp_path: Path) -> None:
    with pytest.raises(Injected):
        atomic_write(tmp_path / "a", raising(Injected()))
    assert names(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_when_the_system_fails_the_old_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, raising(OSError(errno.ENOSPC, "no space left")))
        with pytest.raises(OSError, match="no space left"):
            atomic_write(path, writing(b"new"))
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_failed_replace_can_be_repeated_without_leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # After the failure path and previous are one file; renaming one name of a file onto another does nothing.
    path, previous = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"old")
    replace = os.replace

    def fail_on_path(source: Path, target: Path) -> None:
        if target == path:
            raise Injected
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_on_path)
        with pytest.raises(Injected):
            atomic_write(path, writing(b"new"), keep_previous=previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"old", b"old")
    atomic_write(path, writing(b"new"), keep_previous=previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"new", b"old")
    assert names(tmp_path) == ["a", "b"]


def test_bytes_reach_the_disk_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        info = os.fstat(descriptor)
        calls.append("fsync folder" if stat.S_ISDIR(info.st_mode) else f"fsync {info.st_size} bytes")
        fsync(descriptor)

    def recorded_replace(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    atomic_write(tmp_path / "a", writing(b"12345"))
    assert calls[:2] == ["fsync 5 bytes", "replace"]
    assert calls[2:] == ([] if os.name == "nt" else ["fsync folder"])


@pytest.mark.parametrize("links", [True, False])
def test_keep_previous_by_link_or_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:
        monkeypatch.setattr(os, "link", raising(OSError(errno.EPERM, "no links here")))
    (tmp_path / "kept").mkdir()
    path, previous = tmp_path / "a", tmp_path / "kept" / "b"
    atomic_write(path, writing(b"1"), keep_previous=previous)
    assert not previous.exists()
    inode = path.stat().st_ino
    atomic_write(path, writing(b"2"), keep_previous=previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"2", b"1")
    assert (previous.stat().st_ino == inode) is links
    atomic_write(path, writing(b"3"), keep_previous=previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"3", b"2")
    assert names(tmp_path) == ["a", "kept"]
    assert names(previous.parent) == ["b"]


def test_folders_must_exist_and_names_must_differ(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"there is no folder .*absent.*Make it first"):
        atomic_write(tmp_path / "absent" / "a", writing(b"x"))
    with pytest.raises(ConfigurationError, match=r"there is no folder .*absent"):
        atomic_write(tmp_path / "a", writing(b"x"), keep_previous=tmp_path / "absent" / "b")
    with pytest.raises(ConfigurationError, match="are one file"):
        atomic_write(tmp_path / "a", writing(b"x"), keep_previous=tmp_path / "." / "a")
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_synced_is_no_error_but_a_broken_disk_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def refuse_folders(code: int) -> Callable[[int], None]:
        def call(descriptor: int) -> None:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(code, os.strerror(code))
            fsync(descriptor)

        return call

    monkeypatch.setattr(os, "fsync", refuse_folders(errno.EINVAL))
    atomic_write(tmp_path / "a", writing(b"1"))
    assert (tmp_path / "a").read_bytes() == b"1"
    monkeypatch.setattr(os, "fsync", refuse_folders(errno.EIO))
    with pytest.raises(OSError) as error:
        atomic_write(tmp_path / "a", writing(b"2"))
    assert error.value.errno == errno.EIO
    assert names(tmp_path) == ["a"]


# `oneshot` is stood in by an empty package, so that the process does not spend seconds on importing torch.
KILLED = """
import os, sys, types
package = types.ModuleType("oneshot")
package.__path__ = [sys.argv[1]]
sys.modules["oneshot"] = package
from oneshot.files import atomic_write

def write(file):
    file.write(b"half of the n")
    file.flush()
    os._exit(7)

atomic_write(sys.argv[2], write)
"""


def test_a_killed_process_leaves_the_old_file_and_one_removable_leftover(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    package = str(Path(oneshot.files.__file__).parent)
    assert subprocess.run([sys.executable, "-c", KILLED, package, str(path)], check=False).returncode == 7
    assert path.read_bytes() == b"old"
    (leftover,) = set(names(tmp_path)) - {"a"}
    assert remove_leftovers(tmp_path) == [tmp_path / leftover]
    assert names(tmp_path) == ["a"]
    assert remove_leftovers(tmp_path) == []


def test_the_next_write_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    package = str(Path(oneshot.files.__file__).parent)
    for name in ("a", "b"):
        killed = subprocess.run([sys.executable, "-c", KILLED, package, str(tmp_path / name)], check=False)
        assert killed.returncode == 7
    assert len(names(tmp_path)) == 2
    (tmp_path / "kept").mkdir()
    atomic_write(tmp_path / "kept" / "c", writing(b"1"))
    assert len(names(tmp_path)) == 3
    atomic_write(tmp_path / "c", writing(b"1"))
    assert names(tmp_path) == ["c", "kept"]


def test_a_file_that_is_being_written_is_no_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, previous = tmp_path / "a", tmp_path / "b"
    seen = []

    def write(file: BinaryIO) -> None:
        file.write(b"half")
        seen.append((names(tmp_path), remove_leftovers(tmp_path)))
        file.write(b" and half")

    atomic_write(path, write)
    replace = os.replace

    def look_and_replace(source: Path, target: Path) -> None:
        seen.append((names(tmp_path), remove_leftovers(tmp_path)))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look_and_replace)
    atomic_write(path, write, keep_previous=previous)
    assert [removed for _, removed in seen] == [[]] * 4
    # In the first write; in the second one with the old file, then with its second name too, then with that in place.
    assert [len(found) for found, _ in seen] == [1, 2, 3, 3]
    assert (path.read_bytes(), previous.read_bytes()) == (b"half and half", b"half and half")
    assert names(tmp_path) == ["a", "b"]


def test_a_file_taken_before_it_had_its_lock_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, removed = oneshot.files.fcntl.flock, []

    def too_late(descriptor: int, how: int) -> None:
        if not removed:
            removed.append(None)
            removed.extend(remove_leftovers(tmp_path))
        flock(descriptor, how)

    monkeypatch.setattr(oneshot.files.fcntl, "flock", too_late)
    atomic_write(tmp_path / "a", writing(b"1"))
    assert len(removed) == 2
    assert (tmp_path / "a").read_bytes() == b"1"
    assert names(tmp_path) == ["a"]


def test_without_locks_only_old_files_are_leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    young, old = (tmp_path / f".oneshot-tmp-{digit * 16}" for digit in "ab")
    young.write_bytes(b"1")
    old.write_bytes(b"2")
    os.utime(old, (0, 0))
    monkeypatch.setattr(oneshot.files.fcntl, "flock", raising(OSError(errno.ENOLCK, "no locks here")))
    assert remove_leftovers(tmp_path) == [old]
    atomic_write(tmp_path / "c", writing(b"3"))
    assert names(tmp_path) == [young.name, "c"]


def test_an_error_of_the_disk_comes_out_with_the_name_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the writer hides it: torch reports a full disk as 'unexpected pos 64 vs 0'."""

    class Full(io.FileIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "no space left")

    def write(file: BinaryIO) -> None:
        try:
            file.write(b"x" * 100_000)
        except OSError:
            raise Injected from None

    monkeypatch.setattr(io, "FileIO", Full)
    for one in (write, lambda file: torch.save(torch.zeros(100_000), file), writing(b"1")):
        with pytest.raises(OSError, match="no space left") as error:
            atomic_write(tmp_path / "a", one)
        assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / "a"))
    assert names(tmp_path) == []


def test_only_our_own_temporary_files_are_leftovers(tmp_path: Path) -> None:
    seen = []
    atomic_write(tmp_path / "a", lambda file: seen.append(Path(file.name).name))
    (ours,) = seen
    (tmp_path / ours).write_bytes(b"left over")
    kept = ["a", ours[:-1], ours + "0", ours[:-1] + "x", "x" + ours]
    for name in kept:
        (tmp_path / name).write_bytes(b"not ours")
    folder_of_that_name = ours[:-1] + ("0" if ours[-1] != "0" else "1")
    (tmp_path / folder_of_that_name).mkdir()
    assert remove_leftovers(str(tmp_path)) == [tmp_path / ours]
    assert names(tmp_path) == sorted([*kept, folder_of_that_name])
    assert remove_leftovers(tmp_path / "absent") == []


class Faults:
    """Lets the n-th system call of a write fail, and looks at the file before each of them."""

    def __init__(self, patch: pytest.MonkeyPatch, fail_at: int | None, look: Callable[[], object]) -> None:
        self.calls, self.fail_at, self.look = 0, fail_at, look
        for name in ("link", "fsync", "replace"):
            patch.setattr(os, name, self.wrapped(getattr(os, name)))

    def wrapped(self, call: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object) -> object:
            self.look()
            self.calls += 1
            if self.calls == self.fail_at:
                raise Injected
            return call(*args)

        return counted


# (content, at which system call it fails, whether the previous file is kept)
steps = st.tuples(st.binary(max_size=8), st.none() | st.integers(1, 7), st.booleans())


@settings(deadline=None, max_examples=50)
@given(st.lists(steps, max_size=6))
def test_any_sequence_of_writes_and_failures(sequence: list[tuple[bytes, int | None, bool]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, previous = folder / "a", folder / "b"
        current: bytes | None = None
        for content, fail_at, keep in sequence:
            old = current

            def stands(old: bytes | None = old, content: bytes = content) -> bytes | None:
                found = path.read_bytes() if path.exists() else None
                assert found in (old, content)
                return found

            before = previous.read_bytes() if previous.exists() else None
            with pytest.MonkeyPatch.context() as patch:
                faults = Faults(patch, fail_at, stands)
                try:
                    atomic_write(path, writing(content), keep_previous=previous if keep else None)
                except Injected:
                    current = stands()
                    # Only the sync of the folder, the very last call, can fail after the rename.
                    assert current == old or faults.calls == (6 if keep and old is not None else 3)
                else:
                    current = stands()
                    assert current == content
                    if keep and old is not None:
                        before = old
            after = previous.read_bytes() if previous.exists() else None
            assert after in (before, old if keep else before)
            assert set(names(folder)) <= {"a", "b"}
