"""Proximal steps: the exact minimum of a penalty and the distance to where the optimizer's step led.

A (sub)gradient of a norm steps over zero and back and never gives zeros; a proximal step does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer, RMSprop

from ..errors import ConfigurationError
from .groups import Family, group_norms, spread

__all__ = ["block_scale", "block_soft_threshold", "effective_steps", "shrink_", "soft_threshold"]


def soft_threshold(v: Tensor, threshold: float) -> Tensor:
    """argmin_w (w - v)^2 / 2 + threshold |w|, element by element: sign(v) max(|v| - threshold, 0).

    >>> soft_threshold(torch.tensor([3.0, -0.5, -2.0]), 1.0).tolist()
    [2.0, 0.0, -1.0]
    """
    return v - v.clamp(-threshold, threshold)


def block_soft_threshold(v: Tensor, threshold: float | Tensor) -> Tensor:
    """argmin_w ||w - v||^2 / 2 + threshold ||w||_2 over the last dimension: v max(0, 1 - threshold / ||v||_2).

    Yuan and Lin 2006.

    >>> block_soft_threshold(torch.tensor([[3.0, 4.0], [0.6, 0.8]]), 1.0).tolist()  # norms 5 and 1
    [[2.4000000953674316, 3.200000047683716], [0.0, 0.0]]
    """
    norms = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    limit = torch.as_tensor(threshold, dtype=v.dtype, device=v.device)
    factor = torch.where(norms > limit, 1 - limit / torch.where(norms == 0, 1.0, norms), 0.0)
    return torch.where(norms.isnan(), norms, factor) * v


def block_scale(norms: Tensor, steps: Tensor, strengths: Tensor) -> Tensor:
    """The block soft threshold where the parts of a group have steps of their own.

    ``norms``: (n, P), ||v_p||_2 of part p of each group. ``steps``: (P,), t_p >= 0; a part of step 0 stays where it is.
    ``strengths``: (n,) or 0-dim. Returns (n, P) float64, what each part is multiplied with in

        argmin_w  sum_p ||w_p - v_p||^2 / (2 t_p) + strength ||w||_2,

    which is w_p = v_p N / (N + strength t_p), where N = ||w||_2 solves
    phi(N) = (sum_p ||v_p||^2 / (N + strength t_p)^2)^(-1/2) = 1, or w = 0 if no N > 0 does. phi rises and is concave,
    so Newton's steps from below never pass the solution; for one step size the first one is exact.

    >>> block_scale(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), torch.tensor([0.5, 0.5]), torch.tensor(2.0)).tolist()
    [[0.8, 0.8], [0.0, 0.0]]
    """
    found, steps = norms.double(), steps.to(norms.device).double()
    largest = found.amax(1, keepdim=True)
    unit = torch.where(largest == 0, 1.0, largest)
    a, c = (found / unit).square(), strengths.to(norms.device).double().view(-1, 1) * steps / unit
    if len(steps) == 1:
        return torch.where(found == 0, 0.0, (1 - c).clamp_min(0.0))
    there = a > 0
    to_zero = (torch.where(there, a / c.square(), 0.0).sum(1) <= 1) | (found == 0).all(1)
    c = torch.where(there, c, 1.0)  # a part without a norm: any number, its factor is not asked for
    n = (a.sqrt() - c).amax(1).clamp_min(0.0)
    whole = a.sum(1).sqrt()
    n = torch.maximum(n, whole - torch.where(there, c, 0.0).amax(1))
    for _ in range(200):
        shifted = n[:, None] + c
        square = torch.where(there, a / shifted.square(), 0.0).sum(1)
        cube = torch.where(there, a / shifted.pow(3), 0.0).sum(1)
        move = torch.where(to_zero, 0.0, (square.sqrt() - 1) * square / cube)  # (1 - phi) / phi'
        n, before = torch.minimum(torch.maximum(n, n + move), whole), n
        if not bool(((n - before) > 1e-15 * n).any()):
            break
    scale = torch.where(there, n[:, None] / (n[:, None] + c), 0.0)
    return torch.where(to_zero[:, None], torch.zeros_like(scale), scale)


@torch.no_grad()
def shrink_(
    family: Family, parameters: Mapping[str, Tensor], strengths: Tensor, steps: Mapping[str, float], least: int = 0
) -> None:
    """The proximal step of sum_g strengths_g ||w_g||_2, in place.

    ``strengths``: (n,). ``steps``: parameter name -> its step; what has none, or 0, is not touched. The ``least``
    groups of the largest norm stay as they are where the step would make them zero.
    """
    each = sorted({steps.get(name, 0.0) for name in family.index})
    if each[-1] == 0:
        return
    part_of = {name: each.index(steps.get(name, 0.0)) for name in family.index}
    norms = []
    for part in range(len(each)):
        of_part = {name: index for name, index in family.index.items() if part_of[name] == part}
        norms.append(group_norms(Family(family.name, of_part, family.n), parameters))
    of_parts = torch.stack([found.to(norms[0].device).double() for found in norms], 1)
    scale = block_scale(of_parts, torch.tensor(each, dtype=torch.float64), strengths)
    if least:
        top = torch.linalg.vector_norm(of_parts, dim=1).topk(min(least, family.n)).indices
        scale[top] = torch.where((scale[top] == 0).all(1, keepdim=True), 1.0, scale[top])
    for name, index in family.index.items():
        if each[part_of[name]] > 0:
            parameter = parameters[name]
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            factor = spread(scale[:, part_of[name]].to(parameter.device, dtype), index.to(parameter.device), 1.0)
            parameter.copy_(parameter * factor) if dtype != parameter.dtype else parameter.mul_(factor)
            parameter.add_(0.0)  # no zero is negative


def effective_steps(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """Parameter name -> how far its optimizer moves it per gradient, in the long run; 0 if it does not move it.

    The learning rate of its parameter group; with a momentum buffer, times what the buffer sums a gradient up to:
    (1 - dampening) / (1 - momentum) for ``SGD``, 1 / (1 - momentum) for ``RMSprop``. For these the fixed point of
    "step, then proximal step" is the minimum of loss plus penalty only with this factor (SGD; RMSprop divides by a
    moving norm of the gradient as well). Others, such as ``Adam``: the learning rate; as their steps have another unit
    than a gradient, so has the strength then. 0: the optimizer does not hold it, or its ``.grad`` is None.

    ConfigurationError with ``maximize=True``: a penalty would then have to be subtracted.

    >>> w = torch.nn.Parameter(torch.ones(1))
    >>> w.grad = torch.ones(1)
    >>> round(effective_steps(SGD([w], lr=0.1, momentum=0.9), {"w": w})["w"], 9)
    1.0
    """
    held: dict[int, float] = {}
    for group in optimizer.param_groups:
        step = _step(optimizer, group)
        held.update((id(p), step) for p in group["params"] if p.grad is not None)
    return {name: held.get(id(parameter), 0.0) for name, parameter in parameters.items()}


def _step(optimizer: Optimizer, group: Mapping[str, Any]) -> float:
    if group.get("maximize"):
        raise ConfigurationError(
            f"{type(optimizer).__name__}(maximize=True): a penalty is minimised; minimise the negative of the objective"
        )
    momentum = float(group.get("momentum") or 0.0)
    step = float(group["lr"])
    if momentum >= 1:
        raise ConfigurationError(f"{type(optimizer).__name__}(momentum={momentum}): gradients are summed up for ever")
    if momentum and isinstance(optimizer, SGD):
        return step * (1 - float(group.get("dampening") or 0.0)) / (1 - momentum)
    return step / (1 - momentum) if isinstance(optimizer, RMSprop) else step
