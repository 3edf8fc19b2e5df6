"""Checkpoint files: written atomically with the previous one kept, read without running any code in them."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import atomic_write

__all__ = ["BEST", "LAST", "PREVIOUS", "check_fits", "read_checkpoint", "write_checkpoint"]

BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"
_FORMAT = "oneshot-checkpoint"
_VERSION = 1
_KEYS = (
    *("trainer", "space", "settings", "step", "arch_batches", "model", "optimizer", "arch_optimizer", "scheduler"),
    *("generator", "processes", "history", "argmax", "log_size", "latency_table"),
    *("ended", "finetune_optimizer", "average", "scaler", "own"),
)
_ZIP_ERRORS = (zipfile.BadZipFile, zipfile.LargeZipFile, OSError, ValueError, NotImplementedError, EOFError)
# What torch's restricted unpickler raises on a program that is not its own.
_LOAD_ERRORS = (
    *(RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError),
    *(KeyError, TypeError, AttributeError, IndexError, AssertionError),
)


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` (tensors and plain data); the file that stood there becomes ``previous.ckpt`` beside it.

    A ``best.ckpt`` is replaced, because the previous file belongs to the last one.
    """
    data = {"format": _FORMAT, "version": _VERSION, **state}
    previous = None if path.name == BEST else path.with_name(PREVIOUS)
    atomic_write(path, lambda file: torch.save(data, file), keep_previous=previous)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state of a file, or of the ``last.ckpt`` of a folder; CheckpointError offers the previous one."""
    path = Path(path)
    if path.is_dir():
        path = path / LAST
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint{_offer(path)}")
    _check_archive(path)
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except _LOAD_ERRORS as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a checkpoint ({first}){_offer(path)}") from error
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: a file of torch, but not a checkpoint of this library{_offer(path)}")
    if data.get("version") != _VERSION:
        raise CheckpointError(f"{path}: version {data.get('version')!r}, this library reads {_VERSION}{_offer(path)}")
    missing = [key for key in _KEYS if key not in data]
    if missing:
        raise CheckpointError(f"{path}: incomplete, without {missing}{_offer(path)}")
    return data


def _check_archive(path: Path) -> None:
    """torch writes an uncompressed zip archive with checksums; whatever is not one does not reach its reader."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [i.filename for i in archive.infolist() if i.compress_type != zipfile.ZIP_STORED]
            broken = packed[0] if packed else archive.testzip()
    except _ZIP_ERRORS as error:
        raise CheckpointError(f"{path}: truncated, or not a checkpoint ({error}){_offer(path)}") from error
    if broken is not None:
        raise CheckpointError(f"{path}: damaged at {broken!r}{_offer(path)}")


def check_fits(state: Mapping[str, Tensor], model: nn.Module, where: str) -> None:
    """CheckpointError unless the state has exactly the model's tensors, with their shapes."""
    ours = model.state_dict()
    missing, extra = [k for k in ours if k not in state], [k for k in state if k not in ours]
    shapes = [k for k in ours if k in state and ours[k].shape != state[k].shape]
    if missing or extra or shapes:
        raise CheckpointError(
            f"{where}: made for another model: {len(missing)} tensors missing {missing[:3]}, {len(extra)} too many "
            f"{extra[:3]}, {len(shapes)} of another shape {shapes[:3]}. Build the model with the arguments it had"
        )


def _offer(path: Path) -> str:
    previous = path.with_name(PREVIOUS)
    if previous.exists() and previous != path:
        return f"; the previous checkpoint is there: resume({str(previous)!r})"
    return "; there is no previous checkpoint beside it"
