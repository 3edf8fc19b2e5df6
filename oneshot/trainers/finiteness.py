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
        """Values of 0 dimensions, all of one step, on any devices."""
        by_device: dict[torch.device, dict[str, Tensor]] = {}
        for name, value in values.items():
            by_device.setdefault(value.device, {})[name] = value.detach().float()
        for of_one in by_device.values():
            self._waiting.append((step, list(of_one), torch.stack(list(of_one.values()))))
        on_cpu = all(stacked.device.type == "cpu" for _, _, stacked in self._waiting)
        if on_cpu or len(self._waiting) >= _AT_ONCE:
            self.look()

    def look(self) -> None:
        """Look at all that wait: before a checkpoint, a log line, the end of an epoch."""
        waiting, self._waiting = self._waiting, []
        by_step: dict[int, dict[str, float]] = {}
        for device in dict.fromkeys(stacked.device for _, _, stacked in waiting):
            mine = [(step, names, stacked) for step, names, stacked in waiting if stacked.device == device]
            numbers = iter(torch.cat([stacked for _, _, stacked in mine]).tolist())
            for step, names, _ in mine:
                by_step.setdefault(step, {}).update({name: next(numbers) for name in names})
        for step in sorted(by_step):
            if not all(abs(value) < float("inf") for value in by_step[step].values()):
                self._report(step, by_step[step])

    def forget(self) -> None:
        """What waits is of a run that is given up."""
        self._waiting = []
