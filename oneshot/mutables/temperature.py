"""How the temperature of a sampler changes over a search."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, final

from ..errors import ConfigurationError

__all__ = ["Temperature"]


@final
@dataclass(frozen=True)
class Temperature:
    """T as a function of the fraction f of the search, from ``start`` at f = 0 to ``end`` at f = 1, both exactly.

    * ``'constant'``: start, and no end is given;
    * ``'linear'``: (1 - f) start + f end (GDAS, arXiv 1910.04465: 10 to 0.1);
    * ``'exponential'``: start^(1 - f) end^f, the same factor in every epoch (FBNet, arXiv 1812.03443: 5 times 0.956
      per epoch).

    ``floor``: T is never below it. Of two logits that differ by 1, softmax(alpha / T) has a slope of 0.2 at T = 1, of
    5e-4 at 0.1 and of 4e-42 at 0.01: below about 0.05 nothing is learnt any more. ConfigurationError for numbers that
    are not finite and above 0 (floor: 0 or more), for an unknown kind, and for an end without need or a need of one.

    >>> Temperature(10.0, 0.1, "linear").at(0.5)
    5.05
    >>> falling = Temperature(8.0, 0.125, "exponential", floor=0.5)
    >>> falling.at(0), round(falling.at(0.5), 12), falling.at(1)
    (8.0, 1.0, 0.5)
    """

    start: float
    end: float | None = None
    kind: Literal["constant", "linear", "exponential"] = "constant"
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "linear", "exponential"):
            raise ConfigurationError(
                f"Temperature(kind={self.kind!r}): allowed are 'constant', 'linear' and 'exponential'"
            )
        if (self.end is None) != (self.kind == "constant"):
            needed = "no end" if self.kind == "constant" else "an end"
            raise ConfigurationError(
                f"Temperature({self.start!r}, end={self.end!r}, kind={self.kind!r}): {self.kind!r} needs {needed}"
            )
        for name, value in (("start", self.start), ("end", self.end)):
            if value is not None and not (_is_finite(value) and value > 0):
                raise ConfigurationError(f"Temperature({name}={value!r}): a finite number above 0 is needed")
        if not (_is_finite(self.floor) and 0 <= self.floor <= self.start):
            raise ConfigurationError(
                f"Temperature(floor={self.floor!r}): a number from 0 to the start, {self.start!r}, is needed"
            )

    def at(self, fraction: float) -> float:
        """T after this fraction of the search, from 0 to 1."""
        if not 0 <= fraction <= 1:
            raise ConfigurationError(f"Temperature.at({fraction!r}): a fraction from 0 to 1 is needed")
        if self.end is None:
            value = self.start
        elif self.kind == "linear":
            value = (1 - fraction) * self.start + fraction * self.end
        else:
            value = self.start ** (1 - fraction) * self.end**fraction
        return float(max(value, self.floor))


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
