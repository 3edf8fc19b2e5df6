"""Searching masks, the channels, kernels and dilations of a ``PIT`` network, and the choices of such a network."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from ..errors import ConfigurationError, InfeasibleTargetError
from ..export import verified_fixed
from ..graph import evaluated
from ..graph.cut import copied
from ..mutables import Argmax, Softmax, arch_parameters
from ..pit.drop import drop_
from ..pit.network import SearchedNetwork
from ..pit.shrink import shrink_
from ..pit.smaller import remove_, removed
from .costs import CostSources
from .meters import mean_entropy
from .modes import batch_statistics
from .searched import Searched

__all__ = ["ArchOptimizer", "MaskedCost", "Masks", "flips", "masks_without_decay"]

ArchOptimizer = Callable[[list[nn.Parameter]], Optimizer]


@final
@dataclass(frozen=True)
class MaskedCost:
    """One cost of the networks that a network under search can become."""

    network: SearchedNetwork
    name: str
    unit: str

    def of(self, arch: Mapping[str, Any], /) -> float:
        """The cost of the network that is exported for ``arch``."""
        if self.name not in self.network.cost_names:
            return float(sum(p.numel() for p in self.network.rebuilt(arch, None).parameters()))
        if arch == self.network.arch():
            return self.network.hard_cost(self.name)
        other = copied(self.network)
        assert isinstance(other, SearchedNetwork)
        other.decide(arch)
        return other.hard_cost(self.name)


@final
class Masks(Searched):
    """The masks of a network under search, and its choices if it has some, with its costs.

    ``train_selection``: whether the alphas of choices learn.
    """

    def __init__(self, network: SearchedNetwork, *, train_selection: bool = True) -> None:
        super().__init__(network, CostSources(None, None))
        self.network, self.train_selection = network, train_selection
        self.follow_model()

    def follow_model(self) -> None:
        alphas = {id(d.alpha) for d in self.network.choices.values()}
        self._alphas = [p for p in arch_parameters(self.network) if id(p) in alphas]
        self._masks = [p for p in arch_parameters(self.network) if id(p) not in alphas]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.network.cost_names)

    def fingerprint(self) -> dict[str, str]:
        found = self.network.reachable_costs()
        return {
            name: f"{low:.17g} to {high:.17g} {self.network.cost_unit(name)}" for name, (low, high) in found.items()
        }

    def cost_model(self, name: str) -> MaskedCost:
        if name not in self.names and name != "params":
            raise ConfigurationError(f"cost {name!r}: this network has {list(self.names)}; give it to PIT(cost=...)")
        return MaskedCost(self.network, name, self.network.cost_unit(name) if name in self.names else "parameters")

    def example(self) -> tuple[Any, ...]:
        like = next(self.network.parameters())
        weight = next((p for p in self.network.network.parameters() if p.is_floating_point()), like)

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(weight) if tensor.is_floating_point() else tensor.to(weight.device)

        found: tuple[Any, ...] = pytree.tree_map_only(Tensor, moved, self.network.example)
        return found

    def check_export(self, examples: Sequence[Sequence[Any]]) -> None:
        # Every group has been cut once, when the network was converted.
        verified_fixed(self.network, self.network.arch(), examples)

    @contextmanager
    def as_found(self, *, settled: bool = False) -> Iterator[None]:
        if not self.network.choices:
            with evaluated(self.network):
                yield
            return
        # The running statistics of a supernet mix all its paths.
        with evaluated(self.network, Argmax()), nullcontext() if settled else batch_statistics(self.network):
            yield

    def decide(self, budget: Mapping[str, float] | None) -> dict[str, Any]:
        if budget and not self.network.choices:
            raise ConfigurationError(
                f"budget={dict(budget)}: masks are trained towards targets, and none is switched off afterwards; give "
                "targets={...} to the trainer"
            )
        return self.network.arch_within(budget or {})

    def numbers(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, float]:
        with torch.no_grad():
            live = float(self.network.masks().hard[:-1].sum())  # the last element stands for what has no mask
        masked = {label: decision for label, decision in now.items() if label not in self.network.choices}
        changed = sum(now[label] != before[label] for label in now)
        entropy = {"entropy": mean_entropy(self.network.choices)} if self.network.choices else {}
        return {"live": live, "flips": flips(before, masked), "changed": changed, **entropy}

    def soft_and_hard(self) -> dict[str, tuple[float, float]]:
        network = self.network
        with evaluated(network, Softmax()):
            return {name: (float(network.soft_cost(name)), cost) for name, cost in network.hard_costs().items()}

    def shares(self) -> dict[str, list[float]]:
        masks = {label: mask.alpha.detach().abs().clamp(max=1).tolist() for label, mask in self.network.masks.items()}
        return masks | {label: d.alpha.detach().softmax(0).tolist() for label, d in self.network.choices.items()}

    def learning(self, pulls: bool) -> list[nn.Parameter]:
        # Without a cost that pulls, the task alone would also switch units off, and buy nothing with it.
        trained = [*(self._masks if pulls else ()), *(self._alphas if self.train_selection else ())]
        return [p for p in trained if p.requires_grad]

    def step_costs(self) -> dict[str, Tensor]:
        return self.network.costs()

    @torch.no_grad()
    def uniform_costs(self) -> dict[str, Tensor]:
        choices = self.network.choices
        uniform = {k: torch.full((len(d.options),), 1 / len(d.options)) for k, d in choices.items()}
        return self.network.costs_under(uniform)

    def unit(self, name: str) -> str:
        return self.network.cost_unit(name)

    def reachable(self, names: Collection[str]) -> dict[str, tuple[float, float]]:
        return self.network.reachable_costs()

    def check_targets(self, targets: Mapping[str, float]) -> None:
        found = self.network.reachable_costs() if targets else {}
        for name, target in targets.items():
            low, high = found[name]
            if target < low:
                raise InfeasibleTargetError(
                    f"targets: {name} {target:g}, but the smallest masks leave {low:g} of {high:g}. Give a target of "
                    f"at least {low:g}, or let PIT search more of the network"
                )
        if targets and self.network.choices:
            self.network.check_reachable(targets)  # all at once

    def hard(self, names: Collection[str]) -> dict[str, float]:
        found = self.network.hard_costs()
        return {name: found[name] for name in names}

    def keep_targets_(self, targets: Mapping[str, float], *, fills: bool) -> None:
        with ExitStack() as stack:
            for alpha in self._alphas if not self.train_selection else ():
                stack.callback(alpha.requires_grad_, alpha.requires_grad)
                alpha.requires_grad_(False)  # it stays as it is
            self.network.keep_targets_(targets, fills=fills)

    def shrink_(
        self,
        optimizers: Sequence[Optimizer],
        followers: Sequence[MutableMapping[str, Tensor]],
        archs: Sequence[Mapping[str, Any]],
    ) -> int:
        gone: dict[str, list[Any]] = {}
        if self.network.choices and self.train_selection:
            gone = drop_(self.network, optimizers=optimizers, followers=followers, archs=archs)
        counts = shrink_(self.network, optimizers, followers, archs)
        return sum(counts.values()) + sum(len(candidates) for candidates in gone.values())

    def removed(self) -> dict[str, Any]:
        return removed(self.network)

    def remove_(self, model: nn.Module, removed: Mapping[str, Any], optimizers: Sequence[Optimizer]) -> None:
        assert isinstance(model, SearchedNetwork)
        remove_(model, removed, optimizers)

    def lift_masks_(self, limits: Mapping[str, float]) -> None:
        self.network.lift_masks_(limits)

    @property
    def has_masks(self) -> bool:
        return len(self.network.masks) > 0

    def idle(self) -> list[nn.Parameter]:
        return self.network.idle_masks() if self.network.choices else []

    def clip_(self) -> None:
        self.network.masks.clip_()


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


def masks_without_decay(network: SearchedNetwork, arch_optimizer: ArchOptimizer) -> ArchOptimizer:
    """The same function, but ConfigurationError for an optimizer with weight decay of a mask."""
    masks = {id(parameter) for parameter in network.masks.parameters()}

    def checked(parameters: list[nn.Parameter]) -> Optimizer:
        optimizer = arch_optimizer(parameters)
        for group in optimizer.param_groups:
            if group.get("weight_decay") and any(id(parameter) in masks for parameter in group["params"]):
                raise ConfigurationError(
                    "arch_optimizer: weight decay switches masks off by itself; set weight_decay=0"
                )
        return optimizer

    return checked
