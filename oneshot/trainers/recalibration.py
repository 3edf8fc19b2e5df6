"""BatchNorm statistics of one path of a supernet: recomputed over given batches.

The running statistics of a supernet mix the paths it was trained on, so that a single path is judged wrongly with
them. They are replaced by averages over batches b = 1, 2, ... of n_b samples, along the path that is set:
    mean = sum_b n_b mean_b / sum_b n_b,   var = sum_b n_b var_b / sum_b n_b,
with the unbiased variance var_b of a batch, which is what torch keeps. Source: SPOS, arXiv 1904.00420, section 3.3;
weighted by n_b as in Once-for-All, arXiv 1908.09791.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from ..errors import ConfigurationError
from .modes import normalisations

__all__ = ["recalibrate_", "recalibrated", "statistics_kept"]


@torch.no_grad()
def recalibrate_(model: nn.Module, batches: Iterable[Any]) -> None:
    """Replace the running statistics of every normalisation layer that runs by those of ``batches``.

    The model runs in eval mode, without dropout, but its normalisation layers use the statistics of each batch; what
    comes after a layer is therefore measured on inputs that were normalised as in training. Layers that do not run
    (candidates off the path) keep their statistics; a layer that runs more than once per batch averages all its runs.
    Modes and momenta are put back, ``num_batches_tracked`` says how many runs were averaged, also for layers with
    ``momentum=None``, whose own average would weigh all batches alike. No weight changes, and if a batch fails, no
    statistic does.

    Args:
        model: a plain network, or a search model whose samplers are set to one path.
        batches: what the model is called with, one argument per batch: inputs of several samples on its device.

    Raises:
        ConfigurationError: no batches, or one with a single value per channel, which has no variance.

    >>> norm = nn.BatchNorm1d(1)
    >>> recalibrate_(norm, [torch.tensor([[1.0], [3.0]]), torch.tensor([[4.0], [5.0], [6.0]])])
    >>> norm.running_mean, norm.running_var  # (2 * 2 + 3 * 5) / 5 and (2 * 2 + 3 * 1) / 5
    (tensor([3.8000]), tensor([1.4000]))
    """
    layers = normalisations(model)
    averages = [_Average() for _ in layers]
    n_batches = 0
    with statistics_kept(model), _measuring(model, layers, averages):
        for inputs in batches:
            model(pytree.tree_map_only(Tensor, torch.clone, inputs))  # a network may write into its input
            n_batches += 1
    if not n_batches:
        raise ConfigurationError("recalibration: no batches; at least one is needed, of two or more samples")
    for layer, average in zip(layers, averages, strict=True):
        average.write_to(layer)


@contextmanager
def recalibrated(model: nn.Module, batches: Iterable[Any]) -> Iterator[None]:
    """Inside, the statistics are those of ``recalibrate_``; afterwards they are what they were, bit for bit.

    >>> norm = nn.BatchNorm1d(1)
    >>> with recalibrated(norm, [torch.tensor([[1.0], [3.0]])]):
    ...     inside = float(norm.running_mean)
    >>> inside, float(norm.running_mean)
    (2.0, 0.0)
    """
    with statistics_kept(model):
        recalibrate_(model, batches)
        yield


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, the running statistics are afterwards what they were before, bit for bit."""
    buffers = [buffer for layer in normalisations(model) for buffer in layer.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


@final
class _Average:
    """Weighted sums of the statistics of one layer, in float64."""

    def __init__(self) -> None:
        self.runs, self.weight = 0, 0
        self.sums: dict[str, Tensor] = {}

    def add(self, n: int, statistics: Mapping[str, Tensor]) -> None:
        self.runs, self.weight = self.runs + 1, self.weight + n
        for name, value in statistics.items():
            added = n * value.double()
            self.sums[name] = self.sums[name] + added if name in self.sums else added

    def write_to(self, layer: nn.Module) -> None:
        if not self.runs:
            return
        for name, total in self.sums.items():
            layer.get_buffer(name).copy_(total / self.weight)
        if isinstance(layer, _BatchNorm) and layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(self.runs)


@contextmanager
def _measuring(model: nn.Module, layers: Sequence[nn.Module], averages: Sequence[_Average]) -> Iterator[None]:
    """Inside, a forward adds to ``averages`` what each layer found, and each layer uses what it finds."""
    modes = [(module, module.training) for module in model.modules()]
    momenta: list[Any] = [layer.momentum for layer in layers]
    with ExitStack() as stack:
        try:
            model.eval()
            for layer, average in zip(layers, averages, strict=True):
                # With a momentum of 1, what torch keeps after a batch is the statistics of that batch alone.
                layer.training, layer.momentum = True, 1.0  # type: ignore[assignment]
                stack.callback(layer.register_forward_pre_hook(_forget).remove)
                stack.callback(layer.register_forward_hook(partial(_note, average)).remove)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum


def _forget(layer: nn.Module, args: Sequence[Any]) -> None:
    """Before a run: 0 * NaN is NaN, so that a momentum of 1 alone would not get rid of a spoilt statistic."""
    if isinstance(layer, _BatchNorm) and args and args[0].numel() <= args[0].size(1):
        raise ConfigurationError(
            f"recalibration: {layer} gets an input of shape {tuple(args[0].shape)}, a single value per channel, which "
            "has no variance; use batches of two or more samples"
        )
    layer.get_buffer("running_mean").zero_()
    layer.get_buffer("running_var").zero_()


def _note(average: _Average, layer: nn.Module, args: Any, output: Tensor) -> None:
    # The output has the shape of the input, which may have been given by name.
    average.add(output.size(0), {name: layer.get_buffer(name) for name in ("running_mean", "running_var")})
