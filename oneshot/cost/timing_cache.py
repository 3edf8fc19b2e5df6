"""Measured rounds on the disk: what was measured once on this machine is not measured again.

One JSON file per measurement, ``<folder>/latency/<machine>/<key>.json``, where the machine is a hash of runtime,
version, processor and threads, and the key one of the executed operators:

    {"format": "oneshot-timing", "version": 1, "runtime": {...}, "operators": ["input(float32[1, 3])", ...],
     "rounds": [{"min_run_time": 0.02, "repetitions": [[ms, cpu_share, probe_ms], ...]}, ...]}
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from ..errors import ConfigurationError
from ..files import atomic_write, user_cache
from .timing import Repetition, Round

if sys.platform != "win32":
    import fcntl

__all__ = ["TimingCache", "cache_folder"]

_FORMAT, _VERSION = "oneshot-timing", 1


def cache_folder(cache: bool | str | Path) -> Path | None:
    """The folder of a ``cache`` argument: True is that of the user.

    >>> cache_folder("here"), cache_folder(False)
    (PosixPath('here'), None)
    """
    if isinstance(cache, str | Path):
        return Path(cache)
    if cache is False:
        return None
    if cache is not True:
        raise ConfigurationError(f"cache={cache!r}: True, False or a folder is needed")
    return user_cache()


@final
class TimingCache:
    """The measurements of one machine and runtime. Without a folder, nothing is kept.

    A damaged file counts as none, with a warning, and is written anew; a folder that cannot be written is given up,
    with a warning.
    """

    def __init__(self, folder: Path | None, runtime: Mapping[str, str]) -> None:
        self.runtime = dict(runtime)
        machine = hashlib.sha256(json.dumps(self.runtime, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = None if folder is None else folder / "latency" / machine

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other process measures for this folder: it would be timed with us, and find other times.

        It waits instead, and then finds ours, so that the processes of one search have one table.
        """
        file = None
        if self.folder is not None and sys.platform != "win32":
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                file = (self.folder / "lock").open("w")
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:  # a folder that cannot be written, or a file system without locks
                pass
        try:
            yield
        finally:
            if file is not None:
                file.close()

    def rounds(self, key: str, min_run_time: float) -> list[Round]:
        """The rounds of a measurement that took at least ``min_run_time`` seconds each."""
        path = self._path(key)
        if path is None:
            return []
        try:
            if not path.exists():
                return []
            return _rounds(json.loads(path.read_text(encoding="utf-8")), min_run_time)
        except (OSError, ValueError, ArithmeticError, TypeError, KeyError, RecursionError) as error:
            warnings.warn(f"{path} is damaged ({error}): it is ignored and will be written anew", stacklevel=2)
            return []

    def write(self, key: str, operators: Sequence[str], rounds: Sequence[Round], min_run_time: float) -> None:
        """Keep the rounds of a measurement, complete or not."""
        path = self._path(key)
        if path is None:
            return
        data = {
            "format": _FORMAT,
            "version": _VERSION,
            "runtime": self.runtime,
            "operators": list(operators),
            "rounds": [{"min_run_time": min_run_time, "repetitions": one} for one in rounds],
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, lambda file: file.write(json.dumps(data).encode()))
        except OSError as error:
            warnings.warn(f"latencies are not kept, {path.parent} cannot be written: {error}", stacklevel=2)
            self.folder = None

    def _path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{key}.json"


def _rounds(data: Any, min_run_time: float) -> list[Round]:
    """ValueError, TypeError or KeyError for what is no such file."""
    if data["format"] != _FORMAT or data["version"] != _VERSION:
        raise ValueError(f"format {data['format']!r}, version {data['version']!r}")
    rounds = []
    for one in data["rounds"]:
        repetitions = [Repetition(*(float(number) for number in row)) for row in one["repetitions"]]
        good = all(0 <= r.ms < math.inf and 0 <= r.cpu_share <= 1 and 0 < r.probe_ms < math.inf for r in repetitions)
        if not repetitions or not good:
            raise ValueError("a round without repetitions, or with numbers that are no times")
        if one["min_run_time"] >= min_run_time:
            rounds.append(repetitions)
    return rounds
