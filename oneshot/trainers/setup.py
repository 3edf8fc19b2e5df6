"""What a trainer builds from its arguments before anything runs."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision
from torch import nn
from torch.optim import Optimizer

from ..errors import ConfigurationError

__all__ = ["OptimizerLike", "check_counts", "library_version", "own_fabric", "own_optimizer", "to_device_of_weights"]

OptimizerLike = Optimizer | Callable[[list[nn.Parameter]], Optimizer]
Devices = int | Sequence[int] | str | None

_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
_STRATEGIES = ("auto", "ddp")


def check_counts(**values: int | None) -> None:
    """ConfigurationError for a number of epochs, steps or samples that is none; None is allowed."""
    from_zero = ("num_epochs", "warmup_epochs", "workers", "finetune_epochs")
    for name, value in values.items():
        low = 0 if name in from_zero else 1
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
            raise ConfigurationError(f"{name}={value!r}: an integer of at least {low} is needed")


def own_fabric(
    *,
    device: torch.device | str | None,
    accelerator: str | None,
    devices: Devices,
    num_nodes: int | None,
    strategy: str,
    precision: str,
) -> tuple[Fabric, torch.amp.GradScaler | None]:
    """Lightning Fabric for these arguments, and the scaler of the loss if the precision needs one.

    Where ``torchrun`` has started the processes, ``devices`` and ``num_nodes`` are what it says.
    """
    if precision not in _PRECISIONS:
        raise ConfigurationError(f"precision={precision!r}: allowed are {list(_PRECISIONS)}; alphas stay in float32")
    _check_strategy(strategy)
    kind, index = _kind_of_device(device, accelerator)
    devices, nodes = _started(devices, num_nodes)
    if index is not None:
        if devices not in (None, 1):
            raise ConfigurationError(f"device={str(device)!r} and devices={devices!r}: the one is a single device")
        devices = [index]
    devices = 1 if devices is None else devices
    scaler = torch.amp.GradScaler(kind) if precision == "16-mixed" else None
    plugin = None if precision == "32-true" else MixedPrecision(precision, kind, scaler)  # type: ignore[arg-type]
    try:
        fabric = Fabric(
            accelerator=kind,
            devices=list(devices) if isinstance(devices, tuple) else devices,  # type: ignore[arg-type]
            num_nodes=nodes,
            strategy=strategy,
            plugins=None if plugin is None else [plugin],
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigurationError(
            f"device={device!r}, accelerator={accelerator!r}, devices={devices!r}, num_nodes={nodes}, "
            f"strategy={strategy!r}: {error}"
        ) from error
    return fabric, scaler


def _check_strategy(strategy: str) -> None:
    if strategy in _STRATEGIES:
        return
    why = ""
    if isinstance(strategy, str) and any(name in strategy for name in ("fsdp", "deepspeed", "model_parallel")):
        why = (
            ". It would give each process flat parts of the weights, but a step of a search trains the parameters of "
            "one path, masks multiply whole weights, and the export rebuilds layers from them. For memory: "
            "checkpoint_blocks=[...], accumulate=4, precision='bf16-mixed', or a trainer that runs one path at a time"
        )
    elif isinstance(strategy, str) and strategy.startswith(("ddp_", "dp")):
        why = ". Processes that come back with a pickled copy of the model would lose what they found; use 'ddp'"
    raise ConfigurationError(f"strategy={strategy!r}: allowed are {list(_STRATEGIES)}{why}")


def _kind_of_device(device: torch.device | str | None, accelerator: str | None) -> tuple[str, int | None]:
    """'cpu' or 'cuda', and which one of them."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    names = {None: None, "auto": best, "gpu": "cuda", "cpu": "cpu", "cuda": "cuda"}
    if accelerator not in names:
        known = [name for name in names if name is not None]
        raise ConfigurationError(f"accelerator={accelerator!r}: allowed are {known}")
    wanted = names[accelerator]
    if device is None:
        return wanted or best, None
    own = torch.device(device)
    if own.type not in ("cpu", "cuda"):
        raise ConfigurationError(
            f"device={str(device)!r}: 'cpu' or 'cuda' is needed; Apple's GPUs have no float64, in which costs and "
            "means are added up"
        )
    if wanted is not None and own.type != wanted:
        raise ConfigurationError(f"device={str(device)!r} and accelerator={accelerator!r}: give one of them")
    return own.type, own.index if own.type == "cuda" else None


def _started(devices: Devices, num_nodes: int | None) -> tuple[Devices, int]:
    """The processes of each node, and the nodes."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        return devices, num_nodes or 1
    here, everywhere = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    count = len(devices) if isinstance(devices, list | tuple) else devices
    nodes = everywhere // here
    if count not in (None, "auto", here) or num_nodes not in (None, nodes):
        raise ConfigurationError(
            f"devices={devices!r}, num_nodes={num_nodes}: torchrun has started {here} processes on each of {nodes} "
            "nodes; leave both arguments out, or start as many"
        )
    return here if devices == "auto" or devices is None else devices, nodes


def own_optimizer(optimizer: OptimizerLike, weights: list[nn.Parameter]) -> Optimizer:
    """An optimizer of the user's class and settings for the weights only.

    The user's own one was built from ``model.parameters()``, alphas included, and is left as it is.
    """
    if not isinstance(optimizer, Optimizer):
        return _with_simple_steps(optimizer(weights))
    _with_simple_steps(optimizer)
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


def _with_simple_steps(optimizer: Optimizer) -> Optimizer:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigurationError(
            "optimizer: LBFGS evaluates the loss several times in a step, each of which would be another draw; use SGD "
            "or Adam"
        )
    return optimizer


def to_device_of_weights(optimizer: Optimizer) -> None:
    """Bring what an optimizer remembers, loaded before the model moved, to where its parameters are."""
    for group in optimizer.param_groups:
        counts_there = group.get("fused") or group.get("capturable")  # else the CPU counts the steps
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and (value.dim() or counts_there):
                    state[name] = value.to(parameter.device)


def library_version() -> str:
    try:
        return version("oneshot-nas")
    except PackageNotFoundError:
        return "(not installed)"
