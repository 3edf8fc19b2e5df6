"""What PIT searches in one network: axes of parameters, each under a mask or two, as pieces of one flat vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..graph.dimensions import Dimension, Group

__all__ = ["ChannelAxis", "KernelAxis", "kernel_axes", "rings"]


@dataclass(frozen=True)
class ChannelAxis:
    """Units that a ChannelMask keeps or removes, in multiples of ``granularity`` and not below ``least``."""

    label: str
    group: Group
    granularity: int = 1
    least: int = 1

    @property
    def units(self) -> int:
        return self.group.units

    @property
    def dimensions(self) -> Mapping[Dimension, Tensor]:
        """Dimension -> indices of each unit, shape (units, m)."""
        return self.group.members


@dataclass(frozen=True)
class KernelAxis:
    """The taps of a convolution: a KernelMask over them and, in one dimension, a DilationMask.

    ``positions``: for each dimension of the kernel the place in the mask of each tap, oldest or outermost first.
    """

    label: str
    weight: str
    taps: int
    positions: Mapping[Dimension, Tensor] = field(repr=False)
    dilated: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many taps of a side there are with 1, 2, ... places of the mask left."""
        of_place = torch.bincount(next(iter(self.positions.values())), minlength=self.taps)
        return tuple(of_place.flip(0).cumsum(0).tolist())

    @property
    def kernel_label(self) -> str:
        return f"{self.label}.kernel_size"

    @property
    def dilation_label(self) -> str:
        return f"{self.label}.dilation"


def rings(size: int) -> Tensor:
    """The distance of each tap from the centre of a kernel in space, as a place in a mask: the outermost is 0.

    >>> rings(5).tolist(), rings(4).tolist()
    ([0, 1, 2, 1, 0], [0, 1, 2, 1])
    """
    centre = size // 2
    return centre - (torch.arange(size) - centre).abs()


def kernel_axes(model: nn.Module) -> tuple[list[KernelAxis], dict[Dimension, str]]:
    """The kernels of a model that can get smaller, and why others cannot.

    Conv1d: one mask of kernel size and one of dilation. Conv2d: one for a square kernel, one for each side of another.
    """
    axes: list[KernelAxis] = []
    frozen: dict[Dimension, str] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        if not isinstance(module, _ConvNd) or len(module.kernel_size) > 2 or id(module.weight) in seen:
            continue
        seen.add(id(module.weight))
        if "weight" not in module._parameters:
            continue  # computed from others (weight_norm, say): what sums over it is frozen for that reason
        weight = f"{path}.weight".lstrip(".")
        sides = [Dimension(weight, 2 + d) for d in range(len(module.kernel_size))]
        sides = [side for side in sides if module.weight.shape[side.dim] > 1]
        reason = _fixed_kernel(module)
        if reason is not None:
            frozen.update(dict.fromkeys(sides, reason))
        elif sides:
            axes += _axes_of(path, module, sides)
    return axes, frozen


def _fixed_kernel(conv: _ConvNd) -> str | None:
    if isinstance(conv, _ConvTransposeNd):
        return "the kernel of a transposed convolution"
    if any(step != 1 for step in conv.stride):
        return f"stride {conv.stride}: the kernel of a strided convolution"
    if conv.padding_mode != "zeros":
        return f"padding_mode {conv.padding_mode!r}: what is padded is no zeros"
    return None


def _axes_of(path: str, conv: _ConvNd, sides: Sequence[Dimension]) -> list[KernelAxis]:
    weight = sides[0].name
    label = path or "root"
    if len(conv.kernel_size) == 1:
        taps = conv.kernel_size[0]
        return [KernelAxis(label, weight, taps, {sides[0]: torch.arange(taps)}, True)]
    if len(sides) == 2 and conv.kernel_size[0] == conv.kernel_size[1]:
        places = rings(conv.kernel_size[0])
        return [KernelAxis(label, weight, int(places.max()) + 1, dict.fromkeys(sides, places), False)]
    names = {2: "height", 3: "width"}
    found = []
    for side in sides:
        places = rings(conv.weight.shape[side.dim])
        name = label if len(sides) == 1 else f"{label}.{names[side.dim]}"
        found.append(KernelAxis(name, weight, int(places.max()) + 1, {side: places}, False))
    return found
