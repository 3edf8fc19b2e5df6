"""Gradients of costs, taken apart from those of the task so that their shares are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["add_gradients", "weighted_gradients"]


def weighted_gradients(
    outputs: Mapping[str, Tensor], slopes: Mapping[str, Tensor | None], parameters: Sequence[nn.Parameter]
) -> list[Tensor | None]:
    """sum_k slope_k d output_k / d parameter, for each parameter; the graphs are kept."""
    names = [name for name, output in outputs.items() if output.requires_grad and slopes[name] is not None]
    if not names:
        return [None] * len(parameters)
    given = [slopes[name] for name in names]
    found = torch.autograd.grad(
        [outputs[name] for name in names], list(parameters), given, retain_graph=True, allow_unused=True
    )
    return list(found)


def add_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> Tensor:
    """Add these gradients to those there are; returns their share of the L1 norm of both, 0-dim, in [0, 1].

    >>> weight = nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 0.0])
    >>> add_gradients([weight], [torch.tensor([0.0, -1.0])]), weight.grad  # 1 / (3 + 1)
    (tensor(0.2500), tensor([ 3., -1.]))
    """
    norms = [torch.zeros((), device=parameters[0].device if parameters else None)] * 2
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if parameter.grad is not None:
            norms[0] = norms[0] + parameter.grad.abs().sum()
        if gradient is not None:
            norms[1] = norms[1] + gradient.abs().sum()
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return norms[1] / (norms[0] + norms[1]).clamp_min(1e-30)
