"""All masks of one network, computed together: one flat vector of zeros and ones per step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ArchMismatchError, ConfigurationError
from ..graph.dimensions import Dimension
from ..mutables.masks import (
    THRESHOLD,
    ChannelMask,
    DilationMask,
    KernelMask,
    Mask,
    dilation_count,
    kept_units,
    magnitude,
    octaves,
    straight_through,
)
from .axes import ChannelAxis, KernelAxis

__all__ = ["FlatMasks", "MaskSet"]


class FlatMasks(NamedTuple):
    """Every unit and tap of a network, then a one: ``hard`` 0 or 1, straight through; ``soft`` its relaxed share."""

    hard: Tensor
    soft: Tensor


class MaskSet(nn.Module):
    """The masks of some axes by label, and where they lie in the flat vector.

    Units of channel axes come first, then the taps of kernel axes, then one element that is always 1, for all indices
    that are not searched. ``places(dimension)``: for each index of a dimension its element. ``own``: masks placed by
    hand, by label; the others are made here.

    In the vector, a tap is h(theta^beta) h(theta^gamma), h(x) = 1[x > 0.5]; its relaxed share is
    theta^beta_j / (j + 1) * theta^gamma_j / n_j, so that the relaxed size of a kernel of K taps starts at K.
    """

    def __init__(
        self, channels: Sequence[ChannelAxis], kernels: Sequence[KernelAxis], own: Mapping[str, Mask] | None = None
    ) -> None:
        super().__init__()
        self.channels, self.kernels = tuple(channels), tuple(kernels)
        own = own or {}
        made: dict[str, Mask] = {}
        for axis in channels:
            made[axis.label] = own.get(axis.label) or ChannelMask(axis.units, granularity=axis.granularity)
        for kernel in kernels:
            made[kernel.kernel_label] = own.get(kernel.kernel_label) or KernelMask(kernel.taps)
            if kernel.dilated:
                made[kernel.dilation_label] = own.get(kernel.dilation_label) or DilationMask(kernel.taps)
        self.by_label = nn.ModuleDict({label.replace(".", "/"): mask for label, mask in made.items()})
        self._set_channel_buffers()
        self._set_kernel_buffers()
        self._starts = self._flat_starts()
        self._set_size_buffers()

    # ---- a mapping of labels to masks ----------------------------------------------------------------------------

    def __getitem__(self, label: str) -> Any:
        key = label.replace(".", "/")
        if key not in self.by_label:
            raise ConfigurationError(f"no mask {label!r}; there are {list(self)}")
        return self.by_label[key]

    def __iter__(self) -> Iterator[str]:
        return (key.replace("/", ".") for key in self.by_label)

    def __len__(self) -> int:
        return len(self.by_label)

    def items(self) -> list[tuple[str, Mask]]:
        return [(label, self[label]) for label in self]

    def decisions(self) -> dict[str, Any]:
        """Label -> kept units, kernel size or dilation, JSON-ready."""
        return {label: mask.decision() for label, mask in self.items()}

    def decide(self, arch: Mapping[str, Any]) -> None:
        """Set every mask; ArchMismatchError, with nothing changed, unless it has one fitting decision for each."""
        missing, extra = [x for x in self if x not in arch], [x for x in arch if x not in set(self)]
        if missing or extra:
            raise ArchMismatchError(
                f"missing labels {missing}, labels {extra} that the model does not have; its labels are {list(self)}"
            )
        before = {label: mask.alpha.detach().clone() for label, mask in self.items()}
        try:
            for label, mask in self.items():
                mask.decide(arch[label])
        except ConfigurationError as error:
            with torch.no_grad():
                for label, mask in self.items():
                    mask.alpha.copy_(before[label])
            raise ArchMismatchError(f"label {label!r}: {error}") from error

    def clip_(self) -> None:
        for _, mask in self.items():
            mask.clip_()

    # ---- the flat vector -----------------------------------------------------------------------------------------

    def _set_channel_buffers(self) -> None:
        sizes = torch.tensor([axis.units for axis in self.channels], dtype=torch.int64)
        self._keep("segments", torch.repeat_interleave(torch.arange(len(sizes)), sizes))
        self._keep("granularity", torch.tensor([self[a.label].granularity for a in self.channels], dtype=torch.int64))
        self._exact = all(self[a.label].granularity == 1 for a in self.channels)

    def _set_kernel_buffers(self) -> None:
        """Kernels in rows of one matrix, the newest tap in the last column; dilations from the first column."""
        taps = max((k.taps for k in self.kernels), default=1)
        steps = max((octaves(k.taps) for k in self.kernels), default=1)
        n = len(self.kernels)
        # Integers and flags, which a cast of the network to another precision leaves alone.
        place, divisor = torch.zeros(n, taps, dtype=torch.int64), torch.ones(n, taps, dtype=torch.int64)
        step_place, is_last = torch.zeros(n, steps, dtype=torch.int64), torch.zeros(n, steps, dtype=torch.bool)
        start, step_start = 1, 1  # element 0 of what is gathered is a zero
        for row, kernel in enumerate(self.kernels):
            k, g = kernel.taps, octaves(kernel.taps)
            place[row, taps - k :] = torch.arange(start, start + k)
            divisor[row, taps - k :] = torch.arange(1, k + 1)
            start += k
            if kernel.dilated:
                step_place[row, :g] = torch.arange(step_start, step_start + g)
                is_last[row, g - 1] = True
                divisor[row, taps - k :] *= dilation_count(k).sum(0).to(torch.int64)
                step_start += g
            else:
                is_last[row, 0] = True  # a step of 1 reaches every tap
        distance = torch.arange(taps - 1, -1, -1)
        reaches = distance % (2 ** torch.arange(steps))[:, None] == 0
        self._keep("tap_place", place)
        self._keep("step_place", step_place)
        self._keep("step_is_last", is_last)
        self._keep("reaches", reaches)
        self._keep("divisor", divisor)
        self._keep("valid_taps", (place > 0).flatten().nonzero().flatten())

    def _keep(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor, persistent=False)

    def _flat_starts(self) -> dict[str, int]:
        starts, at = {}, 0
        for axis in self.channels:
            starts[axis.label], at = at, at + axis.units
        for kernel in self.kernels:
            starts[kernel.kernel_label], at = at, at + kernel.taps
        self.size = at + 1
        return starts

    def _set_size_buffers(self) -> None:
        """Of each element of the vector: its axis, and how many indices of a dimension follow it."""
        axes = [torch.full((axis.units,), i) for i, axis in enumerate(self.channels)]
        counts = [torch.ones(axis.units, dtype=torch.int64) for axis in self.channels]
        for i, kernel in enumerate(self.kernels, start=len(self.channels)):
            axes.append(torch.full((kernel.taps,), i))
            counts.append(torch.bincount(next(iter(kernel.positions.values())), minlength=kernel.taps))
        self._keep("axis_of", torch.cat([*axes, torch.tensor([len(self.channels) + len(self.kernels)])]))
        self._keep("count_of", torch.cat([*counts, torch.zeros(1, dtype=torch.int64)]))

    @property
    def n_axes(self) -> int:
        return len(self.channels) + len(self.kernels)

    def full(self) -> list[int]:
        """The size of each axis: units of channels, taps of a side of a kernel."""
        sides = [len(next(iter(kernel.positions.values()))) for kernel in self.kernels]
        return [axis.units for axis in self.channels] + sides

    def lowest(self) -> list[int]:
        """The smallest size of each axis that its masks can have while they are searched."""
        lowest = [
            min(axis.units, self[axis.label].granularity) if self[axis.label].alpha.requires_grad else axis.units
            for axis in self.channels
        ]
        for kernel, full in zip(self.kernels, self.full()[len(self.channels) :], strict=True):
            searched = self[kernel.kernel_label].alpha.requires_grad
            longest = kernel.dilated and self[kernel.dilation_label].alpha.requires_grad
            # With the largest dilation alone, two taps are left of a kernel of more than two.
            lowest.append(1 if searched else (kernel.taps - 1) // 2 ** (octaves(kernel.taps) - 1) + 1 if longest else full)
        return lowest

    def sizes(self, flat: Tensor) -> Tensor:
        """The size of each axis, float64 of shape (axes,), from the flat vector, hard or soft."""
        total = torch.zeros(self.n_axes + 1, dtype=torch.float64, device=flat.device)
        return total.index_add(0, self.axis_of, flat.to(torch.float64) * self.count_of)[:-1]

    def forward(self) -> FlatMasks:
        """The vector, of shape (units + taps + 1,)."""
        hard, soft = [], []
        if self.channels:
            theta = magnitude(torch.cat([self[axis.label].alpha for axis in self.channels]))
            kept = self._kept(theta.detach()).to(theta.dtype)
            hard.append(theta + (kept - theta).detach())
            # What stays only because something has to stay costs a whole unit, whatever its alpha.
            soft.append(torch.where((kept > 0) & (theta <= THRESHOLD), 1.0, theta))
        if self.kernels:
            one, other = self._taps()
            hard.append(one)
            soft.append(other)
        last = torch.ones(1, dtype=hard[0].dtype if hard else None, device=self.segments.device)
        return FlatMasks(torch.cat([*hard, last]), torch.cat([*soft, last]))

    def _kept(self, theta: Tensor) -> Tensor:
        if not self._exact:
            return kept_units(theta, self.segments, self.granularity)
        return _above_or_largest(theta, self.segments, len(self.channels))

    def _taps(self) -> tuple[Tensor, Tensor]:
        betas = torch.cat([self[k.kernel_label].alpha for k in self.kernels])
        zero = torch.zeros(1, dtype=betas.dtype, device=betas.device)
        beta = magnitude(torch.cat([zero, betas]))[self.tap_place]
        beta = torch.cat([beta[:, :-1], torch.ones_like(beta[:, -1:])], 1).cumsum(1)
        gammas = [self[k.dilation_label].alpha for k in self.kernels if k.dilated]
        gamma = magnitude(torch.cat([zero, *gammas]))[self.step_place]
        gamma = torch.where(self.step_is_last, 1.0, gamma) @ self.reaches.to(gamma.dtype)
        hard = straight_through(beta) * straight_through(gamma)
        soft = beta * gamma / self.divisor
        return hard.flatten()[self.valid_taps], soft.flatten()[self.valid_taps]

    # ---- where dimensions lie in it ------------------------------------------------------------------------------

    def places(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[Dimension, Tensor]:
        """For each searched dimension the element of the vector that each of its indices follows."""
        found: dict[Dimension, Tensor] = {}
        for axis in self.channels:
            for dimension, indices in axis.dimensions.items():
                if dimension not in found:
                    n = shapes[dimension.name][dimension.dim]
                    found[dimension] = torch.full((n,), self.size - 1, dtype=torch.int64)
                units = torch.arange(axis.units)[:, None].expand_as(indices)
                found[dimension][indices.flatten()] = self._starts[axis.label] + units.flatten()
        for kernel in self.kernels:
            for dimension, places in kernel.positions.items():
                found[dimension] = self._starts[kernel.kernel_label] + places
        return found

    def start(self, label: str) -> int:
        return self._starts[label]

    def dilation_of(self, kernel: KernelAxis) -> int:
        """What the dilation of a convolution is multiplied with."""
        return int(self[kernel.dilation_label].decision()) if kernel.dilated else 1


@torch.no_grad()
def _above_or_largest(theta: Tensor, segments: Tensor, masks: int) -> Tensor:
    """``kept_units`` for a granularity of 1, without sorting."""
    places = torch.arange(len(theta), device=theta.device)
    largest = torch.zeros(masks, dtype=theta.dtype, device=theta.device).scatter_reduce_(0, segments, theta, "amax")
    last = torch.zeros(masks, dtype=torch.int64, device=theta.device).scatter_reduce_(
        0, segments, torch.where(theta == largest[segments], places, -1), "amax"
    )
    return (theta > THRESHOLD) | (places == last[segments])
