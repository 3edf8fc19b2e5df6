"""What may learn and what may move during a step: context managers that put everything back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

__all__ = ["batch_statistics", "frozen_statistics", "frozen_weights", "normalisations"]


@contextmanager
def frozen_weights(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """The given parameters need no gradient inside; gradients still flow through them to earlier layers."""
    learning = [p for p in parameters if p.requires_grad]
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)


def normalisations(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, (_BatchNorm, _InstanceNorm)) and m.track_running_stats]


@contextmanager
def frozen_statistics(layers: Sequence[nn.Module]) -> Iterator[None]:
    """The given normalisation layers use the statistics of the batch inside, and their running ones do not move."""
    momenta = [getattr(layer, "momentum", None) for layer in layers]
    for layer in layers:
        if isinstance(layer, _BatchNorm):
            # In training mode the flag only says whether the buffers are updated, the batch count included.
            layer.track_running_stats = False
        elif isinstance(layer, _InstanceNorm):
            layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            if isinstance(layer, _BatchNorm):
                layer.track_running_stats = True
            elif isinstance(layer, _InstanceNorm):
                layer.momentum = momentum


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Eval mode, but BatchNorm normalises with the batch: running statistics mix all paths of a supernet.

    The running statistics do not move, and every mode is put back.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm) or (isinstance(module, _InstanceNorm) and module.track_running_stats):
            module.training = True
    try:
        with frozen_statistics(normalisations(model)):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
