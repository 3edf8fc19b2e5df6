"""What a network pays for its costs in a search: in proportion to each, or to what it is above its target."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import final

import torch
from torch import Tensor

from ..errors import ConfigurationError, InfeasibleTargetError

__all__ = ["Penalty"]


@final
class Penalty:
    """sum_k s_k C_k / N_k, or, for a cost with a target T_k, s_k max(0, C_k - T_k) / N_k.

    Args:
        strength: s_k in loss per unit of the cost, at least 0: one number for all costs (only for those with a target,
            if there are targets), or cost -> number, and a cost that is not named is not paid for.
        targets: cost -> T_k. InfeasibleTargetError for one below what can be reached.
        normalize: N_k is the largest cost, that of the whole network; else 1.
        reachable: cost -> (smallest, largest) one; or the names of the costs, if ``refer_to`` is called later.

    >>> pay = Penalty({"macs": 0.5}, {"macs": 80.0}, False, {"macs": (10.0, 100.0), "params": (2.0, 9.0)})
    >>> pay({"macs": torch.tensor(90.0), "params": torch.tensor(9.0)})  # 0.5 * (90 - 80)
    tensor(5.)
    """

    def __init__(
        self,
        strength: float | Mapping[str, float],
        targets: Mapping[str, float] | None,
        normalize: bool,
        reachable: Mapping[str, tuple[float, float]] | Collection[str],
    ) -> None:
        self.targets = {name: float(target) for name, target in _named("targets", targets or {}, reachable).items()}
        if isinstance(strength, Mapping):
            self.strength = _named("strength", strength, reachable)
        else:
            self.strength = _named("strength", dict.fromkeys(self.targets or reachable, strength), reachable)
        self.normalize = normalize
        self.full: dict[str, float] = {}
        if isinstance(reachable, Mapping):
            self.refer_to(reachable)

    @property
    def needed(self) -> tuple[str, ...]:
        """The costs of which ``refer_to`` has to know the largest value."""
        return tuple(dict.fromkeys([*self.targets, *(self.strength if self.normalize else ())]))

    def refer_to(self, reachable: Mapping[str, tuple[float, float]]) -> None:
        """Take over the largest costs; ConfigurationError for one that cannot be divided by."""
        for name, target in self.targets.items():
            low, high = reachable[name]
            if target < low:
                raise InfeasibleTargetError(
                    f"targets: {name} {target:g}, but the smallest network has {low:g} and the largest {high:g}. Give "
                    f"a target of at least {low:g}, or search more of the network"
                )
        self.full = {name: high for name, (_, high) in reachable.items()}
        if self.normalize and not all(self.full[name] > 0 for name in self.strength):
            raise ConfigurationError(f"normalize=True: the costs of the whole network are {self.full}, one is 0")

    @property
    def pulls(self) -> bool:
        """Whether any cost can ever pull: it has a strength, and no target that the largest network meets."""
        return any(
            s > 0 and self.targets.get(k, -math.inf) < self.full.get(k, math.inf) for k, s in self.strength.items()
        )

    def __call__(self, costs: Mapping[str, Tensor]) -> Tensor:
        """The penalty; ``costs``: cost -> 0-dim tensor."""
        terms = []
        for name, strength in self.strength.items():
            cost = costs[name]
            if name in self.targets:
                cost = torch.relu(cost - self.targets[name])
            terms.append(strength / (self.full[name] if self.normalize else 1.0) * cost)
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def is_met(self, costs: Mapping[str, float]) -> bool:
        """Whether these costs keep all targets."""
        return all(costs[name] <= target for name, target in self.targets.items())


def _named(argument: str, given: Mapping[str, float], reachable: Collection[str]) -> dict[str, float]:
    unknown = [name for name in given if name not in reachable]
    if unknown:
        raise ConfigurationError(f"{argument}: unknown costs {unknown}; the network has {list(reachable)}")
    for name, number in given.items():
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not math.isfinite(number) or number < 0:
            raise ConfigurationError(f"{argument}: {name} {number!r}; a finite number of at least 0 is needed")
    return dict(given)
