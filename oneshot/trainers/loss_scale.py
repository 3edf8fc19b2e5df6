"""Loss scaling, without which small gradients are zeros in float16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["LossScale"]


@final
class LossScale:
    """A GradScaler, of precision '16-mixed'; without one nothing is done.

    The loss is multiplied by S before the backward pass and the gradients divided by it afterwards (Micikevicius et
    al., arXiv 1710.03740, section 3.2). If one is infinite the step is left out and S halved; after 2,000 good steps
    S is doubled.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        self.scaler = scaler

    def unscale_(self, optimizers: Sequence[Optimizer]) -> bool:
        """Bring the gradients of these optimizers back to scale; False, and all of them are gone, if they overflow."""
        if self.scaler is None:
            return True
        gradients: list[Tensor] = []
        for optimizer in optimizers:
            of_one = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if of_one:
                self.scaler.unscale_(optimizer)
                gradients += of_one
        if not gradients:
            return True
        are_finite = bool(torch.isfinite(torch.stack([g.abs().sum().float() for g in gradients])).all())
        self.scaler.update()
        if not are_finite:
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
        return are_finite

    def state_dict(self) -> dict[str, Any] | None:
        return None if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        if self.scaler is not None and state is not None:
            self.scaler.load_state_dict(dict(state))
