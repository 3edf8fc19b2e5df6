"""Targets in a search: how they pull in a step, how the architecture keeps them, and what the log says of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..mutables import arch_parameters, decisions
from .budget import SETTLED, Budget, check_targets
from .gradients import add_gradients, weighted_gradients
from .searched import Searched

__all__ = ["Pull", "Targets"]

_SLOWLY = 0.2  # of the learning rate of masks: a unit that is switched on has weights of before it was off


class Pull(NamedTuple):
    """The sum of the prices of a step, and the gradients of the costs at these prices."""

    price: float
    gradients: list[Tensor | None]


@final
class Targets:
    """Cost -> largest value of the exported network; without any, nothing here does anything.

    While the search runs, costs pull as ``Budget`` says. Masks keep the targets after every step from ``SETTLED`` of
    the search on, and move less and less, so that weights are trained in the network that is exported. Choices are
    decided within them, exactly, whenever the network is looked at, and go on from there after each epoch of that part.
    ``progress``: the share of the search that is done.
    """

    def __init__(self, searched: Searched, targets: Mapping[str, float] | None) -> None:
        self.searched = searched
        self.by_cost = check_targets(targets, searched.names)
        self.budget = Budget(self.by_cost)
        self._choices = {id(decision.alpha) for decision in decisions(searched.model).values()}
        self._reach: dict[str, tuple[float, float]] = {}
        self._before: dict[str, float] = {}  # hard costs after the last step, before the targets were kept

    def __bool__(self) -> bool:
        return bool(self.by_cost)

    def check(self) -> None:
        """InfeasibleTargetError unless one architecture meets all of them."""
        self.searched.check_targets(self.by_cost)
        self._reach = self.searched.reachable(self.by_cost) if self else {}

    @property
    def pulls(self) -> bool:
        """Whether any of them can hold a search back: the largest network is above it."""
        return any(name not in self._reach or self._reach[name][1] > t for name, t in self.by_cost.items())

    def are_met(self, costs: Mapping[str, float]) -> bool:
        return all(costs[name] <= target for name, target in self.by_cost.items())

    def prices(self, progress: float) -> dict[str, float]:
        """Cost -> how hard it pulls in this step."""
        if not self:
            return {}
        hard = self.searched.hard(self.by_cost)
        self.budget.begin(hard)
        return self.budget.prices(hard, progress)

    def pull(self, costs: Mapping[str, Tensor], learning: Sequence[nn.Parameter], progress: float) -> Pull | None:
        """How they pull at the architecture in this step; ``add`` adds it to the gradients of the task."""
        if not self or not learning:
            return None
        prices = self.prices(progress)
        slopes = {name: torch.tensor(slope).to(costs[name]) for name, slope in self.budget.slopes(prices).items()}
        gradients = weighted_gradients({name: costs[name] for name in slopes}, slopes, learning)
        return Pull(sum(prices.values()), gradients)

    def add(self, pull: Pull, learning: Sequence[nn.Parameter], task: float) -> Tensor:
        """Add a pull to the gradients of the task, which are there, in proportion to their size; its share of both.

        ``task``: the L1 norm of these, the same in all processes.
        """
        self.budget.saw(task)
        norm = sum(float(g.abs().sum()) for g in pull.gradients if g is not None)
        scale = pull.price * (self.budget.task_gradient or 1.0) / norm if norm else 0.0
        return add_gradients(learning, [None if g is None else g * scale for g in pull.gradients])

    def settle(self, optimizer: Optimizer, lrs: Sequence[float], progress: float) -> None:
        """Before a step: the learning rates of masks that keep the targets go from a fifth to 0."""
        if not self.pulls or not self.searched.has_masks:
            return
        left = 1.0 if progress < SETTLED else _SLOWLY * (1.0 - progress) / (1.0 - SETTLED)
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            if not all(id(p) in self._choices for p in group["params"]):
                group["lr"] = lr * left

    def after_step(self, progress: float, *, steps: float) -> None:
        """After one step of the architecture, of ``steps``: move the multipliers, and masks to what is allowed."""
        if not self:
            return
        self._before = self.searched.hard(self.by_cost)
        self.budget.update(self._before, progress, steps=steps)
        if self.searched.has_masks and progress >= SETTLED:
            self._keep()
        elif self.budget.bound:
            self.searched.lift_masks_(self.budget.limits(progress))

    def after_epoch(self, progress: float) -> None:
        """After an epoch of the search: in its last part, go on with choices that are within the targets.

        So that the weights of what will be exported are the ones that are trained most.
        """
        if self and not self.searched.has_masks and progress >= SETTLED:
            self._keep()

    def forget_step(self) -> None:
        """A phase begins in which the architecture stays."""
        self._before = {}

    @contextmanager
    def kept(self, progress: float) -> Iterator[None]:
        """Inside, the architecture meets the targets: choices always, masks from where the search keeps them."""
        if not self or (self.searched.has_masks and progress < SETTLED):
            yield
            return
        before = [(alpha, alpha.detach().clone()) for alpha in arch_parameters(self.searched.model)]
        try:
            self._keep()
            yield
        finally:
            with torch.no_grad():
                for alpha, value in before:
                    alpha.copy_(value)

    def _keep(self) -> None:
        self.searched.keep_targets_(self.by_cost, fills=bool(self.budget.bound))

    def values(self, before: Mapping[str, float]) -> dict[str, float]:
        """For the log: target, hard cost now and, if no step was made, ``before`` the targets were kept, multiplier."""
        found = {}
        for name, hard in self.searched.hard(self.by_cost).items() if self else ():
            found[f"{name}_target"], found[f"{name}_hard"] = self.by_cost[name], hard
            found[f"{name}_unprojected"] = self._before.get(name, before[name])
            found[f"{name}_multiplier"] = self.budget.multipliers[name]
        return found

    def state_dict(self) -> dict[str, Any]:
        return {**self.budget.state_dict(), "before": dict(self._before)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.budget.load_state_dict(state)
        self._before = dict(state["before"])
