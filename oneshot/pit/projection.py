"""Masks onto limits of costs: the network that stays is within all of them, and what is cut is worth least.

A unit is worth its |alpha|, in which the gradients of task and costs have been gathered: to weigh it by its cost once
more would order the units anew, and the network with them. The smallest go first, and as little as they can: just below
the threshold; those that come back where there is room, just above it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from ..errors import InfeasibleTargetError
from ..mutables.masks import THRESHOLD, KernelMask, Mask, kernel_scores, octaves
from .mask_set import MaskSet
from .selection import USED

__all__ = ["Projection"]

_MARGIN = 0.02  # what is switched moves so far beyond the threshold: less, and the next step would switch it back
_OFF, _ON = THRESHOLD - _MARGIN, THRESHOLD + _MARGIN
_HALVINGS = 14  # of an interval of alphas: to 6e-5

Costs = Callable[[Tensor], Tensor]  # sizes of the axes, float64 -> the costs, each divided by its limit


class _Steps(NamedTuple):
    """What can be switched at once: of each its axis, its worth, and the size that it takes, all of shape (steps,)."""

    axis: Tensor
    worth: Tensor
    size: Tensor


@final
class Projection:
    """The masks of one network, with ``costs`` of which none may be above 1; all in place, without gradient."""

    def __init__(self, masks: MaskSet, costs: Costs) -> None:
        self.masks, self.costs = masks, costs
        self.lowest = torch.tensor(masks.lowest(learning=True), dtype=torch.float64)
        self.n_channels = len(masks.channels)

    @torch.no_grad()
    def __call__(self, *, fills: bool) -> None:
        """Cut down to the limits; with ``fills`` switch on again what fits, if less than 95 % of every limit is used.

        InfeasibleTargetError if the smallest masks are still above one.
        """
        if fills:
            self.lift()
        used = self._used()
        while bool((used > 1).any()):
            self._cut(used)
            used = self._used()
        if fills and float(used.max()) < USED:
            self._fill()

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
        return torch.tensor([float(f"{value:.15g}") for value in self.costs(self._sizes()).tolist()])

    def _slopes(self) -> Tensor:
        """d costs / d sizes at the sizes of now, of shape (costs, axes)."""
        with torch.enable_grad():
            sizes = self._sizes().requires_grad_()
            costs = self.costs(sizes)
            every = [torch.autograd.grad(c, sizes, retain_graph=True, allow_unused=True)[0] for c in costs]
        found = torch.stack([torch.zeros_like(sizes) if g is None else g for g in every])
        return found.cpu()

    # ---- cutting -----------------------------------------------------------------------------------------------------

    def _cut(self, used: Tensor) -> None:
        """Switch off about half of what is too much, and at least one step."""
        violated = used > 1
        slopes = self._slopes()[violated].clamp(min=0).sum(0)
        steps, units = self._channel_steps(off=True)
        steps, n_channel_steps = self._with_kernels(steps), len(steps.axis)
        if len(steps.axis) == 0:
            self._cut_dilations()
            return
        saved = slopes[steps.axis] * steps.size
        if not bool((saved > 0).any()):
            saved = torch.ones_like(saved)  # a cost in jumps says nothing here; cut what is worth least
        order = torch.argsort(steps.worth, stable=True)
        need = float((used[violated] - 1).sum()) / 2
        n = max(1, int((saved[order].cumsum(0) <= need).sum()))
        chosen = torch.zeros(len(order), dtype=torch.bool)
        chosen[order[:n]] = True
        self._set(units, chosen[:n_channel_steps], on=False)
        for axis in steps.axis[n_channel_steps:][chosen[n_channel_steps:]].tolist():
            self._shorten(self.masks.kernels[axis - self.n_channels].kernel_label)

    def _channel_steps(self, *, off: bool) -> tuple[_Steps, Tensor]:
        """Of each channel mask that learns, its units in whole multiples, those first that are first switched.

        And the step of every unit, -1 for those that stay as they are.
        """
        masks = self.masks
        step_of = torch.full((masks.units,), -1, dtype=torch.int64)
        axes: list[int] = []
        worths, sizes = [], []
        for i, axis in enumerate(masks.channels):
            mask = masks[axis.label]
            if not mask.alpha.requires_grad:
                continue
            theta, kept = mask.alpha.detach().abs().cpu(), mask.hard().detach().cpu() > 0
            n, granularity, start = int(kept.sum()), mask.granularity, masks.start(axis.label)
            # From the largest, of equal ones the last first: what is switched off last, and on first.
            ranked = len(theta) - 1 - torch.argsort(theta.flip(0), descending=True, stable=True)
            chunks: list[Tensor] = []
            at, goal = n, int(self.lowest[i]) if off else len(theta)
            while at != goal:
                if off:
                    after = max((at - 1) // granularity * granularity, goal)
                    chunks.append(ranked[after:at])
                else:
                    after = min((at // granularity + 1) * granularity, goal)
                    chunks.append(ranked[at:after])
                at = after
            for units in chunks:
                step_of[start + units] = len(axes)
                axes.append(i)
                worths.append(float(theta[units].mean()))
                sizes.append(len(units))
        tensors = torch.tensor(axes, dtype=torch.int64), torch.tensor(worths), torch.tensor(sizes, dtype=torch.float64)
        return _Steps(*tensors), step_of

    def _with_kernels(self, steps: _Steps) -> _Steps:
        """One step more for every kernel that can become shorter."""
        axes, worths, sizes = [], [], []
        for i, kernel in enumerate(self.masks.kernels):
            mask = self.masks[kernel.kernel_label]
            flags = mask.hard().detach()
            first = len(flags) - int(flags.sum())  # the oldest tap that is there
            if mask.alpha.requires_grad and first < len(flags) - 1:
                score = kernel_scores(mask.alpha.detach())[first]
                axes.append(self.n_channels + i)
                worths.append(float(score) / (first + 1))
                before, after = mask.sizes[int(flags.sum()) - 1], mask.sizes[int(flags.sum()) - 2]
                sizes.append(before - after)
        more = torch.tensor(axes, dtype=torch.int64), torch.tensor(worths), torch.tensor(sizes, dtype=torch.float64)
        return _Steps(*(torch.cat(pair) for pair in zip(steps, more, strict=True)))

    def _set(self, step_of: Tensor, chosen: Tensor, *, on: bool) -> None:
        """Move the alphas of the units of these steps over the threshold, as little as possible."""
        flags = torch.zeros(len(step_of), dtype=torch.bool)
        if len(chosen):
            flags = (step_of >= 0) & chosen[step_of.clamp(min=0)]
        for axis in self.masks.channels:
            alpha, start = self.masks[axis.label].alpha, self.masks.start(axis.label)
            of_axis = flags[start : start + len(alpha)].to(alpha.device)
            if not bool(of_axis.any()):
                continue
            size = alpha.abs()
            moved = size.clamp(min=_ON) if on else size.clamp(max=_OFF)
            alpha.copy_(torch.where(of_axis, moved, alpha))

    def _shorten(self, label: str) -> None:
        """Switch off the oldest tap: its score, the sum of |beta| up to it, comes down to the threshold."""
        mask = self.masks[label]
        assert isinstance(mask, KernelMask)
        flags = mask.hard()
        first = len(flags) - int(flags.sum())
        score = kernel_scores(mask.alpha)[first]
        mask.alpha[: first + 1] *= _OFF / score
        # The next one stays, unless it had nothing of its own.
        if first + 1 < len(mask.alpha) - 1:
            missing = _ON - kernel_scores(mask.alpha)[first + 1]
            mask.alpha[first + 1] += missing.clamp(min=0)

    def _cut_dilations(self) -> None:
        """The last resort, where no channel and no tap can go any more: the next larger dilation."""
        for kernel in self.masks.kernels:
            if not kernel.dilated:
                continue
            mask = self.masks[kernel.dilation_label]
            now = mask.decision()
            if mask.alpha.requires_grad and now < 2 ** (octaves(kernel.taps) - 1):
                mask.decide(2 ** now.bit_length())
                return
        raise InfeasibleTargetError(
            f"targets: the smallest masks need {self._used().tolist()} of them; give larger ones, or search more of "
            "the network"
        )

    # ---- filling -----------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Switch on what is worth most for what it takes, as long as it fits into every limit."""
        closed: set[int] = set()
        singly = False
        while True:
            steps, units = self._channel_steps(off=False)
            takes = self._slopes().clamp(min=0)[:, steps.axis] * steps.size
            room = 1 - self._used()
            is_open = torch.tensor([axis not in closed for axis in steps.axis.tolist()], dtype=torch.bool)
            fits = is_open & (takes <= room[:, None]).all(0)
            if not bool(fits.any()):
                return
            order = torch.argsort(steps.worth, descending=True, stable=True)
            order = order[fits[order]]
            n = 1 if singly else max(1, int((takes[:, order].cumsum(1) <= room[:, None] / 2).all(0).sum()))
            chosen = torch.zeros(len(steps.axis), dtype=torch.bool)
            chosen[order[:n]] = True
            before = [self.masks[axis.label].alpha.clone() for axis in self.masks.channels]
            self._set(units, chosen, on=True)
            if not bool((self._used() > 1).any()):
                continue
            # The slope had promised too little.
            for axis, alpha in zip(self.masks.channels, before, strict=True):
                self.masks[axis.label].alpha.copy_(alpha)
            if n == 1:
                closed.add(int(steps.axis[order[0]]))
            singly = True
