"""Group lasso: whole groups of weights become exactly zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigurationError
from .after_step import Followed, Method, ProximalStep, check_families, check_learning, check_method
from .base import Regularizer, check_strength
from .groups import Family, group_norms
from .lambda_max import group_factors, lambda_max
from .layer_groups import Grouping, Groups, families
from .patterns import as_patterns, weights_of
from .proximal import effective_steps, shrink_
from .schedule import Schedule
from .weights import total

__all__ = ["GroupLasso"]


@final
class GroupLasso(Regularizer):
    """strength * sum_g sqrt(n_g) ||w_g||_2 (Yuan and Lin 2006), by proximal steps: whole groups become exactly 0.

    ``groups``, ``patterns``: see ``families``; or families of coupled channels. ``size_factor="none"``: without
    sqrt(n_g), as Distiller sums it; then large groups are penalised less per element. ``method``: as :class:`L1`; the
    step w_g <- w_g max(0, 1 - step strength sqrt(n_g) / ||w_g||) after each step of an attached optimizer, or a
    subgradient, which never gives exact zeros. ``least``: that many groups of each family, those of the largest norm,
    are never made zero. ``relative=True``: strength is a share of ``lambda_max`` of each family, which
    ``calibrate(model, closure)`` measures before training.

    Rows of weights alone are not yet removable: a bias, or a BatchNorm behind, still makes a number of a zero row.

    >>> net = nn.Linear(2, 3, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0], [5.0, 12.0]]))
    >>> float(GroupLasso("rows", 1.0, size_factor="none").value(net))  # 5 + 0 + 13
    18.0
    """

    of = "weights"

    def __init__(
        self,
        groups: Groups,
        strength: float,
        *,
        patterns: str | Iterable[str] | None = None,
        size_factor: Literal["sqrt", "none"] = "sqrt",
        method: Method = "proximal",
        relative: bool = False,
        least: int = 0,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(schedule)
        self.groups = groups
        self.patterns = as_patterns("GroupLasso", patterns)
        self.strength = check_strength("GroupLasso(strength)", strength)
        if size_factor not in ("sqrt", "none"):
            raise ConfigurationError(f"GroupLasso(size_factor={size_factor!r}): allowed are 'sqrt' and 'none'")
        if not isinstance(least, int) or isinstance(least, bool) or least < 0:
            raise ConfigurationError(f"GroupLasso(least={least!r}): an integer of at least 0 is needed")
        self.size_factor = size_factor
        self.method = check_method("GroupLasso", method)
        self.relative = bool(relative)
        self.least = least
        self._followed = Followed()
        self._known = _Known()
        self._lambda_max: dict[str, float] = {}

    def terms(self, model: Any, epoch: int | None = None, n_epochs: int | None = None) -> dict[str, Tensor]:
        factor = self.schedule.factor(epoch, n_epochs)
        self._followed.called("GroupLasso", model, factor, self.method if self.pulls else "subgradient")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.method == "subgradient"):
            return {"group_lasso": factor * self._value(self._in(model))}

    def value(self, model: nn.Module) -> Tensor:
        """strength * sum_g sqrt(n_g) ||w_g||_2, 0-dim, without gradient, schedule or attachment."""
        with torch.no_grad():
            return self._value(self._in(model))

    def families(self, model: nn.Module) -> list[Family]:
        """Its groups in this model."""
        return [family for family, _ in self._in(model).groups]

    def calibrate(self, model: nn.Module, closure: Callable[[], Tensor]) -> dict[str, float]:
        """Measure, keep and return ``lambda_max`` of each family; nothing for a strength that is not relative.

        ``closure()`` is the loss without the penalty.
        """
        if not self.relative:
            return {}
        self._lambda_max = lambda_max(model, self.families(model), closure, self.size_factor)
        return dict(self._lambda_max)

    def check(self, model: Any) -> None:
        found = self._in(model)
        check_learning("GroupLasso", found.parameters)
        if self.method == "proximal":
            check_families("GroupLasso", self.families(model), found.parameters)

    def attach(self, model: Any, optimizer: Optimizer) -> None:
        """Shrink after every step of ``optimizer`` from now on; nothing with ``method="subgradient"``."""
        self.check(model)

        def act(stepped: Optimizer) -> None:
            found = self._in(model)
            steps = effective_steps(stepped, found.parameters)
            for family, factors in found.groups:
                strengths = self._followed.factor * self._strength(family) * factors
                shrink_(family, found.parameters, strengths, steps, self.least)

        if self.method == "proximal":
            step = ProximalStep("GroupLasso", self._in(model).parameters, lambda: self.families(model), act)
            self._followed.add(optimizer, step)

    def detach(self, optimizer: Optimizer | None = None) -> None:
        self._followed.clear(optimizer)

    @property
    def pulls(self) -> bool:
        return self.strength > 0

    def settings(self) -> dict[str, Any]:
        names = ("strength", "size_factor", "method", "relative", "least")
        patterns = None if self.patterns is None else list(self.patterns)
        more = {name: getattr(self, name) for name in names}
        return {**super().settings(), "groups": _described(self.groups), "patterns": patterns, **more}

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self._followed.factor, "lambda_max": dict(self._lambda_max)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._followed.factor = float(state.get("factor", 1.0))
        self._lambda_max = {str(name): float(value) for name, value in state.get("lambda_max", {}).items()}

    def _strength(self, family: Family) -> float:
        if not self.relative:
            return self.strength
        if family.name not in self._lambda_max:
            raise ConfigurationError(
                f"GroupLasso(relative=True): lambda_max of {family.name!r} is not known; call "
                f"calibrate(model, closure) before training, closure() being the loss on much data"
            )
        return self.strength * self._lambda_max[family.name]

    def _value(self, found: _Resolved) -> Tensor:
        sums = []
        for family, factors in found.groups:
            norms = group_norms(family, found.parameters)
            sums.append(self._strength(family) * (norms * factors.to(norms)).sum())
        return total(sums)

    def _in(self, model: Any) -> _Resolved:
        """The groups in a model, found once; again if its parameters were replaced, or went to another device."""
        weights = weights_of(model)
        found = self._known.of_model.get(model)
        if found is None or not found.is_of(weights):
            of_it = families(model, self.groups, self.patterns)
            near = [Family(f.name, {k: i.to(weights[k].device) for k, i in f.index.items()}, f.n) for f in of_it]
            names = dict.fromkeys(name for family in near for name in family.index)
            found = _Resolved(
                {name: weights[name] for name in names},
                [(family, group_factors(family, weights, self.size_factor)) for family in near],
            )
            self._known.of_model[model] = found
        return found


@final
@dataclass(frozen=True)
class _Resolved:
    """Groups in a model, with the factors of their norms."""

    parameters: dict[str, nn.Parameter]
    groups: list[tuple[Family, Tensor]]

    def is_of(self, weights: Mapping[str, nn.Parameter]) -> bool:
        same = all(weights.get(name) is parameter for name, parameter in self.parameters.items())
        return same and all(
            index.device == self.parameters[name].device
            for family, _ in self.groups
            for name, index in family.index.items()
        )


@final
class _Known:
    """What was found in each model; a copy finds it again."""

    def __init__(self) -> None:
        self.of_model: WeakKeyDictionary[nn.Module, _Resolved] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[_Known], tuple[()]]:
        return _Known, ()


def _described(groups: Groups) -> str | list[str]:
    if isinstance(groups, str | Grouping):
        return groups if isinstance(groups, str) else groups.name
    if isinstance(groups, Family):
        return [groups.name]
    return str(getattr(groups, "__name__", type(groups).__name__)) if callable(groups) else [f.name for f in groups]
