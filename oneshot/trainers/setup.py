"""What a trainer builds from its arguments before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.optim import Optimizer

from ..errors import ConfigurationError

__all__ = ["OptimizerLike", "check_counts", "library_version", "own_fabric", "own_optimizer"]

OptimizerLike = Optimizer | Callable[[list[nn.Parameter]], Optimizer]


def check_counts(
    num_epochs: int,
    warmup_epochs: int,
    batch_size: int,
    workers: int,
    log_frequency: int | None,
    checkpoint_every: int | None,
    finetune_epochs: int = 0,
    patience: int | None = None,
) -> None:
    least = {
        "num_epochs": (num_epochs, 0),
        "warmup_epochs": (warmup_epochs, 0),
        "batch_size": (batch_size, 1),
        "workers": (workers, 0),
        "log_frequency": (log_frequency, 1),
        "checkpoint_every": (checkpoint_every, 1),
        "finetune_epochs": (finetune_epochs, 0),
        "patience": (patience, 1),
    }
    for name, (value, low) in least.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
            raise ConfigurationError(f"{name}={value!r}: an integer of at least {low} is needed")


def own_fabric(device: torch.device | str | None, devices: int, strategy: str, precision: str) -> Fabric:
    allowed = ("32-true", "bf16-mixed")
    if precision not in allowed:
        raise ConfigurationError(f"precision={precision!r}: allowed are {list(allowed)}; alphas stay in float32")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    chosen: int | list[int] = devices if device.index is None or devices > 1 else [device.index]
    return Fabric(accelerator=device.type, devices=chosen, strategy=strategy, precision=precision)  # type: ignore[arg-type]


def own_optimizer(optimizer: OptimizerLike, weights: list[nn.Parameter]) -> Optimizer:
    """An optimizer of the user's class and settings for the weights only.

    The user's own one was built from ``model.parameters()``, alphas included, and is left as it is.
    """
    if not isinstance(optimizer, Optimizer):
        return optimizer(weights)
    mine = {id(p) for p in weights}
    groups = []
    for group in optimizer.param_groups:
        kept = [p for p in group["params"] if id(p) in mine]
        if kept:
            groups.append({**group, "params": kept})
    if not groups:
        raise ConfigurationError(
            "optimizer: none of its parameters is a weight of the model; build it from model.parameters()"
        )
    accepted = inspect.signature(type(optimizer).__init__).parameters
    settings = {name: value for name, value in optimizer.defaults.items() if name in accepted}
    own = type(optimizer)(groups, **settings)
    for p in weights:
        if p in optimizer.state:
            own.state[p] = dict(optimizer.state[p])
    return own


def library_version() -> str:
    try:
        return version("oneshot-nas")
    except PackageNotFoundError:
        return "(not installed)"
