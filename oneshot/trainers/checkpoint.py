"""Checkpoint files: written atomically with the previous one kept, read without running any code in them."""

from __future__ import annotations

import os
import pickle
import reprlib
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..files import atomic_write
from .checkpoint_archive import check_archive
from .checkpoint_fit import check_fits
from .checkpoint_state import check_state

__all__ = ["BEST", "LAST", "PREVIOUS", "check_fits", "read_checkpoint", "write_checkpoint"]

BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"
_FORMAT = "oneshot-checkpoint"
_VERSION = 1
# What torch's restricted unpickler raises on a program that is not its own.
_LOAD_ERRORS = (
    *(RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError),
    *(KeyError, TypeError, AttributeError, IndexError, AssertionError, OverflowError, struct.error),
)


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` (tensors and plain data); the file that stood there becomes ``previous.ckpt`` beside it.

    A ``best.ckpt`` is replaced, because the previous file belongs to the last one.
    """
    data = {"format": _FORMAT, "version": _VERSION, **state}
    previous = None if path.name == BEST else path.with_name(PREVIOUS)
    atomic_write(path, lambda file: torch.save(data, file), keep_previous=previous)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state of a file, or of the ``last.ckpt`` of a folder; CheckpointError offers the previous one.

    Every key is there, and what stands there is of its kind (``checkpoint_state.CHECKS``); whether it fits a model and
    its optimizers, the checks of ``checkpoint_fit`` say.
    """
    path = Path(path)
    if path.is_dir():
        path = path / LAST
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint{_offer(path)}")
    try:
        check_archive(path)
        data = _loaded(path)
        check_state(data, str(path))
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_offer(path)}") from error
    return data


def _loaded(path: Path) -> dict[str, Any]:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except _LOAD_ERRORS as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a checkpoint ({first})") from error
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: a file of torch, but not a checkpoint of this library")
    if type(data.get("version")) is not int or data["version"] != _VERSION:
        raise CheckpointError(f"{path}: version {reprlib.repr(data.get('version'))}, this library reads {_VERSION}")
    return data


def _offer(path: Path) -> str:
    previous = path.with_name(PREVIOUS)
    if previous.exists() and previous != path:
        return f"; the previous checkpoint is there: resume({str(previous)!r})"
    return "; there is no previous checkpoint beside it"
