"""The architectures of a space that keep hard limits: whether one does, and drawing new ones at random."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import product
from numbers import Real
from typing import NamedTuple, final

import torch

from ..cost import Cost, CostModel, best_under_budget
from ..cost.decode import MOST_ENUMERATED
from ..errors import ConfigurationError

__all__ = ["Candidate", "FeasibleSpace", "Key", "best_of", "check_limits", "ranked"]

_MOST_DRAWS = 1000  # uniform ones, before a solver is asked for an architecture within the limits
_MOST_PERTURBED = 20  # answers of the solver, before the architectures are gone through one by one
_MOST_SOLVED = 500  # integer programs, a few ms each, to find out whether the feasible architectures are few

Key = tuple[int, ...]


class Candidate(NamedTuple):
    """An architecture as label -> option, and its score, the larger the better."""

    choices: dict[str, int]
    score: float


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Best first, earlier ones first among equals; a score that is NaN is the worst.

    >>> [c.score for c in ranked([Candidate({}, 1.0), Candidate({}, math.nan), Candidate({}, 3.0)])]
    [3.0, 1.0, nan]
    """
    return sorted(candidates, key=lambda c: math.inf if math.isnan(c.score) else -c.score)


def best_of(candidates: Sequence[Candidate]) -> Candidate | None:
    """The best candidate, the first one of equals; None of none, or if all scores are NaN."""
    first = next(iter(ranked(candidates)), None)
    return None if first is None or math.isnan(first.score) else first


