"""Forests as arrays in the cache of the user, so that a pickle is read once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import ConfigurationError, OneshotError
from ...files import atomic_write
from .forest import Forest

__all__ = ["ForestCache", "sha256_of"]

_INDEX = "sha256.json"
_NS_OF_A_CLOCK = 2_000_000_000  # the coarsest time stamps of a file system, FAT's


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class ForestCache:
    """Forests by the sha256 of the pickle they were read from, and the sha256 of files by their size and time.

    ``problem``: why nothing is kept, if so; the forests are the same then.
    """

    def __init__(self, folder: Path) -> None:
        self.problem: str | None = None
        self._folder = folder / "nn_meter"
        self._index = self._read_index()
        self._new: dict[str, list[Any]] = {}
        self._states: dict[Path, list[int]] = {}

    def sha256(self, path: Path) -> str:
        """Of a file's content, which is not read again while its size and time of change are what they were."""
        key = str(path.resolve())
        self._states[path] = state = _state(path)
        known = self._index.get(key)
        if known is not None and known[:2] == state:
            return str(known[2])
        try:
            sha256 = sha256_of(path)
        except OSError as error:
            raise ConfigurationError(f"{path}: {error.strerror or error}") from error
        # A file of this very moment may change once more without a change of its time.
        if time.time_ns() - state[1] > _NS_OF_A_CLOCK:
            self._new[key] = [*state, sha256]
        return sha256

    def forest(self, path: Path, sha256: str) -> Forest:
        """The forest of the pickle ``path``, whose content has this sha256 by the method above."""
        stored = self._folder / f"{sha256}.npz"
        if stored.is_file():
            try:
                forest = Forest.load(stored)
            except (OneshotError, OSError):
                forest = None  # damaged: it is made again
            if forest is not None and forest.source_sha256 == sha256:
                return forest
        forest = Forest.from_pickle(path)
        if _state(path) != self._states[path]:
            raise ConfigurationError(f"{path}: changed while it was read. Read it again when it is complete")
        self._write(lambda: forest.save(stored, source_sha256=sha256))
        return forest

    def write_index(self) -> None:
        """Remember the sha256 of the files that were read; those of files that are gone are forgotten."""
        if self._new:
            there = {key: entry for key, entry in self._read_index().items() if os.path.isfile(key)}
            text = json.dumps({**there, **self._new}).encode()
            self._write(lambda: atomic_write(self._folder / _INDEX, lambda file: file.write(text)))

    def _read_index(self) -> dict[str, list[Any]]:
        try:
            index = json.loads((self._folder / _INDEX).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}  # it is made again
        entries = index.items() if isinstance(index, dict) else ()
        return {key: entry for key, entry in entries if _is_entry(entry)}

    def _write(self, write: Callable[[], object]) -> None:
        if self.problem is not None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write()
        except OSError as error:
            self.problem = (
                f"the cache {self._folder} cannot be written: {error}. Predictors are read from their pickles each "
                "time, which takes longer. Set ONESHOT_CACHE to a folder that can be written"
            )


def _is_entry(entry: Any) -> bool:
    """Size, time of change, and a sha256, which is part of a file's name."""
    kinds = [type(part) for part in entry] if isinstance(entry, list) else []
    return kinds == [int, int, str] and re.fullmatch("[0-9a-f]{64}", entry[2]) is not None


def _state(path: Path) -> list[int]:
    """Size in bytes and time of the last change in ns."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
