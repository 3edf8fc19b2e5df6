"""The cost of every architecture of a search model, as one function of its decisions.

With x_{l,o} = 1 if label l is decided for option o, a cost is
    C(x) = sum_j c_j prod_{l in condition j} sum_{o in S_jl} x_{l,o},
a constant, a table per label, and products where choices are nested. Labels are independent, so the expected
cost is the same function of the probabilities: E[C] = C(p), exactly, and differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import final

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..graph import Condition, intersect
from ..mutables import Decision, decisions

__all__ = ["CostModel", "Term", "terms_of_any"]

_MOST_CONDITIONS = 16


@dataclass(frozen=True)
class Term:
    """``value`` (in the unit of its cost) that is due while ``when`` holds; ``path``: the module it is due for."""

    value: float
    when: Condition
    path: str = ""


def terms_of_any(value: float, conditions: Sequence[Condition], path: str = "") -> list[Term]:
    """Terms of a value that is due once while any of the conditions holds (inclusion and exclusion).

    >>> a, b = {"a": frozenset({0})}, {"b": frozenset({1})}
    >>> [(t.value, sorted(t.when)) for t in terms_of_any(5.0, [a, b])]
    [(5.0, ['a']), (5.0, ['b']), (-5.0, ['a', 'b'])]
    """
    # What holds only while another one holds adds nothing; a condition without labels always holds.
    distinct: list[Condition] = []
    for when in conditions:
        if not any(_implies(when, other) for other in distinct):
            distinct = [other for other in distinct if not _implies(other, when)] + [when]
    if len(distinct) > _MOST_CONDITIONS:
        raise UnsupportedModelError(
            f"one parameter stands in {len(distinct)} places under different decisions; at most "
            f"{_MOST_CONDITIONS} can be counted exactly. Give these places one label"
        )
    terms = []
    for size in range(1, len(distinct) + 1):
        for group in combinations(distinct, size):
            both: Condition | None = {}
            for when in group:
                both = None if both is None else intersect(both, when)
            if both is not None:
                terms.append(Term(value if size % 2 else -value, both, path))
    return terms


def _implies(when: Condition, other: Condition) -> bool:
    """Whether ``other`` holds whenever ``when`` does."""
    return all(label in when and when[label] <= options for label, options in other.items())


@final
class CostModel:
    """A named cost of a search model, measured or counted once.

    ``expected(probabilities)``: E[C], a differentiable scalar. ``of(choices)``: C of one architecture, a float.
    ``unit``: what the numbers are; ``table``: label -> cost of each option, for conditions on that label alone;
    ``terms``: what it was made of, by module.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> cost = CostModel("macs", "MAC", [Term(4.0, {})], model)
    >>> cost.of({}), cost.expected({})
    (4.0, tensor(4.))
    """

    def __init__(self, name: str, unit: str, terms: Iterable[Term], model: nn.Module) -> None:
        self.name, self.unit = name, unit
        self.terms = tuple(terms)
        self.sizes = {label: len(d.options) for label, d in _undecided(model).items()}
        self.fixed = 0.0
        self.table: dict[str, list[float]] = {label: [0.0] * n for label, n in self.sizes.items()}
        products: dict[tuple[tuple[str, frozenset[int]], ...], float] = {}
        for term in self.terms:
            if not term.when:
                self.fixed += term.value
            elif len(term.when) == 1:
                ((label, options),) = term.when.items()
                for option in options:
                    self.table[label][option] += term.value
            else:
                key = tuple(sorted(term.when.items(), key=lambda item: item[0]))
                products[key] = products.get(key, 0.0) + term.value
        self.products = [Term(value, dict(key)) for key, value in products.items() if value]
        self._flat: Tensor | None = None

    def narrowed(self, narrow: Callable[[Condition], Condition | None], model: nn.Module) -> CostModel:
        """The same cost of a model that has dropped options; ``narrow``: see ``oneshot.export.dropping.narrowing``."""
        terms = [(term, narrow(term.when)) for term in self.terms]
        left = [Term(term.value, when, term.path) for term, when in terms if when is not None]
        return CostModel(self.name, self.unit, left, model)

    def of(self, choices: Mapping[str, int]) -> float:
        """The cost of the architecture that takes option ``choices[label]`` of every label, to 15 digits.

        >>> from oneshot import LayerChoice
        >>> choice = LayerChoice([nn.Identity()], label="a")
        >>> terms = [Term(0.1, {}), Term(0.2, {"a": frozenset({0})})]
        >>> CostModel("latency_ms", "ms", terms, choice).of({"a": 0})  # in floats, 0.1 + 0.2 is above 0.3
        0.3
        """
        parts = [self.fixed, *(row[choices[label]] for label, row in self.table.items())]
        for term in self.products:
            if all(choices[label] in options for label, options in term.when.items()):
                parts.append(term.value)
        # The sum of decimal numbers is then the decimal one in any order, and what costs a budget is not above it.
        return float(f"{math.fsum(parts):.15g}")

    def soft(self, probabilities: Mapping[str, Tensor]) -> Tensor:
        """The differentiable cost, which is ``expected(probabilities)``."""
        return self.expected(probabilities)

    def expected(self, probabilities: Mapping[str, Tensor]) -> Tensor:
        """E[C] for independent decisions; ``probabilities[label]``: shape (n,), need not sum to 1."""
        if not self.table:
            return torch.tensor(self.fixed)
        flat = torch.cat([probabilities[label] for label in self.table])
        if self._flat is None or self._flat.device != flat.device or self._flat.dtype != flat.dtype:
            row = [value for row in self.table.values() for value in row]
            self._flat = torch.tensor(row, dtype=flat.dtype, device=flat.device)
        total = flat @ self._flat + self.fixed
        for term in self.products:
            product: Tensor | float = term.value
            for label, options in term.when.items():
                # One by one: an index of several options would be sent to a GPU, which is waited for.
                product = product * torch.stack([probabilities[label][k] for k in sorted(options)]).sum()
            total = total + product
        return total


def _undecided(model: nn.Module) -> dict[str, Decision]:
    return {label: d for label, d in decisions(model).items() if d.members[0].decided is None}
