"""Samplers: the strategies that turn the alpha of a decision into gates.

A sampler has a random half and a differentiable half, so that a forward never draws:

* ``draw(alpha, generator)`` once per step and decision, without gradient, on the CPU in float64;
* ``gate(alpha, drawn)`` at every forward, differentiable;
* ``probabilities(alpha, drawn)``, the distribution under which a cost is expected in this step;
* ``after_step(alpha, before, drawn)`` once the optimizer has moved alpha.

``n`` is the number of options of the decision, p = softmax(alpha).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigurationError, DrawError

__all__ = [
    "Argmax",
    "BinaryGates",
    "EveryPath",
    "Gate",
    "GumbelSoftmax",
    "OnePath",
    "Sampler",
    "Softmax",
    "UniformPath",
]


class Gate(NamedTuple):
    """How the options of a decision take part in one forward.

    ``weights``: shape (n,), the factor of each option's output, differentiable in alpha.
    ``run``: the options to evaluate. ``graph``: those of them that run with autograd.

    An option in ``run`` but not in ``graph`` has weight 0 in value; it is evaluated only for the gradient of
    its own weight, <dL/dy, o_k>, and skipped when no such gradient is asked for. Where ``graph`` holds a
    single option its weight is 1 in value, so that its output is passed on without a multiplication.
    """

    weights: Tensor
    run: tuple[int, ...]
    graph: tuple[int, ...]


class Sampler(ABC):
    """Strategy of a decision; holds settings only, no state."""

    @abstractmethod
    def draw(self, alpha: Tensor, generator: torch.Generator | None) -> Any:
        """The random part of a step. ``alpha``: shape (n,), float64, CPU, detached."""

    @abstractmethod
    def gate(self, alpha: Tensor, drawn: Any) -> Gate:
        """The gate of a forward, from the current alpha and the drawn part."""

    @abstractmethod
    def probabilities(self, alpha: Tensor, drawn: Any) -> Tensor:
        """Shape (n,), differentiable: the distribution that the expected cost of this step uses."""

    def after_step(self, alpha: Tensor, before: Tensor, drawn: Any) -> None:
        """Correct ``alpha`` in place after an optimizer step that started at ``before``; nothing by default."""


@final
@dataclass(frozen=True)
class Softmax(Sampler):
    """Mixture of all options: y = sum_k softmax(alpha / T)_k o_k(x). Source: DARTS, arXiv 1806.09055, eq. 2.

    ``hard``: the option with the largest alpha runs with weight 1, the others only for the gradient of their own
    weight, and alpha has the gradient of the soft weights (straight through).

    >>> Softmax(temperature=2.0).gate(torch.tensor([0.0, 2 * math.log(3.0)]), None).weights
    tensor([0.2500, 0.7500])
    """

    temperature: float = 1.0
    hard: bool = False

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    def draw(self, alpha: Tensor, generator: torch.Generator | None) -> None:
        return None

    def gate(self, alpha: Tensor, drawn: Any) -> Gate:
        soft, every = self.probabilities(alpha, drawn), tuple(range(alpha.numel()))
        if not self.hard:
            return Gate(soft, every, every)
        best = first_argmax(alpha.detach().tolist())
        return Gate(_straight_through(soft, best), every, (best,))

    def probabilities(self, alpha: Tensor, drawn: Any) -> Tensor:
        return F.softmax(alpha / self.temperature, dim=0)


class _Noise(NamedTuple):
    noise: Tensor
    chosen: int


@final
@dataclass(frozen=True)
class GumbelSoftmax(Sampler):
    """softmax((alpha + g) / T) with g ~ Gumbel(0, 1), drawn once per step.

    Soft: all options are mixed (FBNet, arXiv 1812.03443, eq. 4). ``hard``: the option with the largest
    weight runs, and every option's weight has the gradient of the soft one (straight through; GDAS,
    arXiv 1910.04465). The option that runs is distributed as p = softmax(alpha), whatever the temperature.
    """

    temperature: float = 1.0
    hard: bool = False

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    def draw(self, alpha: Tensor, generator: torch.Generator | None) -> _Noise:
        noise = _gumbel(alpha, generator)
        return _Noise(noise, int((alpha + noise).argmax()))

    def gate(self, alpha: Tensor, drawn: Any) -> Gate:
        soft = self.probabilities(alpha, drawn)
        every = tuple(range(alpha.numel()))
        if not self.hard:
            return Gate(soft, every, every)
        return Gate(_straight_through(soft, drawn.chosen), every, (drawn.chosen,))

    def probabilities(self, alpha: Tensor, drawn: Any) -> Tensor:
        noise = _needed(drawn, self).noise.to(alpha)
        return F.softmax((alpha + noise) / self.temperature, dim=0)


class _Paths(NamedTuple):
    active: int
    involved: tuple[int, ...]


@final
@dataclass(frozen=True)
class BinaryGates(Sampler):
    """Path binarisation of ProxylessNAS (arXiv 1812.00332, section 3.2): one option runs, with weight 1.

    ``paths=1``: a weight step; the active option is drawn from p and alpha has no gradient.
    ``paths=2``: two options are drawn from p without replacement; q is the softmax of their two alphas, the
    active one is drawn from q. With the gate gradients c_k = <dL/dy, o_k(x)> of the pair,
    dL/dalpha_i = q_i (c_i - sum_j q_j c_j), zero elsewhere. After the optimizer's step both alphas are shifted
    so that the mass of the pair, hence the probability of every option outside it, is what it was.
    ``paths='all'``: one active option from p, the gate gradients of all n options:
    dL/dalpha_i = p_i (c_i - sum_j p_j c_j).

    >>> gates = BinaryGates(paths=2)
    >>> alpha = torch.zeros(3, requires_grad=True)
    >>> gate = gates.gate(alpha, gates.draw(torch.zeros(3).double(), torch.Generator().manual_seed(0)))
    >>> len(gate.run), len(gate.graph), float(gate.weights.detach().sum())
    (2, 1, 1.0)
    """

    paths: Literal[1, 2, "all"] = 1

    def __post_init__(self) -> None:
        if self.paths not in (1, 2, "all"):
            raise ConfigurationError(f"BinaryGates(paths={self.paths!r}): allowed are 1, 2 and 'all'")

    def draw(self, alpha: Tensor, generator: torch.Generator | None) -> _Paths:
        # Largest perturbed keys first: exact sampling without replacement, and no zero probability to trip on.
        order = (alpha + _gumbel(alpha, generator)).argsort(descending=True).tolist()
        if self.paths == 1:
            return _Paths(order[0], (order[0],))
        if self.paths == "all":
            return _Paths(order[0], tuple(range(len(order))))
        pair = sorted(order[:2])
        keys = alpha[pair] + _gumbel(alpha[pair], generator)
        return _Paths(pair[int(keys.argmax())], tuple(pair))

    def gate(self, alpha: Tensor, drawn: Any) -> Gate:
        active, involved = _needed(drawn, self)
        if self.paths == 1:
            return _single(alpha, active)
        soft = self.probabilities(alpha, drawn)
        return Gate(_straight_through(soft, active), involved, (active,))

    def probabilities(self, alpha: Tensor, drawn: Any) -> Tensor:
        if self.paths != 2:
            return F.softmax(alpha, dim=0)
        pair = list(_needed(drawn, self).involved)
        index = torch.tensor(pair, device=alpha.device)
        return torch.zeros_like(alpha).index_put((index,), F.softmax(alpha[index], dim=0))

    @torch.no_grad()
    def after_step(self, alpha: Tensor, before: Tensor, drawn: Any) -> None:
        if self.paths == 2:
            index = torch.tensor(drawn.involved, device=alpha.device)
            alpha[index] += before.to(alpha)[index].logsumexp(0) - alpha[index].logsumexp(0)


@final
@dataclass(frozen=True)
class UniformPath(Sampler):
    """One option, each with probability 1/n, whatever alpha says (SPOS, arXiv 1904.00420, eq. 7)."""

    def draw(self, alpha: Tensor, generator: torch.Generator | None) -> int:
        return int(torch.randint(alpha.numel(), (), generator=generator))

    def gate(self, alpha: Tensor, drawn: Any) -> Gate:
        return _single(alpha, _needed(drawn, self))

    def probabilities(self, alpha: Tensor, drawn: Any) -> Tensor:
        return torch.full_like(alpha, 1 / alpha.numel())


@final
@dataclass(frozen=True)
class Argmax(Sampler):
    """The option with the largest current alpha, the first one of equals: what an export takes."""

    def draw(self, alpha: Tensor, generator: torch.Generator | None) -> None:
        return None

    def gate(self, alpha: Tensor, drawn: Any) -> Gate:
        return _single(alpha, first_argmax(alpha.detach().tolist()))

    def probabilities(self, alpha: Tensor, drawn: Any) -> Tensor:
        return self.gate(alpha, drawn).weights


@final
@dataclass(frozen=True)
class OnePath(Sampler):
    """The option ``index``, whatever alpha says: a decision that is pinned."""

    index: int

    def draw(self, alpha: Tensor, generator: torch.Generator | None) -> None:
        return None

    def gate(self, alpha: Tensor, drawn: Any) -> Gate:
        return _single(alpha, self.index)

    def probabilities(self, alpha: Tensor, drawn: Any) -> Tensor:
        return self.gate(alpha, drawn).weights


@final
@dataclass(frozen=True)
class EveryPath(Sampler):
    """The plain sum of all options, each with weight 1: for tracing a whole search model, not for training."""

    def draw(self, alpha: Tensor, generator: torch.Generator | None) -> None:
        return None

    def gate(self, alpha: Tensor, drawn: Any) -> Gate:
        every = tuple(range(alpha.numel()))
        return Gate(torch.ones_like(alpha, requires_grad=False), every, every)

    def probabilities(self, alpha: Tensor, drawn: Any) -> Tensor:
        return F.softmax(alpha, dim=0)


def first_argmax(values: Sequence[float]) -> int:
    """Index of the largest value, the first one of equals, on every device.

    >>> first_argmax([0.1, 0.7, 0.7])
    1
    """
    return max(range(len(values)), key=values.__getitem__)


def _gumbel(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return -torch.empty_like(like).exponential_(generator=generator).log()


def _single(alpha: Tensor, index: int) -> Gate:
    weights = torch.zeros_like(alpha, requires_grad=False)
    weights[index] = 1
    return Gate(weights, (index,), (index,))


def _straight_through(soft: Tensor, index: int) -> Tensor:
    """One-hot in value, the gradient of ``soft``."""
    hard = torch.zeros_like(soft, requires_grad=False)
    hard[index] = 1
    return hard + (soft - soft.detach())


def _needed(drawn: Any, sampler: Sampler) -> Any:
    if drawn is None:
        raise DrawError(f"{sampler} has no draw for this step: call oneshot.draw(model, generator) before the forward")
    return drawn


def _check_temperature(temperature: float) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ConfigurationError(f"temperature={temperature!r}: a finite number above 0 is needed")
