"""The keyword arguments that all trainers have."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from .setup import Devices, OptimizerLike

if TYPE_CHECKING:
    from typing_extensions import Required

__all__ = ["SchedulerFactory", "SharedArguments", "known_arguments"]

SchedulerFactory = Callable[[Optimizer, int], LRScheduler]


class SharedArguments(TypedDict, total=False):
    """What every trainer takes and hands on; ``Trainer`` and ``ProxylessTrainer`` describe them."""

    loss: Required[Callable[[Any, Any], Tensor]]
    metrics: Required[Callable[[Any, Any], Mapping[str, Tensor | float] | Tensor | float] | None]
    optimizer: Required[OptimizerLike]
    dataset: Dataset[Any] | None
    arch_dataset: Dataset[Any] | None
    valid_dataset: Dataset[Any] | None
    warmup_epochs: int
    batch_size: int
    workers: int
    log_frequency: int | None
    scheduler: SchedulerFactory | None
    warmup_scheduler: SchedulerFactory | None
    seed: int
    device: torch.device | str | None
    accelerator: str | None
    devices: Devices
    num_nodes: int | None
    strategy: str
    precision: str
    compile: bool | str | Mapping[str, Any]
    checkpoint_blocks: Sequence[str]
    accumulate: int
    grad_clip: float | Mapping[str, float] | None
    ema_decay: float | None
    checkpoint_dir: str | os.PathLike[str] | None
    checkpoint_every: int | None
    progress: bool | None


_Given = TypeVar("_Given", bound=SharedArguments)


def known_arguments(trainer: str, given: _Given, known: type[SharedArguments] = SharedArguments) -> _Given:
    """The arguments; TypeError for one that no such trainer takes, or a required one that is missing."""
    unknown = [name for name in given if name not in known.__annotations__]
    missing = [name for name in ("loss", "metrics", "optimizer") if name not in given]
    if unknown or missing:
        parts = [f"unexpected arguments {unknown}"] if unknown else []
        parts += [f"missing arguments {missing}"] if missing else []
        raise TypeError(f"{trainer}(): {' and '.join(parts)}")
    return given
