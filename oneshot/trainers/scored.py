"""Choices that are decided by scores: the best architecture that was evaluated, and not the most probable one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, final

from torch import Tensor, nn

from ..cost import Cost, LatencyTable, cost_range
from ..errors import InfeasibleTargetError
from .choices import Choices
from .feasible import Candidate, best_of, check_limits
from .meters import soft_and_hard
from .searched import Searched

__all__ = ["ScoredChoices"]


@final
class ScoredChoices(Searched):
    """``choices``, decided for the best of ``candidates`` as soon as there are any.

    ``limits``: hard ones, whose costs are followed too. ``prepare``: called with every architecture that is decided
    for, before it is exported.
    """

    def __init__(
        self,
        choices: Choices,
        limits: Mapping[str, float],
        candidates: Callable[[], Sequence[Candidate]],
        prepare: Callable[[Mapping[str, int]], None],
    ) -> None:
        super().__init__(choices.model, choices.costs)
        self.choices, self.limits = choices, dict(limits)
        self._candidates, self._prepare = candidates, prepare

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.choices.names, *self.limits)))

    def fingerprint(self) -> dict[str, str]:
        return self.choices.fingerprint()

    def cost_model(self, name: str) -> Cost:
        return self.choices.cost_model(name)

    def take_table(self, table: LatencyTable) -> None:
        self.choices.take_table(table)

    def example(self) -> tuple[Any, ...]:
        return self.choices.example()

    def check_export(self, examples: Sequence[Sequence[Any]]) -> None:
        self.choices.check_export(examples)

    def as_found(self, *, settled: bool = False) -> AbstractContextManager[None]:
        return self.choices.as_found(settled=settled)

    def decide(self, budget: Mapping[str, float] | None) -> dict[str, int]:
        """The best candidate within ``budget``; before there are any, argmax within the limits, which says nothing."""
        check_limits(budget or {}, "budget")
        candidates = self._candidates()
        if not candidates:
            found = self.choices.decide(budget or self.limits)
        else:
            found = self._best_within(candidates, budget) if budget else self.choices.decide(None)
        self._prepare(found)
        return found

    def _best_within(self, candidates: Sequence[Candidate], budget: Mapping[str, float]) -> dict[str, int]:
        costs = {name: self.cost_model(name) for name in budget}
        within = [c for c in candidates if all(costs[name].of(c.choices) <= budget[name] for name in budget)]
        best = best_of(within)
        if best is not None:
            return dict(best.choices)
        lines = [f"none of the {len(candidates)} evaluated architectures meets {dict(budget)}:"]
        for name, cost in costs.items():
            lowest, (low, high) = min(cost.of(c.choices) for c in candidates), cost_range(cost)
            lines.append(f"  {name}: lowest evaluated {lowest:.15g}, reachable {low:.15g} to {high:.15g} {cost.unit}")
        raise InfeasibleTargetError("\n".join([*lines, "raise the budget, or search with these limits"]))

    def numbers(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, float]:
        return self.choices.numbers(before, now)

    def soft_and_hard(self) -> dict[str, tuple[float, float]]:
        return {name: soft_and_hard(self.cost_model(name), self.choices.decisions) for name in self.names}

    def shares(self) -> dict[str, list[float]]:
        return self.choices.shares()

    def learning(self, pulls: bool) -> list[nn.Parameter]:
        return []  # the evolution writes the alphas

    def step_costs(self) -> dict[str, Tensor]:
        return self.choices.step_costs()

    def uniform_costs(self) -> dict[str, Tensor]:
        return self.choices.uniform_costs()

    def unit(self, name: str) -> str:
        return self.cost_model(name).unit

    def reachable(self, names: Collection[str]) -> dict[str, tuple[float, float]]:
        return self.choices.reachable(names)

    def hard(self, names: Collection[str]) -> dict[str, float]:
        return self.choices.hard(names)

    def keep_targets_(self, targets: Mapping[str, float], *, fills: bool) -> None:
        """Nothing: what is scored keeps the limits."""

    @property
    def has_masks(self) -> bool:
        return False

    def check_targets(self, targets: Mapping[str, float]) -> None:
        self.choices.check_targets(targets)
