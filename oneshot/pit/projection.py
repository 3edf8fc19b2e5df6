"""Masks onto limits of costs: the network that stays is within all of them, and what is cut is worth least.

A unit is worth its |alpha|, in which the gradients of task and costs have been gathered: to weigh it by its cost once
more would order the units anew, and the network with them. The smallest go first, and as little as they can: just below
the threshold; those that come back where there is room, just above it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InfeasibleTargetError
from ..mutables.masks import THRESHOLD, Mask, kernel_scores
from .axes import KernelAxis
from .mask_set import MaskSet
from .selection import USED

__all__ = ["Projection"]

_MARGIN = 0.02  # what is switched moves so far beyond the threshold: less, and the next step would switch it back
_OFF, _ON = THRESHOLD - _MARGIN, THRESHOLD + _MARGIN
_HALVINGS = 14  # of an interval of alphas: to 6e-5

Costs = Callable[[Tensor], Tensor]  # sizes of the axes, float64 -> the costs, each divided by its limit


class _Steps(NamedTuple):
    """What can be switched at once: of each its axis, its worth, and the size that it takes, all of shape (steps,).

    Those of channels come first; ``of_unit``: the step of each unit, -1 for one that stays as it is. Then those of
    kernels, whose masks are ``labels``.
    """

    axis: Tensor
    worth: Tensor
    size: Tensor
    of_unit: Tensor
    labels: list[str]


@final
class Projection:
    """The masks of one network, with ``costs`` of which none may be above 1; all in place, without gradient."""

    def __init__(self, masks: MaskSet, costs: Costs) -> None:
        self.masks, self.costs = masks, costs
        self.lowest = masks.lowest(learning=True)
        self.n_channels = len(masks.channels)

    @torch.no_grad()
    def __call__(self, *, fills: bool) -> None:
        """Cut down to the limits; with ``fills`` switch on again what fits, if less than 95 % of every limit is used.

        InfeasibleTargetError if the smallest masks are still above one.
        """
        used = self._cut_all()
        while fills and float(used.max()) < USED:
            before = [mask.alpha.clone() for _, mask in self.masks.items()]
            self._fill()
            if float(self._used().max()) < USED:  # what is off does not fit: with more on, something else goes
                self.lift()
                self._cut_all()
                self._fill()
            if float(self._used().max()) <= float(used.max()):
                for (_, mask), alpha in zip(self.masks.items(), before, strict=True):
                    mask.alpha.copy_(alpha)
                return
            used = self._used()

    @torch.no_grad()
    def lift(self) -> None:
        """Raise all alphas alike, by as much as it takes that 95 % of a limit are used; nothing where they are.

        Adam moves masks at one speed, and when they come to the threshold, they come there together: what a common step
        has taken is given back by a common one, which leaves their order as it was.
        """
        if float(self._used().max()) >= USED:
            return
        masks = [mask for _, mask in self.masks.items() if mask.alpha.requires_grad]
        before = [mask.alpha.abs() for mask in masks]
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            self._raise(masks, before, middle)
            low, high = (low, middle) if float(self._used().max()) >= USED else (middle, high)
        self._raise(masks, before, high)

    def _raise(self, masks: Sequence[Mask], before: Sequence[Tensor], by: float) -> None:
        for mask, alpha in zip(masks, before, strict=True):
            mask.alpha.copy_((alpha + by).clamp(max=1.0))

    def _sizes(self) -> Tensor:
        return self.masks.sizes(self.masks().hard)

    def _used(self) -> Tensor:
        # In 15 digits, as costs are compared everywhere.
        return torch.tensor([float(f"{c:.15g}") for c in self.costs(self._sizes()).tolist()], dtype=torch.float64)

    def _slopes(self) -> Tensor:
        """d costs / d sizes at the sizes of now, of shape (costs, axes)."""
        with torch.enable_grad():
            sizes = self._sizes().requires_grad_()
            costs = self.costs(sizes)
            every = [torch.autograd.grad(c, sizes, retain_graph=True, allow_unused=True)[0] for c in costs]
        found = torch.stack([torch.zeros_like(sizes) if g is None else g for g in every])
        return found.cpu()

    # ---- cutting -----------------------------------------------------------------------------------------------------

    def _cut_all(self) -> Tensor:
        """Cut until no limit is exceeded; what is used then."""
        used = self._used()
        while bool((used > 1).any()):
            self._cut(used)
            used = self._used()
        return used

    def _cut(self, used: Tensor) -> None:
        """Switch off about half of what is too much, and at least one step.

        A step that would leave a limit unused waits for those that do not: what is left of it could not be filled.
        """
        steps = self._steps(on=False)
        if len(steps.axis) == 0:
            raise InfeasibleTargetError(
                f"targets: the smallest masks are {used.tolist()} times as large; give larger ones, or search more of "
                "the network"
            )
        violated = used > 1
        saved = self._slopes()[violated].clamp(min=0).sum(0)[steps.axis] * steps.size
        if not bool((saved > 0).any()):
            saved = torch.ones_like(saved)  # a cost in jumps says nothing here; cut what is worth least
        need = float((used[violated] - 1).sum())
        coarse = saved > need + (1 - USED)
        order = torch.argsort(steps.worth, stable=True)
        order = torch.cat([order[~coarse[order]], order[coarse[order]]])
        n = max(1, int((saved[order].cumsum(0) <= need / 2).sum()))
        self._switch(steps, order[:n], on=False)

    # ---- filling -----------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Switch on what is worth most, as long as it fits into every limit."""
        closed: set[int] = set()
        singly = False
        masks = [mask for _, mask in self.masks.items()]
        while True:
            steps = self._steps(on=True)
            takes = self._slopes().clamp(min=0)[:, steps.axis] * steps.size
            room = 1 - self._used()
            is_open = torch.tensor([axis not in closed for axis in steps.axis.tolist()], dtype=torch.bool)
            # What costs nothing is not there: units of a candidate that is not decided for.
            fits = is_open & (takes <= room[:, None]).all(0) & (takes > 0).any(0)
            if not bool(fits.any()):
                return
            order = torch.argsort(steps.worth, descending=True, stable=True)
            order = order[fits[order]]
            n = 1 if singly else max(1, int((takes[:, order].cumsum(1) <= room[:, None] / 2).all(0).sum()))
            before = [mask.alpha.clone() for mask in masks]
            self._switch(steps, order[:n], on=True)
            if not bool((self._used() > 1).any()):
                continue
            # The slope had promised too little.
            for mask, alpha in zip(masks, before, strict=True):
                mask.alpha.copy_(alpha)
            if n == 1:
                closed.add(int(steps.axis[order[0]]))
            singly = True

    # ---- steps -------------------------------------------------------------------------------------------------------

    def _steps(self, *, on: bool) -> _Steps:
        """What can be switched on, or off, next: of each channel mask its units in whole multiples, of each kernel one.

        Steps of one mask come in the order in which they are switched.
        """
        masks = self.masks
        of_unit = torch.full((masks.units,), -1, dtype=torch.int64)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        n_steps = 0
        for i, axis in enumerate(masks.channels):
            mask = masks[axis.label]
            if not mask.alpha.requires_grad:
                continue
            theta, kept = mask.alpha.detach().abs().cpu(), int(mask.hard().detach().sum())
            # From the largest, of equal ones the last first: what is switched off last, and on first.
            ranked = len(theta) - 1 - torch.argsort(theta.flip(0), descending=True, stable=True)
            units = ranked[kept:] if on else ranked[self.lowest[i] : kept].flip(0)
            if len(units) == 0:
                continue
            place = torch.arange(len(units))
            g = mask.granularity
            chunk = (kept + place) // g - kept // g if on else -(-kept // g) - 1 - (kept - 1 - place) // g
            n = int(chunk[-1]) + 1
            sizes = torch.bincount(chunk, minlength=n).double()
            worth = torch.zeros(n, dtype=torch.float64).index_add_(0, chunk, theta[units].double()) / sizes
            of_unit[masks.start(axis.label) + units] = n_steps + chunk
            parts.append((torch.full((n,), i), worth, sizes))
            n_steps += n
        of_kernels, labels = self._kernel_steps(on=on)
        parts.append(of_kernels)
        axis_of, worths, sizes = (torch.cat(column) for column in zip(*parts, strict=True))
        return _Steps(axis_of, worths, sizes, of_unit, labels)

    def _kernel_steps(self, *, on: bool) -> tuple[tuple[Tensor, Tensor, Tensor], list[str]]:
        """The next tap, and the next dilation, of each kernel."""
        rows: list[tuple[int, float, float]] = []
        labels: list[str] = []
        for i, kernel in enumerate(self.masks.kernels, start=self.n_channels):
            masks = [self.masks[label] for label in _labels(kernel)]
            scores = [_prefix_sums(mask.alpha) for mask in masks]
            first = [int((score > THRESHOLD).argmax()) for score in scores]  # what is there begins here
            now = _taps(kernel, first)
            for which, (label, mask, score) in enumerate(zip(_labels(kernel), masks, scores, strict=True)):
                place = first[which] - 1 if on else first[which]
                if not mask.alpha.requires_grad or not 0 <= place < len(score) - 1:
                    continue
                after = [*first]
                after[which] += -1 if on else 1
                size = abs(_taps(kernel, after) - now)
                if size:
                    rows.append((i, float(score[place]) / (place + 1), size))
                    labels.append(label)
        axis = torch.tensor([row[0] for row in rows], dtype=torch.int64)
        numbers = torch.tensor([row[1:] for row in rows], dtype=torch.float64).reshape(-1, 2)
        return (axis, numbers[:, 0], numbers[:, 1]), labels

    def _switch(self, steps: _Steps, chosen: Tensor, *, on: bool) -> None:
        """Move the alphas of these steps over the threshold, as little as possible."""
        flags = torch.zeros(len(steps.axis), dtype=torch.bool)
        flags[chosen] = True
        n_channel_steps = len(steps.axis) - len(steps.labels)
        is_switched = torch.zeros(len(steps.of_unit), dtype=torch.bool)
        if n_channel_steps:
            is_switched = (steps.of_unit >= 0) & flags[steps.of_unit.clamp(min=0)]
        for axis in self.masks.channels:
            alpha, start = self.masks[axis.label].alpha, self.masks.start(axis.label)
            of_axis = is_switched[start : start + len(alpha)].to(alpha.device)
            if not bool(of_axis.any()):
                continue
            size = alpha.abs()
            if on:  # with those that stay only because some have to
                of_axis = of_axis | (self.masks[axis.label].hard() > 0)
            alpha.copy_(torch.where(of_axis, size.clamp(min=_ON) if on else size.clamp(max=_OFF), alpha))
        for label, is_chosen in zip(steps.labels, flags[n_channel_steps:].tolist(), strict=True):
            if is_chosen:
                _step_kernel(self.masks[label], on=on)


