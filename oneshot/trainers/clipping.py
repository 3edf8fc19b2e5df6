"""Gradient clipping of each group of parameters by its own norm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from ..errors import ConfigurationError

__all__ = ["GradientClip"]

_KINDS = ("weights", "arch")


@final
class GradientClip:
    """Largest L2 norms of gradients: of the weights, and of the architecture's parameters.

    Each parameter group of an optimizer is clipped by its own norm. One norm over all would be that of the weights:
    next to 1,000 weights with gradient 1, a mask's 0.1 would come down to 0.003.

    ``limits``: one number for the weights, or a mapping with ``'weights'``, ``'arch'`` or both; None: no limit.
    """

    def __init__(self, limits: float | Mapping[str, float] | None) -> None:
        self.limits = dict(limits) if isinstance(limits, Mapping) else {} if limits is None else {"weights": limits}
        for kind, limit in self.limits.items():
            is_number = isinstance(limit, int | float) and not isinstance(limit, bool)
            if kind not in _KINDS or not is_number or not (limit > 0 and math.isfinite(limit)):
                raise ConfigurationError(
                    f"grad_clip={limits!r}: a number above 0, or a mapping of such with the keys {list(_KINDS)}"
                )

    def __call__(self, optimizer: Optimizer, kind: str) -> None:
        """Clip what this optimizer, of ``kind``, is about to step with."""
        if kind not in self.limits:
            return
        for group in optimizer.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                clip_grad_norm_(parameters, self.limits[kind])
