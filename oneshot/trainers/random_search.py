"""Random search: the baseline that every search has to beat at the same number of evaluations.

Source: Li and Talwalkar, arXiv 1902.07638; random search with shared weights is a strong competitor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import nn

from ..cost import Cost
from ..data import mix_seed
from ..errors import ConfigurationError, UnsupportedModelError
from ..export import arch_of
from ..mutables import arch_parameters, decisions
from ..mutables.base import SearchModel
from .feasible import Candidate, FeasibleSpace, Key, best_of

__all__ = ["RandomSearch"]


@final
class RandomSearch:
    """Architectures drawn at random within hard limits, each once, and scored by the same function as a search.

    They are drawn uniformly among all feasible ones: from a list of these if they are few, by rejection if they are
    many, and only where they are many and yet less than about one in a thousand, by an integer program with random
    objectives, which is random but no longer uniform. If fewer than ``evaluations`` architectures are feasible, all
    of them are scored.

    Args:
        model: the search model; it says what is offered, and is not changed.
        score: an architecture, label -> decision as in ``export()``, -> a number, the larger the better: the
            ``evaluator`` of a trained supernet (``SPOSTrainer.evaluator``), or a function of one's own, say
            one that trains ``fixed(model, arch)`` alone. NaN is never the best.
        evaluations: how many are scored.
        costs, limits: name -> cost model of ``model``, and name -> largest value, kept exactly. InfeasibleTargetError
            if nothing keeps them, before anything is scored.
        seed: of the draws.

    >>> from oneshot import LayerChoice
    >>> net = nn.Sequential(LayerChoice({"a": nn.Identity(), "b": nn.ReLU(), "c": nn.Tanh()}, label="act"))
    >>> search = RandomSearch(net, lambda arch: float(arch["act"] == "b"), evaluations=10)
    >>> best = search.run()
    >>> search.arch, best.score, len(search.candidates)  # all there are
    ({'act': 'b'}, 1.0, 3)
    """

    def __init__(
        self,
        model: nn.Module,
        score: Callable[[dict[str, Any]], float],
        *,
        evaluations: int,
        costs: Mapping[str, Cost] | None = None,
        limits: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(evaluations, int) or isinstance(evaluations, bool) or evaluations < 1:
            raise ConfigurationError(f"evaluations={evaluations!r}: an integer of at least 1 is needed")
        if not arch_parameters(model):
            raise UnsupportedModelError(
                f"{type(model).__name__} has nothing to search: it holds no LayerChoice, InputChoice or Repeat"
            )
        if isinstance(model, SearchModel):
            raise UnsupportedModelError(
                f"RandomSearch: give the network with choices, and not the {type(model).__name__} made of it"
            )
        self.model, self.score, self.evaluations = model, score, evaluations
        known = decisions(model)
        self._decided = {k: d.members[0].decided for k, d in known.items() if d.members[0].decided is not None}
        sizes = {label: len(d.options) for label, d in known.items() if label not in self._decided}
        self.space = FeasibleSpace(sizes, costs, limits)
        self.generator = torch.Generator().manual_seed(mix_seed(seed, 0))
        self.candidates: list[Candidate] = []

    def run(self) -> Candidate:
        """Draw and score what is left; returns the best. ConfigurationError if every score is NaN."""
        known: set[Key] = {self.space.key(c.choices) for c in self.candidates}
        while len(self.candidates) < self.evaluations:
            choices = self.space.draw(self.generator, known)
            if choices is None:
                break
            known.add(self.space.key(choices))
            self.candidates.append(Candidate(choices, float(self.score(self._arch(choices)))))
        return self.best

    @property
    def best(self) -> Candidate:
        """The best so far, the first one of equals."""
        found = best_of(self.candidates)
        if found is None:
            scores = [c.score for c in self.candidates if not math.isnan(c.score)]
            raise ConfigurationError(
                f"random search: no best architecture among {len(self.candidates)}, {len(scores)} of them with a score "
                "that is a number; run() it, or look at the score function"
            )
        return found

    @property
    def arch(self) -> dict[str, Any]:
        """The best architecture as label -> decision, ready for ``fixed(model, arch)``."""
        return self._arch(self.best.choices)

    def _arch(self, choices: Mapping[str, int]) -> dict[str, Any]:
        return arch_of(self.model, {**choices, **self._decided})