def _labels(kernel: KernelAxis) -> list[str]:
    return [kernel.kernel_label, *([kernel.dilation_label] if kernel.dilated else [])]


def _prefix_sums(alpha: Tensor) -> NDArray[np.float64]:
    """|a_0| + ... + |a_i| for each i, with 1 for the last |a|: a tap, or a dilation, is there if it is above 0.5."""
    size = alpha.detach().abs().cpu().double().numpy()
    size[-1] = 1.0
    found: NDArray[np.float64] = size.cumsum()
    return found


def _taps(kernel: KernelAxis, first: Sequence[int]) -> float:
    """How many taps of a side are left, if taps begin with the first of these, and powers of 2 with the second."""
    counts = np.bincount(next(iter(kernel.positions.values())).numpy(), minlength=kernel.taps)
    there = np.arange(kernel.taps) >= first[0]
    if kernel.dilated:
        distance = np.arange(kernel.taps - 1, -1, -1)
        there &= distance % 2 ** first[1] == 0
    return float(counts[there].sum())


def _step_kernel(mask: Mask, *, on: bool) -> None:
    """Switch the next tap, or the next dilation, of one mask as little as possible."""
    size = mask.alpha.abs()
    score = kernel_scores(size)
    first = int((score > THRESHOLD).to(torch.int64).argmax())
    place = first - 1 if on else first
    if on:
        size[place] += _ON - score[place]
    else:
        size[: place + 1] *= _OFF / score[place]
        if place + 1 < len(size) - 1:  # the next one stays, unless it had nothing of its own
            size[place + 1] += (_ON - _OFF - size[place + 1]).clamp(min=0)
    mask.alpha.copy_(size)
