"""Searching choices: LayerChoice, InputChoice and Repeat, by their alphas."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..cost import Cost, CostModel, LatencyTable, best_under_budget
from ..cost.decode import cost_range
from ..errors import UnsupportedModelError
from ..export import argmax_choices
from ..export.dropping import drop_candidates_, dropped_candidates, narrowing, remove_candidates_
from ..graph import evaluated
from ..mutables import Argmax, arch_parameters, decisions
from ..mutables.base import SearchModel
from ..mutables.samplers import first_argmax
from ..pit.selection import choose_, fixed_options
from .checks import check_export
from .costs import CostSources
from .meters import mean_entropy, soft_and_hard
from .modes import batch_statistics
from .searched import Searched

__all__ = ["Choices"]


@final
class Choices(Searched):
    """The decisions of ``model``; costs are counted for an input of shape ``dummy_input``.

    ``measure``: from the name of a runtime to a latency table of this machine. ``train_selection``: whether the alphas
    learn. UnsupportedModelError for a model without a choice.
    """

    def __init__(
        self,
        model: nn.Module,
        costs: CostSources,
        dummy_input: Sequence[int],
        measure: Callable[[str], LatencyTable],
        *,
        train_selection: bool = True,
    ) -> None:
        super().__init__(model, costs)
        if isinstance(model, SearchModel):
            found = "choices and costs of its own" if decisions(model) else "masks and no choices"
            trainer = "PITSuperNetTrainer" if decisions(model) else "PITTrainer"
            raise UnsupportedModelError(
                f"{type(model).__name__} has {found}: search it with {trainer}, or hand over the network with "
                "LayerChoice, InputChoice or Repeat in it"
            )
        self.decisions = decisions(model)
        self.alphas = arch_parameters(model)
        if not self.alphas:
            raise UnsupportedModelError(
                f"{type(model).__name__} has nothing to search: it holds no LayerChoice, InputChoice or Repeat"
            )
        costs.check_for(model)
        self.dummy_input = tuple(dummy_input)
        self.train_selection = train_selection
        self._measure = measure
        self._costs: dict[str, Cost] = {}
        self._narrowed: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return self.costs.names

    def fingerprint(self) -> dict[str, str]:
        return self.costs.fingerprint()

    def cost_model(self, name: str) -> Cost:
        if name not in self._costs:
            self._costs[name] = self.costs.build(name, self.model, self.example(), self._measure)
        return self._costs[name]

    def take_table(self, table: LatencyTable) -> None:
        self.costs.table = table
        self._costs.clear()

    def example(self) -> tuple[Any, ...]:
        parameter = next(self.model.parameters())
        return (torch.rand(self.dummy_input, generator=torch.Generator().manual_seed(0)).to(parameter),)

    def check_export(self, examples: Sequence[Sequence[Any]]) -> None:
        check_export(self.model, examples)

    @contextmanager
    def as_found(self, *, settled: bool = False) -> Iterator[None]:
        # The running statistics of a supernet mix all its paths.
        with evaluated(self.model, Argmax()), nullcontext() if settled else batch_statistics(self.model):
            yield

    def decide(self, budget: Mapping[str, float] | None) -> dict[str, int]:
        if not budget:
            return argmax_choices(self.model)
        log_p = {k: d.alpha.detach().double().log_softmax(0).tolist() for k, d in self.decisions.items()}
        return best_under_budget(log_p, {name: self.cost_model(name) for name in budget}, budget)

    def numbers(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, float]:
        return {
            "entropy": mean_entropy(self.decisions),
            "changed": sum(now[label] != before[label] for label in now),
        }

    def soft_and_hard(self) -> dict[str, tuple[float, float]]:
        return {name: soft_and_hard(self.cost_model(name), self.decisions) for name in self.names}

    def shares(self) -> dict[str, list[float]]:
        return {label: d.alpha.detach().softmax(0).tolist() for label, d in self.decisions.items()}

    def learning(self, pulls: bool) -> list[nn.Parameter]:
        # Without a cost, the task alone decides.
        return [alpha for alpha in self.alphas if alpha.requires_grad] if self.train_selection else []

    def step_costs(self) -> dict[str, Tensor]:
        probabilities = {label: d.probabilities() for label, d in self.decisions.items()}
        return {name: self.cost_model(name).soft(probabilities) for name in self.names}

    def uniform_costs(self) -> dict[str, Tensor]:
        uniform = {k: torch.full((len(d.options),), 1 / len(d.options)) for k, d in self.decisions.items()}
        return {name: self.cost_model(name).soft(uniform) for name in self.names}

    def unit(self, name: str) -> str:
        return self.costs.unit(name)

    def reachable(self, names: Collection[str]) -> dict[str, tuple[float, float]]:
        return {name: cost_range(self.cost_model(name)) for name in names}

    def hard(self, names: Collection[str]) -> dict[str, float]:
        now = {label: first_argmax(d.alpha.detach().tolist()) for label, d in self.decisions.items()}
        return {name: self.cost_model(name).of(now) for name in names}

    def keep_targets_(self, targets: Mapping[str, float], *, fills: bool) -> None:
        if self.train_selection:
            choose_(self.decisions, {name: self.cost_model(name) for name in targets}, targets, fills=fills)

    def shrink_(
        self,
        optimizers: Sequence[Optimizer],
        followers: Sequence[MutableMapping[str, Tensor]],
        archs: Sequence[Mapping[str, Any]],
    ) -> int:
        if not self.train_selection:
            return 0
        before = {label: decision.options for label, decision in self.decisions.items()}
        gone = drop_candidates_(self.model, [self.example()], optimizers=optimizers, archs=archs)
        if gone:
            self._narrow(gone)
            for follower in followers:
                self._follow(follower, before)
        return sum(len(candidates) for candidates in gone.values())

    def _follow(self, follower: MutableMapping[str, Tensor], before: Mapping[str, Sequence[Any]]) -> None:
        """Take out of tensors by their names what the model, with these options ``before``, has lost."""
        state = self.model.state_dict(keep_vars=True)
        options = {id(d.alpha): (before[label], d.options) for label, d in self.decisions.items()}
        for name in list(follower):
            if name not in state:
                del follower[name]
            elif id(state[name]) in options:
                old, new = options[id(state[name])]
                follower[name] = follower[name][[old.index(option) for option in new]]

    def _narrow(self, gone: Mapping[str, Sequence[Any]]) -> None:
        """Costs of what is left: counted as they were, or anew where that is not known of them."""
        narrow = narrowing(self.model, gone)
        kept = {name: cost for name, cost in self._costs.items() if isinstance(cost, CostModel)}
        self._costs = {name: cost.narrowed(narrow, self.model) for name, cost in kept.items()}
        self._narrowed = tuple(self._costs)

    def removed(self) -> dict[str, Any]:
        return dropped_candidates(self.model)

    def remove_(self, model: nn.Module, removed: Mapping[str, Any], optimizers: Sequence[Optimizer]) -> None:
        if model is self.model:
            for name, source in self.costs.sources.items():
                if isinstance(source, CostModel):
                    self.cost_model(name)  # the user's own, of all candidates: it cannot be counted again
        gone = remove_candidates_(model, removed, [self.example()], optimizers=optimizers)
        if model is self.model and gone:
            self._narrow(gone)

    def follow_model(self) -> None:
        # Counted on what is left, but for those that were narrowed already.
        self._costs = {name: cost for name, cost in self._costs.items() if name in self._narrowed}
        self._narrowed = ()

    @property
    def has_masks(self) -> bool:
        return False

    def check_targets(self, targets: Mapping[str, float]) -> None:
        uniform = {label: [0.0] * len(d.options) for label, d in self.decisions.items()}
        costs = {name: self.cost_model(name) for name in targets}
        best_under_budget(uniform, costs, targets, fixed=fixed_options(self.decisions))
