"""What a network pays for its costs in a search, in proportion to each."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import final

import torch
from torch import Tensor

from ..errors import ConfigurationError

__all__ = ["Penalty"]


@final
class Penalty:
    """sum_k s_k C_k / N_k.

    Args:
        strength: s_k in loss per unit of the cost, at least 0: one number for all costs, or cost -> number, and a cost
            that is not named is not paid for.
        normalize: N_k is the largest cost, that of the whole network; else 1.
        names: the costs; ``refer_to`` is called later, if it normalizes.

    >>> pay = Penalty({"macs": 0.5}, False, ["macs", "params"])
    >>> pay({"macs": torch.tensor(90.0), "params": torch.tensor(9.0)})
    tensor(45.)
    """

    def __init__(self, strength: float | Mapping[str, float], normalize: bool, names: Collection[str]) -> None:
        given = dict(strength) if isinstance(strength, Mapping) else dict.fromkeys(names, strength)
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ConfigurationError(f"strength: unknown costs {unknown}; the network has {list(names)}")
        if not names and not isinstance(strength, Mapping):
            _check("strength", strength)
        for name, number in given.items():
            _check(f"strength: {name}", number)
        self.strength, self.normalize = given, normalize
        self.full: dict[str, float] = {}

    def refer_to(self, reachable: Mapping[str, tuple[float, float]]) -> None:
        """Take over the (smallest, largest) costs; ConfigurationError for one that cannot be divided by."""
        self.full = {name: high for name, (_, high) in reachable.items()}
        if self.normalize and not all(self.full[name] > 0 for name in self.strength):
            raise ConfigurationError(f"normalize=True: the costs of the whole network are {self.full}, one is 0")

    @property
    def pulls(self) -> bool:
        return any(self.strength.values())

    def __call__(self, costs: Mapping[str, Tensor]) -> Tensor:
        """The penalty; ``costs``: cost -> 0-dim tensor."""
        terms = [s / (self.full[k] if self.normalize else 1.0) * costs[k] for k, s in self.strength.items()]
        return torch.stack(terms).sum() if terms else torch.zeros(())


def _check(what: str, number: object) -> None:
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if not is_number or not math.isfinite(number) or number < 0:  # type: ignore[arg-type, operator]
        raise ConfigurationError(f"{what} {number!r}; a finite number of at least 0 is needed")
