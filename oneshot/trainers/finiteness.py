"""Whether the numbers of the steps are numbers, without waiting for a GPU in each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import final

import torch
from torch import Tensor

__all__ = ["Finiteness"]

_AT_ONCE = 32


@final
class Finiteness:
    """Losses and costs of the steps, looked at in the step itself on the CPU, and on a GPU 32 steps at a time.

    ``report(step, values)`` is called for the first step with a value that is infinite or no number; it raises.
    """

    def __init__(self, report: Callable[[int, Mapping[str, float]], None]) -> None:
        self._report = report
        self._waiting: list[tuple[int, list[str], Tensor]] = []

    def add(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Values of 0 dimensions, all of one step."""
        if not values:
            return
        names = list(values)
        stacked = torch.stack([value.detach().float() for value in values.values()])
        self._waiting.append((step, names, stacked))
        if stacked.device.type == "cpu" or len(self._waiting) >= _AT_ONCE:
            self.look()

    def look(self) -> None:
        """Look at all that wait: before a checkpoint, a log line, the end of an epoch."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        found = torch.cat([stacked for _, _, stacked in waiting]).tolist()
        at = 0
        for step, names, _ in waiting:
            values = dict(zip(names, found[at : at + len(names)], strict=True))
            at += len(names)
            if not all(abs(value) < float("inf") for value in values.values()):
                self._report(step, values)
