"""When a regularizer acts, and how much of it: a factor in [0, 1] for every epoch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final

from ..errors import ConfigurationError

__all__ = ["Schedule"]

_RAMPS: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: t,
    "cosine": lambda t: (1 - math.cos(math.pi * t)) / 2,
}


@final
@dataclass(frozen=True)
class Schedule:
    """Acts in the epochs start, start + every, start + 2 every, ... before ``end``; in the others its factor is 0.

    ``end``: None for no end; a ramp is then over at the number of epochs. ``ramp``: the factor from the first epoch
    (t = 0) to the last one (t = 1) of [start, end): 1, t, or (1 - cos(pi t)) / 2. Without an epoch the factor is 1.
    ConfigurationError for a schedule that never acts.

    >>> [round(Schedule(start=2, end=6, ramp="linear").factor(epoch, 8), 3) for epoch in range(8)]
    [0.0, 0.0, 0.0, 0.333, 0.667, 1.0, 0.0, 0.0]
    >>> [Schedule(every=4).factor(epoch, 9) for epoch in range(9)]
    [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    """

    start: int = 0
    end: int | None = None
    every: int = 1
    ramp: Literal["constant", "linear", "cosine"] = "constant"

    def __post_init__(self) -> None:
        numbers = {"start": self.start, "every": self.every, **({} if self.end is None else {"end": self.end})}
        for name, value in numbers.items():
            least = 0 if name == "start" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigurationError(f"Schedule({name}={value!r}): an integer of at least {least} is needed")
        if self.end is not None and not self.start < self.end:
            raise ConfigurationError(f"Schedule(start={self.start}, end={self.end}): no epoch lies between them")
        if self.end is not None and self.every > self.end - self.start:
            raise ConfigurationError(
                f"Schedule(every={self.every}): longer than the {self.end - self.start} epochs from {self.start} to "
                f"{self.end}"
            )
        if self.ramp not in _RAMPS:
            raise ConfigurationError(f"Schedule(ramp={self.ramp!r}): allowed are {sorted(_RAMPS)}")

    def factor(self, epoch: int | None, n_epochs: int | None = None) -> float:
        """The factor in ``epoch``, counted from 0, of ``n_epochs``."""
        if epoch is None:
            return 1.0
        end = self.end if self.end is not None else n_epochs
        is_over = self.end is not None and epoch >= self.end
        if epoch < self.start or is_over or (epoch - self.start) % self.every:
            return 0.0
        if self.ramp == "constant":
            return 1.0
        if end is None:
            raise ConfigurationError(f"Schedule(ramp={self.ramp!r}): without an end it needs n_epochs at every call")
        return _RAMPS[self.ramp](min((epoch - self.start) / max(end - 1 - self.start, 1), 1.0))
