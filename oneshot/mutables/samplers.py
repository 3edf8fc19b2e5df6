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
    ``convex``: all weights are at least 0, whatever alpha is, as those of a softmax are.
    """

    weights: Tensor
    run: tuple[int, ...]
    graph: tuple[int, ...]
    convex: bool = False


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

    def reads_alpha(self) -> bool:
        """Whether a draw depends on alpha. If none of a step does, no alpha is fetched from a GPU for it."""
        return True

    def after_step(self, alpha: Tensor, before: Tensor, drawn: Any) -> None:
        """Correct ``alpha`` in place after an optimizer step that started at ``before``; nothing by default.

        It is not called after a draw that did not read alpha.
        """


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

    def draw(self, alpha: Tensor, generator: torch.Generator | None) -> int | None:
        return first_argmax(alpha.tolist()) if self.hard else None

    def reads_alpha(self) -> bool:
        return self.hard

    def gate(self, alpha: Tensor, drawn: Any) -> Gate:
        every = tuple(range(alpha.numel()))
        if not self.hard:
            return Gate(self.probabilities(alpha, drawn), every, every, convex=True)
        best = _likeliest(alpha, drawn)
        return Gate(_hard_weights(self, alpha, drawn, best), every, (best,))

    def probabilities(self, alpha: Tensor, drawn: Any) -> Tensor:
        return _softmax(alpha, self.temperature)


class _Noise(NamedTuple):
    noise: Tensor
    chosen: int | None


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
        return _Noise(noise, int((alpha + noise).argmax()) if self.hard else None)

    def reads_alpha(self) -> bool:
        return self.hard

    def gate(self, alpha: Tensor, drawn: Any) -> Gate:
        every = tuple(range(alpha.numel()))
        if not self.hard:
            return Gate(self.probabilities(alpha, drawn), every, every, convex=True)
        chosen = _needed(drawn, self).chosen
        return Gate(_hard_weights(self, alpha, drawn, chosen), every, (chosen,))

    def probabilities(self, alpha: Tensor, drawn: Any) -> Tensor:
        return _softmax(alpha + _to(_needed(drawn, self).noise, alpha), self.temperature)


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
        keys = alpha + _gumbel(alpha, generator)
        if self.paths != 2:
            active = int(keys.argmax())
            return _Paths(active, (active,) if self.paths == 1 else tuple(range(len(keys))))
        pair = sorted(keys.argsort(descending=True)[:2].tolist())
        keys = alpha[pair] + _gumbel(alpha[pair], generator)
        return _Paths(pair[int(keys.argmax())], tuple(pair))

    def gate(self, alpha: Tensor, drawn: Any) -> Gate:
        active, involved = _needed(drawn, self)
        if self.paths == 1:
            return _single(alpha, active)
        return Gate(_hard_weights(self, alpha, drawn, active), involved, (active,))

    def probabilities(self, alpha: Tensor, drawn: Any) -> Tensor:
        if self.paths != 2:
            return F.softmax(alpha, dim=0)
        return F.softmax(alpha + _log_of(alpha, _needed(drawn, self).involved), dim=0)

    @torch.no_grad()
    def after_step(self, alpha: Tensor, before: Tensor, drawn: Any) -> None:
        if self.paths == 2:
            log = _log_of(alpha, drawn.involved)
            shift = (_to(before, alpha) + log).logsumexp(0) - (alpha + log).logsumexp(0)
            alpha += shift * log.exp()


@final
@dataclass(frozen=True)
class UniformPath(Sampler):
    """One option, each with probability 1/n, whatever alpha says (SPOS, arXiv 1904.00420, eq. 7)."""

    def draw(self, alpha: Tensor, generator: torch.Generator | None) -> int:
        return int(torch.randint(alpha.numel(), (), generator=generator))

    def reads_alpha(self) -> bool:
        return False

    def gate(self, alpha: Tensor, drawn: Any) -> Gate:
        return _single(alpha, _needed(drawn, self))

    def probabilities(self, alpha: Tensor, drawn: Any) -> Tensor:
        return torch.full_like(alpha, 1 / alpha.numel())


@final
@dataclass(frozen=True)
class Argmax(Sampler):
    """The option with the largest alpha, of now or of the draw, the first one of equals: what an export takes."""

    def draw(self, alpha: Tensor, generator: torch.Generator | None) -> int:
        return first_argmax(alpha.tolist())

    def gate(self, alpha: Tensor, drawn: Any) -> Gate:
        return _single(alpha, _likeliest(alpha, drawn))

    def probabilities(self, alpha: Tensor, drawn: Any) -> Tensor:
        return self.gate(alpha, drawn).weights


@final
@dataclass(frozen=True)
class OnePath(Sampler):
    """The option ``index``, whatever alpha says: a decision that is pinned."""

    index: int

    def draw(self, alpha: Tensor, generator: torch.Generator | None) -> None:
        return None

    def reads_alpha(self) -> bool:
        return False

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

    def reads_alpha(self) -> bool:
        return False

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


def _likeliest(alpha: Tensor, drawn: int | None) -> int:
    # Without a draw alpha is looked at here, in every forward and for every label, which a GPU has to be waited for.
    return first_argmax(alpha.detach().tolist()) if drawn is None else drawn


def _gumbel(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.empty_like(like).exponential_(generator=generator).log_().neg_()


def _to(on_cpu: Tensor, like: Tensor) -> Tensor:
    # A GPU takes so few numbers over without being waited for, unless one asks for it.
    return on_cpu.to(like.device, like.dtype, non_blocking=True)


def _log_of(alpha: Tensor, involved: Sequence[int]) -> Tensor:
    """0 for these options, else -inf. An index tensor would be made on the CPU, and a GPU be waited for."""
    log = torch.full_like(alpha, -math.inf, requires_grad=False)
    for k in involved:
        log[k].fill_(0)
    return log


def _softmax(logits: Tensor, temperature: float) -> Tensor:
    return F.softmax(logits if temperature == 1 else logits / temperature, dim=0)


def _learns(alpha: Tensor) -> bool:
    return alpha.requires_grad and torch.is_grad_enabled()


def _single(alpha: Tensor, index: int) -> Gate:
    return Gate(_one_hot(alpha, index), (index,), (index,))


def _one_hot(alpha: Tensor, index: int) -> Tensor:
    weights = torch.zeros_like(alpha, requires_grad=False)
    weights[index].fill_(1)  # on a GPU: an assignment would send a number there
    return weights


def _hard_weights(sampler: Sampler, alpha: Tensor, drawn: Any, index: int) -> Tensor:
    """One-hot in value, with the gradient of the probabilities, if one is asked for (straight through)."""
    hard = _one_hot(alpha, index)
    if not _learns(alpha):
        return hard
    soft = sampler.probabilities(alpha, drawn)
    return hard + (soft - soft.detach())


def _needed(drawn: Any, sampler: Sampler) -> Any:
    if drawn is None:
        raise DrawError(f"{sampler} has no draw for this step: call oneshot.draw(model, generator) before the forward")
    return drawn


def _check_temperature(temperature: float) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ConfigurationError(f"temperature={temperature!r}: a finite number above 0 is needed")
