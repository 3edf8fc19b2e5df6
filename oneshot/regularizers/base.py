"""What all regularizers are: a term of the loss, and perhaps a step of their own after the optimizer's."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import CheckpointError, ConfigurationError
from .schedule import Schedule

__all__ = ["Regularizer", "Sum", "check_strength", "gradient_share"]


class Regularizer(ABC):
    """``reg(model, epoch=None, n_epochs=None)``: what is added to the loss, 0-dim, differentiable.

    Regularizers add up: ``reg_a + reg_b`` is one. ``schedule`` says in which epochs it acts; without an epoch it acts
    in full. ``last``: name -> value of its terms at the last call, for a log.

    ``of``: whether it reads the costs of an architecture or the weights. One of weights may work by proximal steps:
    then its value has no gradient, and ``attach(model, optimizer)`` is called once before the loop.
    """

    of: Literal["costs", "weights"]

    def __init__(self, schedule: Schedule | None) -> None:
        self.schedule = schedule or Schedule()
        self.last: dict[str, float] = {}

    @final
    def __call__(self, model: Any, epoch: int | None = None, n_epochs: int | None = None) -> Tensor:
        terms = self.terms(model, epoch, n_epochs)
        self.last = {name: float(term.detach()) for name, term in terms.items()}
        return torch.stack(list(terms.values())).sum()

    @abstractmethod
    def terms(self, model: Any, epoch: int | None = None, n_epochs: int | None = None) -> dict[str, Tensor]:
        """Name -> 0-dim term, at least one; the value of a call is their sum."""

    @abstractmethod
    def check(self, model: Any) -> None:
        """ConfigurationError or InfeasibleTargetError, before any training, for what cannot work on this model."""

    @property
    @abstractmethod
    def pulls(self) -> bool:
        """Whether it can ever change anything: one of strength 0 cannot."""

    @property
    def parts(self) -> tuple[Regularizer, ...]:
        """The regularizers that this one is the sum of."""
        return (self,)

    def calibrate(self, model: Any, closure: Callable[[], Tensor]) -> Mapping[str, float]:
        """Take from the loss, which ``closure`` computes, what a strength is relative to; nothing if it is not."""
        return {}

    def attach(self, model: Any, optimizer: Optimizer) -> None:
        """Follow the steps of an optimizer, if there is something to do after them."""

    def detach(self, optimizer: Optimizer | None = None) -> None:
        """Follow this optimizer no more; None: no optimizer."""

    def settings(self) -> dict[str, Any]:
        """What it is, as plain data: a run is taken up again with the same one only."""
        return {"kind": type(self).__name__, "schedule": str(self.schedule)}

    def state_dict(self) -> dict[str, Any]:
        """What it has learnt so far, as plain data."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""

    @final
    def __add__(self, other: Regularizer) -> Sum:
        if not isinstance(other, Regularizer):
            return NotImplemented
        return Sum((*self.parts, *other.parts))


@final
class Sum(Regularizer):
    """Several regularizers in one. Terms of the same name are numbered."""

    def __init__(self, parts: Sequence[Regularizer]) -> None:
        super().__init__(None)
        self._parts = tuple(parts)

    @property
    def parts(self) -> tuple[Regularizer, ...]:
        return self._parts

    def terms(self, model: Any, epoch: int | None = None, n_epochs: int | None = None) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for part in self._parts:
            for name, term in part.terms(model, epoch, n_epochs).items():
                numbers = (f"{name}_{i}" for i in range(2, len(self._parts) + 1))
                found[name if name not in found else next(n for n in numbers if n not in found)] = term
        return found

    def check(self, model: Any) -> None:
        for part in self._parts:
            part.check(model)

    @property
    def pulls(self) -> bool:
        return any(part.pulls for part in self._parts)

    def calibrate(self, model: Any, closure: Callable[[], Tensor]) -> Mapping[str, float]:
        return {name: value for part in self._parts for name, value in part.calibrate(model, closure).items()}

    def attach(self, model: Any, optimizer: Optimizer) -> None:
        with ExitStack() as undone:
            for part in self._parts:
                part.attach(model, optimizer)
                undone.callback(part.detach, optimizer)
            undone.pop_all()

    def detach(self, optimizer: Optimizer | None = None) -> None:
        for part in self._parts:
            part.detach(optimizer)

    def settings(self) -> dict[str, Any]:
        return {"kind": "Sum", "parts": [part.settings() for part in self._parts]}

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if len(state.get("parts", ())) != len(self._parts):
            raise CheckpointError(f"state of {len(state.get('parts', ()))} regularizers, here are {len(self._parts)}")
        for part, of_part in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(of_part)


def gradient_share(task: Tensor, term: Tensor, parameters: Sequence[Tensor]) -> float:
    """The share of ``term`` in the gradient: |grad term|_1 / (|grad task|_1 + |grad term|_1), in [0, 1].

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> round(gradient_share((3 * w).sum(), w.sum(), [w]), 6)  # 2 / (6 + 2)
    0.25
    """
    norms = []
    for value in (task, term):
        found: Sequence[Tensor | None] = ()
        if value.requires_grad:
            found = torch.autograd.grad(value, list(parameters), retain_graph=True, allow_unused=True)
        norms.append(sum(float(g.abs().sum()) for g in found if g is not None))
    return norms[1] / (norms[0] + norms[1]) if sum(norms) else 0.0


def check_strength(what: str, value: object) -> float:
    """The number; ConfigurationError unless it is finite and at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ConfigurationError(f"{what}={value!r}: a finite number of at least 0 is needed")
    return float(value)
