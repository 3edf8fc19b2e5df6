"""Gradients of costs, taken apart from those of the task so that their shares are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["add_gradients", "weighted_gradients"]

_SMALL = 4096  # elements of a gradient that is copied, to be read together with others


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
    there = [parameter.grad for parameter in parameters if parameter.grad is not None]
    added = [
        (parameter, gradient) for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is not None
    ]
    norms = [_norm(some, parameters) for some in (there, [gradient for _, gradient in added])]
    both = [(parameter, parameter.grad, gradient) for parameter, gradient in added if parameter.grad is not None]
    for parameter, gradient in added:
        if parameter.grad is None:
            parameter.grad = gradient
    # Not in place: two parameters may hold one tensor as their gradients.
    sums = torch._foreach_add([old for _, old, _ in both], [new for _, _, new in both]) if both else ()
    for (parameter, _, _), total in zip(both, sums, strict=True):
        parameter.grad = total
    return norms[1] / (norms[0] + norms[1]).clamp_min(1e-30)


def _norm(gradients: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
    """The L1 norm of all of them, 0-dim; of the small ones, of which there are many, in a few operators."""
    if not gradients:
        return torch.zeros((), device=parameters[0].device if parameters else None)
    small = [g.flatten() for g in gradients if g.numel() <= _SMALL]
    large = [g for g in gradients if g.numel() > _SMALL]
    return torch.stack([part.abs().sum() for part in ([torch.cat(small)] if small else []) + large]).sum()
