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

__all__ = ["LAST", "PREVIOUS", "check_fits", "read_checkpoint", "write_checkpoint"]

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
_FORMAT = "oneshot-checkpoint"
_VERSION = 1


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` (tensors and plain data); the file that stood there becomes ``previous.ckpt`` beside it."""
    data = {"format": _FORMAT, "version": _VERSION, **state}
    atomic_write(path, lambda file: torch.save(data, file), keep_previous=path.with_name(PREVIOUS))


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state of a file, or of the ``last.ckpt`` of a folder; CheckpointError offers the previous one."""
    path = Path(path)
    if path.is_dir():
        path = path / LAST
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint{_offer(path)}")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: truncated, or not a checkpoint ({first}){_offer(path)}") from error
    except (KeyError, TypeError, AttributeError, IndexError, AssertionError) as error:  # a damaged pickle program
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error}){_offer(path)}") from error
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: a file of torch, but not a checkpoint of this library{_offer(path)}")
    if data.get("version") != _VERSION:
        raise CheckpointError(f"{path}: version {data.get('version')!r}, this library reads {_VERSION}{_offer(path)}")
    return data


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
