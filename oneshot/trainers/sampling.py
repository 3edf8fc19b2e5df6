"""Which sampler the decisions of a network have in which phase of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from ..errors import ConfigurationError
from ..mutables import Argmax, GumbelSoftmax, Sampler, Softmax
from ..mutables.temperature import Temperature

__all__ = ["Sampling", "as_temperature"]


@final
@dataclass(frozen=True)
class Sampling:
    """Warm-up: the mixture at the alphas as they are; fine-tuning: the argmax path; search: ``kind`` and ``hard``.

    ``kind``: ``'softmax'``, or ``'gumbel'`` with noise that is drawn once per step; ``hard``: one candidate at a time.

    >>> Sampling("gumbel", True, Temperature(10.0, 0.1, "linear")).of("search", 1.0)
    GumbelSoftmax(temperature=0.1, hard=True)
    """

    kind: Literal["softmax", "gumbel"]
    hard: bool
    temperature: Temperature

    def __post_init__(self) -> None:
        if self.kind not in ("softmax", "gumbel"):
            raise ConfigurationError(f"sampling={self.kind!r}: allowed are 'softmax' and 'gumbel'")
        if not isinstance(self.hard, bool):
            raise ConfigurationError(f"hard={self.hard!r}: True or False is needed")

    def of(self, phase: str, fraction: float) -> Sampler:
        """The sampler of a step; ``fraction`` of the search, from 0 to 1."""
        if phase == "finetune":
            return Argmax()
        temperature = self.temperature.at(fraction)
        if phase == "search" and self.kind == "gumbel":
            return GumbelSoftmax(temperature, self.hard)
        return Softmax(temperature, self.hard and phase == "search")


def as_temperature(temperature: float | Temperature) -> Temperature:
    """A number as a constant temperature."""
    return temperature if isinstance(temperature, Temperature) else Temperature(temperature)
