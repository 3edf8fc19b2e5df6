"""Regularizers in a trainer: what they see of a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from torch import Tensor

from ..errors import ConfigurationError, InputTypeError
from ..regularizers import Regularizer
from .searched import Searched

__all__ = ["CostsOfStep", "parts_of"]


@final
class CostsOfStep:
    """What regularizers of costs read of a network: its costs in this step, and those that it would be exported with.

    ``costs``: name -> 0-dim tensor.
    """

    def __init__(self, searched: Searched, costs: Mapping[str, Tensor]) -> None:
        self.searched, self.costs = searched, costs

    @property
    def cost_names(self) -> list[str]:
        return list(self.searched.names)

    def get_cost(self, name: str) -> Tensor:
        if name not in self.costs:
            raise ConfigurationError(f"cost {name!r}: the costs of this run are {list(self.costs)}")
        return self.costs[name]

    def hard_cost(self, name: str) -> float:
        return self.searched.hard([name])[name]

    def reachable_costs(self) -> dict[str, tuple[float, float]]:
        return self.searched.reachable(self.searched.names)


def parts_of(regularizer: Regularizer | None) -> tuple[list[Regularizer], list[Regularizer]]:
    """Those of costs and those of weights; InputTypeError for what is none."""
    if regularizer is None:
        return [], []
    if not isinstance(regularizer, Regularizer):
        raise InputTypeError(
            f"regularizer={regularizer!r}: a Regularizer is needed, such as BaseRegularizer('params', 1e-6), or a sum "
            "of some"
        )
    parts = regularizer.parts
    return [p for p in parts if p.of == "costs"], [p for p in parts if p.of == "weights"]
