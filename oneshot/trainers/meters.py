"""The numbers of a run: running averages of an epoch, entropy and costs of the decisions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from ..cost import Cost
from ..mutables import Decision
from ..mutables.samplers import first_argmax
from .decidedness import mean_entropy_of

__all__ = ["Meters", "mean_entropy", "soft_and_hard"]


@final
class Meters:
    """Sum and number of each named value; float64, so that a resumed epoch averages to the same bit.

    >>> meters = Meters()
    >>> for value in (1.0, 2.0, 6.0):
    ...     meters.add({"loss": torch.tensor(value)})
    >>> meters.averages()
    {'loss': 3.0}
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor | float], weight: int = 1) -> None:
        """Add one value of each name, ``weight`` times."""
        for name, value in values.items():
            number = value.detach() if isinstance(value, Tensor) else value
            if name in self.sums and (not isinstance(number, Tensor) or number.dim() == 0):
                self.sums[name] = torch.add(self.sums[name], number, alpha=weight)  # float64, as the sum is
            else:
                number = _as_tensor(number).to(torch.float64) * weight
                self.sums[name] = self.sums[name] + number if name in self.sums else number
            self.counts[name] = self.counts.get(name, 0) + weight

    def averages(self) -> dict[str, float]:
        """The averages so far."""
        return {name: float(total) / self.counts[name] for name, total in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {k: float(v) for k, v in self.sums.items()}, "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = {k: torch.tensor(v, dtype=torch.float64) for k, v in state["sums"].items()}
        self.counts = dict(state["counts"])


@torch.no_grad()
def mean_entropy(decisions: Mapping[str, Decision]) -> float:
    """Mean over the decisions of - sum_k p_k ln p_k with p = softmax(alpha), in nats; ln n when all n are alike."""
    return float(mean_entropy_of([d.alpha.double() for d in decisions.values()]))


@torch.no_grad()
def soft_and_hard(cost: Cost, decisions: Mapping[str, Decision]) -> tuple[float, float]:
    """The expected cost under softmax(alpha), and the cost of the network that would be exported now."""
    soft = cost.soft({label: d.alpha.softmax(0) for label, d in decisions.items()})
    return float(soft), cost.of({label: first_argmax(d.alpha.tolist()) for label, d in decisions.items()})


def _as_tensor(value: Tensor | float) -> Tensor:
    # A Python number has 15 digits, which torch.as_tensor would round to 7.
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
