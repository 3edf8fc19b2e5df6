"""Evolutionary search over architectures under hard limits (SPOS, arXiv 1904.00420, section 3.4 and algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import torch

from ..errors import ConfigurationError
from .feasible import Candidate, FeasibleSpace, Key, best_of, ranked

__all__ = ["EvolutionarySearch", "crossed", "mutated"]

_TRIES = 10  # per child: others are duplicates, or above a limit


def mutated(
    choices: Mapping[str, int], sizes: Mapping[str, int], probability: float, generator: torch.Generator
) -> dict[str, int]:
    """Every decision is drawn anew with this probability, uniformly among all its options.

    >>> mutated({"a": 1, "b": 0}, {"a": 2, "b": 3}, 0.0, torch.Generator())
    {'a': 1, 'b': 0}
    """
    redrawn = (torch.rand(len(sizes), generator=generator) < probability).tolist()
    return {
        label: int(torch.randint(n, (), generator=generator)) if again else choices[label]
        for (label, n), again in zip(sizes.items(), redrawn, strict=True)
    }


def crossed(one: Mapping[str, int], other: Mapping[str, int], generator: torch.Generator) -> dict[str, int]:
    """Every decision from one of two parents, by a fair coin.

    >>> crossed({"a": 1, "b": 0}, {"a": 1, "b": 0}, torch.Generator())
    {'a': 1, 'b': 0}
    """
    coins = torch.randint(2, (len(one),), generator=generator).tolist()
    return {label: other[label] if coin else one[label] for label, coin in zip(one, coins, strict=True)}


@final
class EvolutionarySearch:
    """Generations of architectures, each from the best ones that are known.

    The first generation is random. Of each later one, half are mutations and half are crossovers of the ``parents``
    best architectures of all generations; where these only give what is known or above a limit, it is filled up at
    random. Every architecture keeps the limits of ``space``, and none is scored twice. A space that is used up ends
    the search early; with ``population * generations`` at least its size, the true optimum is found.

    ``run(score)`` does everything; ``ask`` and ``tell`` do it step by step, with ``state_dict`` in between, which is
    plain data: numbers, lists and the state of the generator.

    Args:
        space: the architectures, and their limits.
        generator: where all chance comes from.
        population, generations, parents: 50, 20 and 10 in the paper, which are 1,000 scores.
        mutation: probability that a decision is drawn anew.

    >>> space = FeasibleSpace({"a": 3, "b": 3})
    >>> search = EvolutionarySearch(space, torch.Generator().manual_seed(0), population=3, generations=3, parents=2)
    >>> search.run(lambda choices: 10 * choices["a"] + choices["b"])  # 9 scores, and 9 architectures
    Candidate(choices={'a': 2, 'b': 2}, score=22.0)
    """

    def __init__(
        self,
        space: FeasibleSpace,
        generator: torch.Generator,
        *,
        population: int = 50,
        generations: int = 20,
        parents: int = 10,
        mutation: float = 0.1,
    ) -> None:
        check_evolution(population, generations, parents, mutation)
        self.space, self.generator = space, generator
        self.population, self.generations = population, generations
        self.parents, self.mutation = parents, mutation
        self.generation = 0
        self.candidates: list[Candidate] = []
        self.pending: list[dict[str, int]] = []
        self._known: set[Key] = set()

    def run(self, score: Callable[[dict[str, int]], float]) -> Candidate | None:
        """Score what is left to score; returns the best, None if every score is NaN."""
        while (choices := self.ask()) is not None:
            self.tell(score(choices))
        return self.best

    def ask(self) -> dict[str, int] | None:
        """The architecture that is to be scored next, the same one until ``tell``; None: the search is over."""
        if not self.pending and self.generation < self.generations:
            self.pending = self._children()
            # Nothing new: the space is used up, and all later generations are empty.
            self.generation = self.generation + 1 if self.pending else self.generations
        return dict(self.pending[0]) if self.pending else None

    def tell(self, score: float) -> None:
        """The score of what ``ask`` returned, the larger the better."""
        if not self.pending:
            raise ConfigurationError("tell(): no architecture waits for its score; ask() for one first")
        self.candidates.append(Candidate(self.pending.pop(0), float(score)))

    @property
    def best(self) -> Candidate | None:
        """The best so far, the first one of equals."""
        return best_of(self.candidates)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the search depends on."""
        return {
            "generation": self.generation,
            "candidates": [[list(self.space.key(c.choices)), c.score] for c in self.candidates],
            "pending": [list(self.space.key(choices)) for choices in self.pending],
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a search over the same space."""
        self.generation = state["generation"]
        self.candidates = [Candidate(self.space.choices(key), score) for key, score in state["candidates"]]
        self.pending = [self.space.choices(key) for key in state["pending"]]
        self.generator.set_state(state["generator"])
        self._known = {self.space.key(choices) for choices in (*(c.choices for c in self.candidates), *self.pending)}

    def _children(self) -> list[dict[str, int]]:
        children: list[dict[str, int]] = []
        best = [candidate.choices for candidate in ranked(self.candidates)[: self.parents]]
        if best:
            n_mutated = self.population // 2
            children += self._tried(n_mutated, lambda: self._mutation(best))
            if len(best) > 1:
                children += self._tried(self.population - n_mutated, lambda: self._crossover(best))
        while len(children) < self.population:
            choices = self.space.draw(self.generator, self._known)
            if choices is None:
                break
            children.append(self._noted(choices))
        return children

    def _tried(self, n: int, child: Callable[[], dict[str, int]]) -> list[dict[str, int]]:
        """Up to ``n`` children that are feasible and new."""
        found: list[dict[str, int]] = []
        for _ in range(_TRIES * n):
            if len(found) == n:
                break
            choices = child()
            if self.space.key(choices) not in self._known and self.space.admits(choices):
                found.append(self._noted(choices))
        return found

    def _mutation(self, best: list[dict[str, int]]) -> dict[str, int]:
        return mutated(best[self._index(len(best))], self.space.sizes, self.mutation, self.generator)

    def _crossover(self, best: list[dict[str, int]]) -> dict[str, int]:
        first = self._index(len(best))
        second = (first + 1 + self._index(len(best) - 1)) % len(best)
        return crossed(best[first], best[second], self.generator)

    def _index(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self.generator))

    def _noted(self, choices: dict[str, int]) -> dict[str, int]:
        self._known.add(self.space.key(choices))
        return choices


def check_evolution(population: int, generations: int, parents: int, mutation: float) -> None:
    """ConfigurationError for settings that cannot work."""
    for name, value in (("population", population), ("generations", generations), ("parents", parents)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigurationError(f"{name}={value!r}: an integer of at least 1 is needed")
    if isinstance(mutation, bool) or not isinstance(mutation, int | float) or not 0 <= mutation <= 1:
        raise ConfigurationError(f"mutation={mutation!r}: a probability is needed, 0 to 1")
