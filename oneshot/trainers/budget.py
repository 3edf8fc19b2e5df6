"""Targets that the exported network meets: how hard costs pull in a search, found by dual ascent."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any, final

from ..errors import ConfigurationError

__all__ = ["SETTLED", "Budget", "check_targets"]

SETTLED = 0.6  # of a search: from then on masks keep their targets after every step
_GRADUAL = 0.5  # of a search: so long the limits come down to the targets
_RATE = 20.0  # of a multiplier in a whole search, for a cost at twice its limit
_QUADRATIC = 1.0  # rho, of the augmented Lagrangian
_MOST = 100.0  # a multiplier: a hundred times as hard as the task
_MEMORY = 0.9  # of the size of the task's gradient


@final
class Budget:
    """min CE(w, a) subject to C_k(a) <= T_k, for every target k, by the method of multipliers.

    With the violation g_k = C_k / L_k - 1 of the network that would be exported now, an inequality of the augmented
    Lagrangian (1 / 2 rho) sum_k (max(0, mu_k + rho g_k)^2 - mu_k^2) has the price

        p_k = max(0, mu_k + rho g_k),        and after each step    mu_k <- max(0, mu_k + eta g_k)

    (Hestenes 1969; Rockafellar, Math. Programming 5, 1973, eq. 4). The gradient of the architecture is that of the
    task and, P = sum_k p_k times as large in the L1 norm, that of sum_k p_k C_k / T_k: a price of 1 means that costs
    and task pull alike, whatever their scales are.

    In the first half of the search, t in [0, 1], the limit L_k comes down from the cost C_k(0) that it ``begin``s with
    to T_k, L_k = T_k (C_k(0) / T_k)^(1 - 2 t); then it is T_k. eta = 20 / steps of the search.

    >>> budget = Budget({"params": 100.0})
    >>> budget.update({"params": 150.0}, 0.0, steps=40)  # g = 0.5, eta = 0.5
    >>> budget.multipliers, budget.prices({"params": 150.0}, 0.0)  # 0.25 + 1 * 0.5
    ({'params': 0.25}, {'params': 0.75})
    """

    def __init__(self, targets: Mapping[str, float]) -> None:
        self.targets = dict(targets)
        self.multipliers = dict.fromkeys(self.targets, 0.0)
        self.first: dict[str, float] = {}
        self.task_gradient: float | None = None
        self.bound: set[str] = set()  # the targets that have ever held the search back

    def limits(self, progress: float) -> dict[str, float]:
        """L_k after this share of the search."""
        left = max(0.0, 1.0 - progress / _GRADUAL)
        found = {}
        for name, target in self.targets.items():
            ratio = self.first.get(name, target) / target if target > 0 else 1.0
            found[name] = target * max(ratio, 1.0) ** left
        return found

    def violations(self, hard: Mapping[str, float], progress: float) -> dict[str, float]:
        """g_k; a target of 0 is violated by 1, or not."""
        limits = self.limits(progress)
        return {k: hard[k] / limit - 1 if limit > 0 else float(hard[k] > 0) for k, limit in limits.items()}

    def prices(self, hard: Mapping[str, float], progress: float) -> dict[str, float]:
        """p_k, at the costs of the network that would be exported now."""
        g = self.violations(hard, progress)
        return {name: max(0.0, mu + _QUADRATIC * g[name]) for name, mu in self.multipliers.items()}

    def slopes(self, prices: Mapping[str, float]) -> dict[str, float]:
        """Of sum_k p_k C_k / T_k, by each cost."""
        return {name: price / (self.targets[name] or 1.0) for name, price in prices.items()}

    def begin(self, hard: Mapping[str, float]) -> None:
        """Take the costs of the first step of a search."""
        if not self.first:
            self.first = {name: float(hard[name]) for name in self.targets}

    def update(self, hard: Mapping[str, float], progress: float, *, steps: float) -> None:
        """Move the multipliers after a step of ``steps``; ``hard``: costs before any projection."""
        for name, g in self.violations(hard, progress).items():
            self.multipliers[name] = min(max(0.0, self.multipliers[name] + _RATE / steps * g), _MOST)
            if self.multipliers[name] > 0:
                self.bound.add(name)

    def saw(self, task_gradient: float) -> None:
        """Take the L1 norm of the task's gradient, averaged over about ten steps."""
        if math.isfinite(task_gradient):
            before = task_gradient if self.task_gradient is None else self.task_gradient
            self.task_gradient = _MEMORY * before + (1 - _MEMORY) * task_gradient

    def state_dict(self) -> dict[str, Any]:
        return {
            "multipliers": dict(self.multipliers),
            "first": dict(self.first),
            "task_gradient": self.task_gradient,
            "bound": sorted(self.bound),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.multipliers, self.first = dict(state["multipliers"]), dict(state["first"])
        self.task_gradient, self.bound = state["task_gradient"], set(state["bound"])


def check_targets(targets: Mapping[str, float] | None, known: Collection[str]) -> dict[str, float]:
    """The targets as numbers; ConfigurationError for one that is none, or of no cost of the run."""
    if targets is not None and not isinstance(targets, Mapping):
        raise ConfigurationError(f"targets={targets!r}: a mapping is needed, such as {{'params': 20_000}}")
    for name, target in (targets or {}).items():
        if name not in known:
            raise ConfigurationError(f"targets: unknown costs {[name]}; the costs of this run are {list(known)}")
        is_number = isinstance(target, Real) and not isinstance(target, bool)
        if not is_number or not math.isfinite(target) or target < 0:
            raise ConfigurationError(f"targets: {name} {target!r}; a finite number of at least 0 is needed")
    return {name: float(target) for name, target in (targets or {}).items()}