@final
class FeasibleSpace:
    """All architectures label -> option that cost at most their limits.

    Args:
        sizes: label -> number of options.
        costs: name -> cost model, for every name in ``limits``.
        limits: name of a cost -> largest value, in its unit; each is kept exactly, by every architecture.

    Raises:
        InfeasibleTargetError: nothing keeps the limits; it says what can be reached.
        ConfigurationError: a limit that is no finite number, or is for a cost that is not given.

    Architectures that differ only inside a candidate that neither of them chose are different ones here.

    >>> from torch import nn
    >>> from oneshot import LayerChoice, count_params
    >>> net = nn.Sequential(*(LayerChoice([nn.Linear(2, 2), nn.Identity()], label=name) for name in "ab"))
    >>> space = FeasibleSpace({"a": 2, "b": 2}, {"params": count_params(net)}, {"params": 6})  # a Linear has 6
    >>> space.admits({"a": 0, "b": 0}), space.admits({"a": 0, "b": 1})
    (False, True)
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        costs: Mapping[str, Cost] | None = None,
        limits: Mapping[str, float] | None = None,
    ) -> None:
        if not sizes or not all(isinstance(n, int) and n >= 1 for n in sizes.values()):
            raise ConfigurationError(f"sizes={dict(sizes)}: labels are needed, each with one option or more")
        self.sizes, self.limits = dict(sizes), dict(limits or {})
        self.costs = dict(costs or {})
        best_under_budget({label: [0.0] * n for label, n in sizes.items()}, self.costs, self.limits)
        self._every: list[dict[str, int]] | None = None
        self._is_listed = False
        self._n_solved = 0

    @property
    def n_architectures(self) -> int:
        """How many there are without the limits."""
        return math.prod(self.sizes.values())

    def key(self, choices: Mapping[str, int]) -> Key:
        """The options in the order of the labels."""
        return tuple(choices[label] for label in self.sizes)

    def choices(self, key: Sequence[int]) -> dict[str, int]:
        """What ``key`` made a tuple of."""
        return dict(zip(self.sizes, key, strict=True))

    def admits(self, choices: Mapping[str, int]) -> bool:
        """Whether an architecture keeps all limits."""
        return all(self.costs[name].of(choices) <= limit for name, limit in self.limits.items())

    def draw(self, generator: torch.Generator, known: Collection[Key] = ()) -> dict[str, int] | None:
        """A random feasible architecture that is not ``known``; None if there is none left.

        Uniform over these if at most 4,096 are feasible and could be listed, else by rejection. Where 1,000 uniform
        draws hit nothing, an integer program finds the best architecture within the limits for random log
        probabilities: no longer uniform, but random and always feasible. Where even that knows nothing new, all of
        them are gone through, in the order of the options.
        """
        every = self.every()
        if every is not None:
            left = [choices for choices in every if self.key(choices) not in known]
            return dict(left[_below(len(left), generator)]) if left else None
        for _ in range(_MOST_DRAWS):
            choices = {label: _below(n, generator) for label, n in self.sizes.items()}
            if self.key(choices) not in known and self.admits(choices):
                return choices
        for _ in range(_MOST_PERTURBED):
            choices = self._perturbed(generator)
            if self.key(choices) not in known:
                return choices
        return next((choices for choices in self.each() if self.key(choices) not in known), None)

    def every(self) -> list[dict[str, int]] | None:
        """All feasible architectures if they are at most 4,096, found with at most 500 integer programs; or None."""
        if not self._is_listed:
            self._every, self._is_listed = self._listed(), True
        return self._every

    def _listed(self) -> list[dict[str, int]] | None:
        if self.n_architectures <= MOST_ENUMERATED:
            keys = product(*(range(n) for n in self.sizes.values()))
            return [choices for key in keys if self.admits(choices := self.choices(key))]
        found: list[dict[str, int]] = []
        for choices in self.each() if self.limits else ():
            found.append(choices)
            if len(found) > MOST_ENUMERATED or self._n_solved > _MOST_SOLVED:
                return None
        return found or None

    def each(self) -> Iterator[dict[str, int]]:
        """The feasible architectures one by one, each once: a branch is entered only if something in it is feasible."""
        witness = self._within({})
        if witness is not None:
            yield from self._below_prefix({}, witness)

    def _below_prefix(self, prefix: dict[str, int], witness: dict[str, int]) -> Iterator[dict[str, int]]:
        """``witness``: a feasible architecture that begins with ``prefix``."""
        label = next((label for label in self.sizes if label not in prefix), None)
        if label is None:
            yield witness
            return
        for option in range(self.sizes[label]):
            longer = {**prefix, label: option}
            other = witness if witness[label] == option else self._within(longer)
            if other is not None:
                yield from self._below_prefix(longer, other)

    def _within(self, prefix: Mapping[str, int]) -> dict[str, int] | None:
        """A feasible architecture that begins with ``prefix``, if there is one."""
        priced = [(self.costs[name], limit) for name, limit in self.limits.items()]
        additive = [(cost, limit) for cost, limit in priced if isinstance(cost, CostModel)]
        if any(_least(cost, prefix) > limit + _margin(cost, limit) for cost, limit in additive):
            return None
        for cost, _ in additive:
            cheapest = {label: _cheapest(cost.table[label]) for label in self.sizes if label in cost.table}
            guess = {**dict.fromkeys(self.sizes, 0), **cheapest, **prefix}
            if self.admits(guess):
                return guess
        self._n_solved += 1
        forbidden = {
            label: [0.0 if prefix.get(label, option) == option else -math.inf for option in range(n)]
            for label, n in self.sizes.items()
        }
        found = best_under_budget(forbidden, self.costs, self.limits)
        return found if all(found[label] == option for label, option in prefix.items()) else None

    def _perturbed(self, generator: torch.Generator) -> dict[str, int]:
        noise = torch.empty(sum(self.sizes.values()), dtype=torch.float64).exponential_(generator=generator)
        rows = (-noise.log()).split(list(self.sizes.values()))
        return best_under_budget(
            {label: row.tolist() for label, row in zip(self.sizes, rows, strict=True)}, self.costs, self.limits
        )


def check_limits(limits: Mapping[str, float], argument: str) -> None:
    """ConfigurationError unless every limit is a finite number."""
    if not isinstance(limits, Mapping):
        raise ConfigurationError(f"{argument}={limits!r}: a mapping is needed, cost name -> largest value")
    for name, limit in limits.items():
        if isinstance(limit, bool) or not isinstance(limit, Real) or not math.isfinite(limit):
            raise ConfigurationError(f"{argument}: {name} {limit!r}; a finite number in its unit is needed")


def _least(cost: CostModel, prefix: Mapping[str, int]) -> float:
    """A lower bound of the cost of every architecture that begins with ``prefix``."""
    total = cost.fixed + sum(row[prefix[label]] if label in prefix else min(row) for label, row in cost.table.items())
    for term in cost.products:
        may_hold = all(label not in prefix or prefix[label] in options for label, options in term.when.items())
        is_sure = may_hold and all(label in prefix for label in term.when)
        if is_sure or (may_hold and term.value < 0):
            total += term.value
    return total


def _margin(cost: CostModel, limit: float) -> float:
    """More than the rounding of a sum of the numbers of a cost."""
    numbers = (cost.fixed, limit, *(v for row in cost.table.values() for v in row), *(t.value for t in cost.products))
    return 1e-9 * max(map(abs, numbers))


def _cheapest(row: Sequence[float]) -> int:
    return min(range(len(row)), key=row.__getitem__)


def _below(n: int, generator: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=generator))
