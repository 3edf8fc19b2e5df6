"""Penalties on each weight: l2, and l1 by proximal steps, which give exact zeros."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigurationError
from .after_step import Followed, Method, ProximalStep, check_learning, check_method
from .base import Regularizer, check_strength
from .groups import of_elements
from .patterns import as_patterns, matching, spellings, weights_of
from .proximal import effective_steps, soft_threshold
from .schedule import Schedule

__all__ = ["L1", "L2", "l1", "total"]


def total(sums: list[Tensor]) -> Tensor:
    """Their sum, where the first one is; in float32 at least."""
    return torch.stack([term.to(sums[0].device, torch.promote_types(term.dtype, torch.float32)) for term in sums]).sum()


def l1(parameters: Tensor | Iterable[Tensor]) -> Tensor:
    """sum_i |w_i| over all parameters, differentiable, for a training loop of one's own.

    >>> float(l1([torch.tensor([[1.0, -2.0]]), torch.tensor([3.0])]))
    6.0
    """
    return total([w.abs().sum() for w in ([parameters] if isinstance(parameters, Tensor) else parameters)])


@final
class L2(Regularizer):
    """strength * sum_i w_i^2 over the parameters that a pattern fits; the gradient is 2 strength w.

    It shrinks weights and makes none of them zero. Summed group by group it is the same number for every partition:
    ``sum_g sum_i (w_i^(g))^2``, as the page on group regularization of Distiller prints its group lasso, is this
    penalty; ``GroupLasso`` has the square root. ``weight_decay=d`` of ``torch.optim.SGD`` is strength d / 2.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
    >>> float(L2("*", 0.1)(net).detach())
    2.5
    """

    of = "weights"

    def __init__(self, patterns: str | Iterable[str], strength: float, *, schedule: Schedule | None = None) -> None:
        super().__init__(schedule)
        self.patterns = _required("L2", patterns)
        self.strength = check_strength("L2(strength)", strength)

    def terms(self, model: Any, epoch: int | None = None, n_epochs: int | None = None) -> dict[str, Tensor]:
        factor = self.strength * self.schedule.factor(epoch, n_epochs)
        chosen = _chosen("L2", model, self.patterns).values()
        return {"l2": factor * total([w.square().sum() for w in chosen])}

    def check(self, model: Any) -> None:
        check_learning("L2", _chosen("L2", model, self.patterns))

    @property
    def pulls(self) -> bool:
        return self.strength > 0

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "patterns": list(self.patterns), "strength": self.strength}


@final
class L1(Regularizer):
    """strength * sum_i |w_i|, by proximal steps: w_i <- sign(w_i) max(|w_i| - step * strength, 0).

    ``patterns_or_parameters``: patterns of parameter or module names, or parameters. ``method="proximal"``: call
    ``attach(model, optimizer)`` before training; after each step of the optimizer the weights are shrunk by the step of
    ``effective_steps`` times strength and schedule, and reach exactly 0. The value of a call is then for logs and has
    no gradient. ``"subgradient"``: the value has a gradient, nothing is attached, and no weight ever becomes and stays
    exactly 0. With ``"bn*.weight"`` this is network slimming (Liu et al. 2017).

    >>> net = nn.Linear(2, 1, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[0.04, -1.0]]))
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    >>> penalty = L1("weight", 0.5)
    >>> penalty.attach(net, optimizer)
    >>> loss = 0 * net(torch.ones(1, 2)).sum() + penalty(net)
    >>> loss.backward()
    >>> _ = optimizer.step()  # each number loses 0.1 * 0.5
    >>> [round(w, 3) for w in net.weight.flatten().tolist()]
    [0.0, -0.95]
    """

    of = "weights"

    def __init__(
        self,
        patterns_or_parameters: str | Iterable[str] | nn.Parameter | Iterable[nn.Parameter],
        strength: float,
        *,
        method: Method = "proximal",
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(schedule)
        given = patterns_or_parameters
        several = [given] if isinstance(given, str | nn.Parameter) else list(given)
        self.parameters = tuple(p for p in several if isinstance(p, nn.Parameter))
        self.patterns = _required("L1", cast("list[str]", several)) if not self.parameters else ()
        if self.parameters and len(self.parameters) < len(several):
            raise ConfigurationError("L1: patterns and parameters in one; give the one or the other")
        self.strength = check_strength("L1(strength)", strength)
        self.method = check_method("L1", method)
        self._followed = Followed()

    def terms(self, model: Any, epoch: int | None = None, n_epochs: int | None = None) -> dict[str, Tensor]:
        factor = self.schedule.factor(epoch, n_epochs)
        self._followed.called("L1", model, factor, self.method if self.pulls else "subgradient")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.method == "subgradient"):
            return {"l1": factor * self.strength * l1(self._chosen(model).values())}

    def value(self, model: nn.Module) -> Tensor:
        """strength * sum |w|, 0-dim, without gradient, schedule or attachment."""
        with torch.no_grad():
            return self.strength * l1(self._chosen(model).values())

    def check(self, model: Any) -> None:
        check_learning("L1", self._chosen(model))

    def attach(self, model: Any, optimizer: Optimizer) -> None:
        """Shrink after every step of ``optimizer`` from now on; nothing with ``method="subgradient"``."""
        self.check(model)
        chosen = self._chosen(model)

        def act(stepped: Optimizer) -> None:
            steps = effective_steps(stepped, chosen)
            with torch.no_grad():
                for name, w in chosen.items():
                    if steps[name]:
                        w.copy_(soft_threshold(w, steps[name] * self.strength * self._followed.factor))

        if self.method == "proximal":
            self._followed.add(optimizer, ProximalStep("L1", chosen, lambda: [of_elements("elements", chosen)], act))

    def detach(self, optimizer: Optimizer | None = None) -> None:
        self._followed.clear(optimizer)

    @property
    def pulls(self) -> bool:
        return self.strength > 0

    def settings(self) -> dict[str, Any]:
        of = {"shapes": [list(p.shape) for p in self.parameters]} if self.parameters else {"patterns": [*self.patterns]}
        return {**super().settings(), **of, "strength": self.strength, "method": self.method}

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self._followed.factor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._followed.factor = float(state.get("factor", 1.0))

    def _chosen(self, model: Any) -> dict[str, nn.Parameter]:
        if self.patterns:
            return _chosen("L1", model, self.patterns)
        of_model = {id(p): name for name, p in weights_of(model).items()}
        for p in self.parameters:
            if id(p) not in of_model:
                raise ConfigurationError(
                    f"L1: a parameter of shape {tuple(p.shape)} is not one of this {type(model).__name__}'s weights; "
                    f"give those of the model that is trained (without alphas: weight_parameters(model)), or patterns"
                )
        return {of_model[id(p)]: p for p in self.parameters}


def _required(owner: str, patterns: str | Iterable[str]) -> tuple[str, ...]:
    found = as_patterns(owner, patterns)
    if found is None:
        raise ConfigurationError(f"{owner}: patterns=None; '*' stands for all weights")
    return found


def _chosen(owner: str, model: Any, patterns: tuple[str, ...]) -> dict[str, nn.Parameter]:
    weights, names = weights_of(model), spellings(model)
    return {name: weights[name] for name in matching(owner, patterns, {name: names[name] for name in weights})}
