"""The probabilities of conditions on decisions, as one vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..graph import Condition

__all__ = ["Chances"]


class Chances:
    """P(condition) = prod_label sum_{o in options} p_label(o) of several conditions; labels are independent.

    ``sizes``: label -> number of its options, in the order in which probabilities are strung together.

    >>> chances = Chances([{}, {"a": frozenset({0, 2})}, {"a": frozenset({1}), "b": frozenset({0})}], {"a": 3, "b": 2})
    >>> chances({"a": torch.tensor([0.25, 0.5, 0.25]), "b": torch.tensor([0.5, 0.5])}).tolist()
    [1.0, 0.5, 0.25]
    """

    def __init__(self, conditions: Sequence[Condition], sizes: Mapping[str, int]) -> None:
        self.labels = list(sizes)
        starts, at = {}, 0
        for label, size in sizes.items():
            starts[label], at = at, at + size
        rows: list[list[float]] = []
        of_condition: list[list[int]] = []
        for when in conditions:
            of_condition.append([])
            for label, options in when.items():
                row = [0.0] * at
                for option in options:
                    row[starts[label] + option] = 1.0
                of_condition[-1].append(len(rows))
                rows.append(row)
        most = max([len(own) for own in of_condition], default=0)
        one = len(rows)
        self.sums = torch.tensor(rows, dtype=torch.float64).reshape(one, at)
        self.factors = torch.tensor([own + [one] * (most - len(own)) for own in of_condition], dtype=torch.int64)
        self.factors = self.factors.reshape(len(conditions), most)
        self._on: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, probabilities: Mapping[str, Tensor]) -> Tensor:
        """Of shape (conditions,), float64, differentiable. ``probabilities``: label -> shape (n,)."""
        flat = torch.cat([probabilities[label] for label in self.labels]).to(torch.float64)
        sums, factors = self._tensors(flat.device)
        return torch.cat([sums @ flat, flat.new_ones(1)])[factors].prod(1)

    def _tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        key = str(device)
        if key not in self._on:
            self._on[key] = (self.sums.to(device), self.factors.to(device))
        return self._on[key]
