"""Searching masks: the channels, kernels and dilations of a ``PIT`` network."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import ConfigurationError
from ..export import verified_fixed
from ..graph import evaluated
from ..pit import PIT
from .costs import CostSources
from .searched import Searched

__all__ = ["MaskedCost", "Masks", "flips"]


@final
@dataclass(frozen=True)
class MaskedCost:
    """One cost of the networks that a ``PIT`` network can become."""

    pit: PIT
    name: str
    unit: str

    def of(self, arch: Mapping[str, Any], /) -> float:
        """The cost of the network that is exported for ``arch``."""
        if self.name not in self.pit.cost_names:
            return float(sum(p.numel() for p in self.pit.rebuilt(arch, None).parameters()))
        return self._of_now(self.pit if arch == self.pit.arch() else _decided(self.pit, arch))

    @torch.no_grad()
    def _of_now(self, pit: PIT) -> float:
        return float(pit.get_cost(self.name))


@final
class Masks(Searched):
    """The masks of a ``PIT`` network, with its costs."""

    def __init__(self, pit: PIT) -> None:
        super().__init__(pit, CostSources(None, None))
        self.pit = pit

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.pit.cost_names)

    def fingerprint(self) -> dict[str, str]:
        found = self.pit.reachable_costs()
        return {name: f"{low:.17g} to {high:.17g} {self.pit.cost_unit(name)}" for name, (low, high) in found.items()}

    def cost_model(self, name: str) -> MaskedCost:
        if name not in self.names and name != "params":
            raise ConfigurationError(f"cost {name!r}: this network has {list(self.names)}; give it to PIT(cost=...)")
        return MaskedCost(self.pit, name, self.pit.cost_unit(name) if name in self.names else "parameters")

    def example(self) -> tuple[Any, ...]:
        like = next(self.pit.parameters())
        weight = next((p for p in self.pit.network.parameters() if p.is_floating_point()), like)

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(weight) if tensor.is_floating_point() else tensor.to(weight.device)

        found: tuple[Any, ...] = pytree.tree_map_only(Tensor, moved, self.pit.example)
        return found

    def check_export(self, examples: Sequence[Sequence[Any]]) -> None:
        # Every group has been cut once, when the network was converted.
        verified_fixed(self.pit, self.pit.arch(), examples)

    @contextmanager
    def as_found(self) -> Iterator[None]:
        with evaluated(self.pit):
            yield

    def decide(self, budget: Mapping[str, float] | None) -> dict[str, Any]:
        if budget:
            raise ConfigurationError(
                f"budget={dict(budget)}: masks are trained towards targets, and none is switched off afterwards; give "
                "targets={...} to the trainer"
            )
        return self.pit.arch()

    def numbers(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, float]:
        with torch.no_grad():
            live = float(self.pit.masks().hard[:-1].sum())  # the last element stands for what has no mask
        return {"live": live, "flips": flips(before, now), "changed": sum(now[label] != before[label] for label in now)}

    @torch.no_grad()
    def soft_and_hard(self) -> dict[str, tuple[float, float]]:
        hard = self.pit.costs()
        return {name: (float(self.pit.soft_cost(name)), float(cost)) for name, cost in hard.items()}

    def shares(self) -> dict[str, list[float]]:
        return {label: mask.alpha.detach().abs().clamp(max=1).tolist() for label, mask in self.pit.masks.items()}


def flips(before: Mapping[str, Any], now: Mapping[str, Any]) -> int:
    """How many units, taps and dilations are decided otherwise in another architecture.

    >>> flips({"conv": [0, 1, 3], "kernel": 5, "dilation": 2}, {"conv": [0, 2, 3], "kernel": 2, "dilation": 1})
    6
    """
    total = 0
    for label, decision in now.items():
        if isinstance(decision, list):
            total += len(set(decision) ^ set(before[label]))
        else:
            total += abs(decision - before[label])
    return total


def _decided(pit: PIT, arch: Mapping[str, Any]) -> PIT:
    other = copy.deepcopy(pit)
    other.decide(arch)
    return other
