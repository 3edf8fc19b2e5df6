"""What may learn and what may move during a step: context managers that put everything back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

__all__ = ["batch_statistics", "frozen_statistics", "frozen_weights"]


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


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Normalisation layers use the statistics of the batch inside, and their running ones do not move."""
    batch_norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    instance_norms = [m for m in model.modules() if isinstance(m, _InstanceNorm)]
    momenta = [m.momentum for m in instance_norms]
    for norm in batch_norms:
        # In training mode the flag only says whether the buffers are updated, the batch count included.
        norm.track_running_stats = False
    for instance_norm in instance_norms:
        instance_norm.momentum = 0.0
    try:
        yield
    finally:
        for norm in batch_norms:
            norm.track_running_stats = True
        for instance_norm, momentum in zip(instance_norms, momenta, strict=True):
            instance_norm.momentum = momentum


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Eval mode, but BatchNorm normalises with the batch: running statistics mix all paths of a supernet.

    The running statistics do not move, and every mode is put back.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.training = True
    try:
        with frozen_statistics(model):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
