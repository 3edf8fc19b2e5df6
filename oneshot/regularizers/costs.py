"""Costs of an architecture as terms of the loss: in proportion, or what is above targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Literal, final

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigurationError, InfeasibleTargetError
from .base import Regularizer, check_strength
from .schedule import Schedule

__all__ = ["DUCCIO", "BaseRegularizer"]

_LEAST_GAP = 0.01  # of a target: a network that is nearer to it is not pulled harder


@final
class BaseRegularizer(Regularizer):
    """strength * C, with C = ``model.get_cost(cost_name)`` in its unit (PLiNIO, arXiv 2307.09488).

    ``normalize``: C is divided by what the network costs at the first call, so that one strength suits all sizes.

    >>> from oneshot import PIT
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> value = BaseRegularizer("params", 1e-3)(PIT(net, input_shape=(4,)))  # 4 * 8 + 8 + 8 * 2 + 2 = 58 parameters
    >>> round(value.item(), 6)
    0.058
    """

    of = "costs"

    def __init__(
        self, cost_name: str, strength: float, *, normalize: bool = False, schedule: Schedule | None = None
    ) -> None:
        super().__init__(schedule)
        self.cost_name, self.strength = cost_name, check_strength("BaseRegularizer: strength", strength)
        self.normalize = normalize
        self.initial: float | None = None

    def terms(self, model: Any, epoch: int | None = None, n_epochs: int | None = None) -> dict[str, Tensor]:
        cost = _cost(model, self.cost_name)
        scale = self.strength * self.schedule.factor(epoch, n_epochs)
        if self.normalize:
            if self.initial is None:
                self.initial = _hard_cost(model, self.cost_name, cost)
            _check_initial(self.cost_name, self.initial)
            scale /= self.initial
        return {f"{self.cost_name}_term": scale * cost}

    def check(self, model: Any) -> None:
        _check_names("BaseRegularizer", [self.cost_name], model)

    @property
    def pulls(self) -> bool:
        return self.strength > 0

    def settings(self) -> dict[str, Any]:
        own = {"cost": self.cost_name, "strength": self.strength, "normalize": self.normalize}
        return {**super().settings(), **own}

    def state_dict(self) -> dict[str, Any]:
        return {"initial": self.initial}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.initial = state["initial"]


@final
class DUCCIO(Regularizer):
    """sum_k s_k(e) max(0, C_k - T_k): costs as constraints (arXiv 2310.07217, equations 13 and 14).

    The final strength s_k is ``final_strengths``, or comes from ``task_loss`` L, the loss at the end of the warm-up:

        s_k = L / (C_k - T_k)

    with the hard cost C_k at the first call that finds it above its target: the penalty of that network in full
    strength is the loss. From epoch e of N the strength is s_k (0.01 + 0.99 e / (N - 1)), which is all of it in the
    last epoch (``ramp='end'``), or s_k min(1, 0.01 + 0.99 e / (N / 2)), as the published code has it (``'half'``).
    Without an epoch it is s_k.

    Where C_k - T_k is less than 1 % of T_k, that much is divided by. A cost that is within its target at first gets
    its strength when it is above it for the first time.

    Args:
        targets: cost -> T_k. InfeasibleTargetError for one that no network reaches, at the first call.
        task_loss, final_strengths: one of them. The latter: cost -> s_k, or as many numbers as there are targets.

    >>> class Fixed:
    ...     def get_cost(self, name):
    ...         return torch.tensor(1000.0)
    >>> reg = DUCCIO({"params": 400.0}, task_loss=0.6)  # s = 0.6 / (1000 - 400) = 0.001
    >>> [round(float(reg(Fixed(), epoch, 10)), 4) for epoch in (0, 1, 9)]  # 600 * 0.001 * (0.01, 0.01 + 0.99 / 9, 1)
    [0.006, 0.072, 0.6]
    """

    of = "costs"

    def __init__(
        self,
        targets: Mapping[str, float | Tensor],
        task_loss: float | Tensor | None = None,
        final_strengths: Mapping[str, float] | Sequence[float] | None = None,
        *,
        ramp: Literal["end", "half"] = "end",
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(schedule)
        if (task_loss is None) == (final_strengths is None):
            raise ConfigurationError(
                f"DUCCIO(task_loss={task_loss}, final_strengths={final_strengths}): exactly one of them is needed"
            )
        if ramp not in ("end", "half"):
            raise ConfigurationError(f"DUCCIO(ramp={ramp!r}): allowed are 'end' and 'half'")
        if not isinstance(targets, Mapping) or not targets:
            raise ConfigurationError(f"DUCCIO(targets={targets!r}): a mapping is needed, cost -> target")
        self.targets = {name: check_strength(f"DUCCIO: target {name!r}", _number(t)) for name, t in targets.items()}
        self.task_loss = None if task_loss is None else check_strength("DUCCIO: task_loss", _number(task_loss))
        self.ramp = ramp
        self.final_strengths: dict[str, float] = {}
        if final_strengths is not None:
            self.final_strengths = _strengths(final_strengths, self.targets)
        self._checked = False

    def terms(self, model: Any, epoch: int | None = None, n_epochs: int | None = None) -> dict[str, Tensor]:
        if not self._checked:
            self.check(model)
            self._checked = True
        factor = self.schedule.factor(epoch, n_epochs) * self._share(epoch, n_epochs)
        found = {}
        for name, target in self.targets.items():
            cost = _cost(model, name)
            if name not in self.final_strengths:
                self._derive(name, _hard_cost(model, name, cost))
            found[f"{name}_term"] = factor * self.final_strengths.get(name, 0.0) * torch.relu(cost - target)
        return found

    def _derive(self, name: str, cost: float) -> None:
        """Equation 13, once a cost is at its target or above."""
        target = self.targets[name]
        if cost >= target:
            assert self.task_loss is not None
            least = _LEAST_GAP * target if target else cost
            self.final_strengths[name] = self.task_loss / max(cost - target, least or 1.0)

    def _share(self, epoch: int | None, n_epochs: int | None) -> float:
        """Equation 14: of the final strengths."""
        if epoch is None:
            return 1.0
        if n_epochs is None:
            raise ConfigurationError(f"DUCCIO: epoch {epoch} of how many? Call it with epoch and n_epochs, or neither")
        steps = n_epochs / 2 if self.ramp == "half" else n_epochs - 1
        return min(0.01 + 0.99 * epoch / steps, 1.0) if steps else 1.0

    def check(self, model: Any) -> None:
        _check_names("DUCCIO", self.targets, model)
        if not hasattr(model, "reachable_costs"):
            return
        reachable = model.reachable_costs()
        for name, target in self.targets.items():
            low, high = reachable[name]
            if target < low:
                raise InfeasibleTargetError(
                    f"DUCCIO: target {name} {target:g}, but the smallest network has {low:g} and the largest {high:g}. "
                    f"Give a target of at least {low:g}, or search more of the network"
                )

    @property
    def pulls(self) -> bool:
        return bool(self.task_loss) or any(self.final_strengths.values())

    def settings(self) -> dict[str, Any]:
        # Strengths that were derived are no settings.
        given = None if self.task_loss is not None else self.final_strengths
        own = {"targets": self.targets, "task_loss": self.task_loss, "ramp": self.ramp, "final_strengths": given}
        return {**super().settings(), **own}

    def state_dict(self) -> dict[str, Any]:
        return {"final_strengths": dict(self.final_strengths)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        unknown = set(state["final_strengths"]) - set(self.targets)
        if unknown:
            raise CheckpointError(f"DUCCIO: state has strengths of {sorted(unknown)}, targets are {self.targets}")
        self.final_strengths = dict(state["final_strengths"])


def _cost(model: Any, name: str) -> Tensor:
    if not hasattr(model, "get_cost"):
        raise ConfigurationError(
            f"{type(model).__name__} has no costs: hand over a PIT or SuperNet network, or give the regularizer to a "
            "trainer"
        )
    cost: Tensor = model.get_cost(name)
    return cost


def _hard_cost(model: Any, name: str, cost: Tensor) -> float:
    """Of the network that would be exported now, if the model can tell."""
    return float(model.hard_cost(name)) if hasattr(model, "hard_cost") else float(cost.detach())


def _check_names(what: str, names: Sequence[str] | Mapping[str, float], model: Any) -> None:
    known = getattr(model, "cost_names", None)
    unknown = [name for name in names if known is not None and name not in known]
    if unknown:
        raise ConfigurationError(f"{what}: unknown costs {unknown}; the network has {list(known or ())}")


def _check_initial(name: str, initial: float) -> None:
    if not initial > 0:
        raise ConfigurationError(f"BaseRegularizer(normalize=True): the first network's {name} is {initial:g}")


def _strengths(given: Mapping[str, float] | Sequence[float], targets: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(given, Mapping):
        if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != len(targets):
            raise ConfigurationError(
                f"DUCCIO(final_strengths={given!r}): a mapping, or as many numbers as targets, {len(targets)}, are "
                "needed"
            )
        given = dict(zip(targets, given, strict=True))
    if set(given) != set(targets):
        raise ConfigurationError(
            f"DUCCIO(final_strengths={dict(given)}): one for each of the targets {list(targets)} is needed"
        )
    return {name: check_strength(f"DUCCIO: final strength of {name!r}", _number(given[name])) for name in targets}


def _number(value: object) -> object:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value.detach())
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else value
