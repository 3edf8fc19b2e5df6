"""The strength from which on a group lasso has nothing but zeros: a natural unit for strengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from .groups import Family, group_norms, group_sizes
from .patterns import weights_of

__all__ = ["group_factors", "lambda_max"]


def group_factors(family: Family, parameters: Mapping[str, Tensor], size_factor: Literal["sqrt", "none"]) -> Tensor:
    """(n,) float64: sqrt(n_g) of each group, or 1."""
    sizes = group_sizes(family, parameters).double()
    return sizes.sqrt() if size_factor == "sqrt" else torch.ones_like(sizes)


def lambda_max(
    model: nn.Module,
    families: Sequence[Family],
    closure: Callable[[], Tensor],
    size_factor: Literal["sqrt", "none"] = "sqrt",
) -> dict[str, float]:
    """Name of family -> max_g ||grad_g f||_2 / sqrt(n_g), with this family at zero and everything else as it is.

    ``closure()``: the loss f without the penalty, 0-dim, on as much data as there is; no ``backward``. For a convex f
    and the other parameters at their optimum, the family stays at zero from this strength on, and some group leaves it
    below; else it is a scale only: behind a ReLU or a BatchNorm the gradient at zero says little.

    Weights, gradients, buffers (such as BatchNorm's statistics) and torch's random state are as before afterwards.
    ConfigurationError if no gradient arrives at zero: nothing can be relative to 0.

    >>> net, x = nn.Linear(1, 2, bias=False), torch.tensor([[2.0]])
    >>> rows = Family("rows", {"weight": torch.tensor([[0], [1]])}, 2)
    >>> lambda_max(net, [rows], lambda: (net(x) - torch.tensor([[3.0, 5.0]])).square().sum() / 2)  # 2 * 5
    {'rows': 10.0}
    """
    parameters = weights_of(model)
    with _kept(model):
        return {family.name: _at_zero(family, parameters, closure, size_factor) for family in families}


def _at_zero(
    family: Family,
    parameters: dict[str, nn.Parameter],
    closure: Callable[[], Tensor],
    size_factor: Literal["sqrt", "none"],
) -> float:
    before = {name: parameters[name].detach().clone() for name in family.index}
    learning = [name for name in family.index if parameters[name].requires_grad]
    if not learning:
        raise ConfigurationError(f"lambda_max of {family.name!r}: all of its parameters are frozen (requires_grad)")
    try:
        with torch.no_grad():
            for name, index in family.index.items():
                parameters[name].mul_((index < 0).to(parameters[name]))
        with torch.enable_grad():
            loss = closure()
        if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
            raise ConfigurationError(f"lambda_max: closure() returned {loss!r}; a 0-dim loss with a gradient is needed")
        slopes = torch.autograd.grad(loss, [parameters[name] for name in learning], allow_unused=True)
    finally:
        with torch.no_grad():
            for name, value in before.items():
                parameters[name].copy_(value)
    known = {name: slope for name, slope in zip(learning, slopes, strict=True) if slope is not None}
    each = {name: known.get(name, torch.zeros_like(before[name])) for name in family.index}
    factors = group_factors(family, parameters, size_factor)
    found = float((group_norms(family, each).double() / factors.to(next(iter(each.values())).device)).max())
    if not found or not math.isfinite(found):
        raise ConfigurationError(
            f"lambda_max of {family.name!r}: the gradient with these weights at zero is {found}"
            f"{' (a ReLU behind a layer without a bias gives that)' if not found else ''}; give an absolute strength"
        )
    return found


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """What a forward and a backward may change is put back: buffers, gradients, the random state."""
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    grads = [(p, p.grad, None if p.grad is None else p.grad.detach().clone()) for p in model.parameters()]
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    buffer.copy_(value)
                    setattr(module, name, buffer)
                for parameter, grad, gradient in grads:
                    parameter.grad = grad
                    if grad is not None and gradient is not None:
                        grad.copy_(gradient)
