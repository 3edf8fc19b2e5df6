"""What is searched in a model, as the loop, the files and the report of a run see it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from ..cost import LatencyTable
from .costs import CostSources

__all__ = ["Priced", "Searched"]


class Priced(Protocol):
    """A cost of the architectures of a model, in its unit."""

    @property
    def unit(self) -> str: ...

    def of(self, choices: Mapping[str, Any], /) -> float: ...


class Searched(ABC):
    """The choices, or the masks, of ``model``.

    An architecture is label -> option or decision, as ``argmax_choices`` returns it. ``costs``: where the costs come
    from that are not counted in the model itself.
    """

    def __init__(self, model: nn.Module, costs: CostSources) -> None:
        self.model, self.costs = model, costs

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The costs that are followed in the run."""

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """What each of them is, as text: a run is taken up again with the same costs only."""

    @abstractmethod
    def cost_model(self, name: str) -> Priced:
        """A cost by name; ConfigurationError if there is none."""

    @abstractmethod
    def example(self) -> tuple[Any, ...]:
        """The inputs that costs are counted for, on the model's device."""

    @abstractmethod
    def check_export(self, examples: Sequence[Sequence[Any]]) -> None:
        """ExportError, before the search, for an export that would be refused after it."""

    @abstractmethod
    def as_found(self, *, settled: bool = False) -> AbstractContextManager[None]:
        """Inside, the model is the network that would be exported now, in eval mode without grad.

        ``settled``: its running statistics are of that network alone.
        """

    @abstractmethod
    def decide(self, budget: Mapping[str, float] | None) -> dict[str, Any]:
        """The architecture found, within ``budget`` if there is one."""

    @abstractmethod
    def numbers(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, float]:
        """How decided the search is; ``before``: the architecture of an epoch ago, ``now``: that of now."""

    @abstractmethod
    def soft_and_hard(self) -> dict[str, tuple[float, float]]:
        """Each cost of the run: the relaxed one that has the gradient, and that of the network exported now."""

    @abstractmethod
    def shares(self) -> dict[str, list[float]]:
        """Label -> a number in [0, 1] for each thing that can be decided there."""

    @abstractmethod
    def learning(self, pulls: bool) -> list[nn.Parameter]:
        """The architecture parameters that a search trains; ``pulls``: whether a cost can pull at them."""

    @abstractmethod
    def step_costs(self) -> dict[str, Tensor]:
        """Each cost of the run as this step has it, 0-dim, differentiable: of the masks, or expected by the gates."""

    @abstractmethod
    def uniform_costs(self) -> dict[str, Tensor]:
        """Each cost of the run if all options of every choice are equally probable, under the masks of now."""

    @abstractmethod
    def unit(self, name: str) -> str:
        """The unit of a cost of the run."""

    @abstractmethod
    def reachable(self, names: Collection[str]) -> dict[str, tuple[float, float]]:
        """The smallest and largest value of these costs, at least of these."""

    @abstractmethod
    def check_targets(self, targets: Mapping[str, float]) -> None:
        """InfeasibleTargetError for targets that no architecture meets."""

    @abstractmethod
    def hard(self, names: Collection[str]) -> dict[str, float]:
        """These costs of the run, of the network that would be exported now."""

    @abstractmethod
    def keep_targets_(self, targets: Mapping[str, float], *, fills: bool) -> None:
        """Move the architecture, as little as possible, to one that meets all targets.

        ``fills``: to one that uses nearly all that is allowed, because it was the targets that held it back.
        """

    def lift_masks_(self, limits: Mapping[str, float]) -> None:
        """Raise all masks alike, if there are any, until a hard cost is near its limit."""

    @property
    @abstractmethod
    def has_masks(self) -> bool:
        """Whether there are masks: they meet targets step by step, and choices at the end of an epoch."""

    def idle(self) -> list[nn.Parameter]:
        """Architecture parameters with no part in the step, though they may have gradients: zeros."""
        return []

    def clip_(self) -> None:
        """Bring what a step has moved back to the values that are allowed."""

    def shrink_(
        self,
        optimizers: Sequence[Optimizer],
        followers: Sequence[MutableMapping[str, Tensor]],
        archs: Sequence[Mapping[str, Any]],
    ) -> int:
        """Take out of the model, in place, what the architecture of now has not; how many units and candidates went.

        ``optimizers`` follow, and tensors by the names that ``model`` has them under; ``archs`` stay possible.
        ExportError, with nothing changed, unless the model computes and costs what it did.
        """
        return 0

    def removed(self) -> dict[str, Any]:
        """What has been taken out, as plain data."""
        return {}

    def remove_(self, model: nn.Module, removed: Mapping[str, Any], optimizers: Sequence[Optimizer]) -> None:
        """Take the same out of ``model``, a copy of the searched one in its full size; ArchMismatchError if it cannot.

        For the searched one itself, ``follow_model`` is to be called then.
        """

    def follow_model(self) -> None:
        """Look at the model anew, which has become smaller."""

    def take_table(self, table: LatencyTable) -> None:
        """A latency table that an earlier part of this run measured."""
