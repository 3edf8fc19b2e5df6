"""What PIT searches in one network, and the two networks that an assignment of its masks stands for.

They are the masked network, of full size with zeros in it, and the cut one; that both compute the same is what a
trial asks, and what every export is checked for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..graph.cut import cut
from ..graph.dimensions import Dimension, Dimensions
from ..graph.masked_call import masked_call, names_of_parameters
from ..graph.rewrite import Rewriter
from ..mutables import LayerChoice, Mutable
from .axes import ChannelAxis, KernelAxis
from .mask_set import MaskSet
from .presence import Presence

__all__ = ["SearchSpace"]


@dataclass(frozen=True)
class SearchSpace:
    """The axes of a network. ``frozen``: dimension -> why it is not searched.

    ``as_graph``: the network is a ``torch.fx`` graph, and a cut changes the numbers of its code. ``presence``: of the
    axes that only the wider candidates of some choice have, the conditions under which they are there.
    """

    channels: tuple[ChannelAxis, ...]
    kernels: tuple[KernelAxis, ...]
    frozen: Mapping[Dimension, str]
    found: Dimensions
    as_graph: bool = False
    presence: Presence = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> SearchSpace:
        return self  # it never changes, and a copy of a network has the same one

    @property
    def labels(self) -> list[str]:
        return [axis.label for axis in self.channels] + [kernel.kernel_label for kernel in self.kernels]

    def without(self, reasons: Mapping[str, str]) -> SearchSpace:
        """The axes but those of these labels, whose dimensions are frozen for the reason given."""
        frozen = dict(self.frozen)
        for axis in self.channels:
            if axis.label in reasons:
                frozen.update(dict.fromkeys(axis.dimensions, reasons[axis.label]))
        for kernel in self.kernels:
            if kernel.kernel_label in reasons:
                frozen.update(dict.fromkeys(kernel.positions, reasons[kernel.kernel_label]))
        # A dimension of which another group still has a part is not frozen as a whole.
        left = [axis for axis in self.channels if axis.label not in reasons]
        partly = {d for axis in left for d in axis.dimensions}
        return replace(
            self,
            channels=tuple(left),
            kernels=tuple(k for k in self.kernels if k.kernel_label not in reasons),
            frozen={d: why for d, why in frozen.items() if d not in partly},
        )

    def with_two(self, labels: Sequence[str]) -> SearchSpace:
        """At least two units of the channel axes of these labels."""
        channels = [replace(axis, least=2) if axis.label in labels else axis for axis in self.channels]
        return replace(self, channels=tuple(channels))

    def only(self, labels: Sequence[str]) -> SearchSpace:
        return replace(
            self,
            channels=tuple(axis for axis in self.channels if axis.label in labels),
            kernels=tuple(k for k in self.kernels if k.kernel_label in labels),
        )

    def columns(self) -> list[Dimension]:
        """The dimensions that the masked network has zeros along."""
        channels = {d: None for axis in self.channels for d in axis.group.members if d in axis.group.columns}
        return [*channels, *(d for kernel in self.kernels for d in kernel.positions)]


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter and buffer."""
    return {name: tuple(t.shape) for name, t in (*model.named_parameters(), *model.named_buffers())}


def call_masked(space: SearchSpace, masks: MaskSet, flat: Tensor, model: nn.Module, args: Sequence[Any]) -> Any:
    """The masked network on ``args``, with every place of the flat vector looked up anew."""
    places = masks.places(shapes_of(model))
    factors = {dimension: flat[places[dimension].to(flat.device)] for dimension in space.columns()}
    return masked_call(model, factors, names_of_parameters(model), args)


def rewriter_of(space: SearchSpace, model: nn.Module, args: Sequence[Any]) -> Rewriter | None:
    """What changes the numbers in the code of a graph; None for a network that is cut in place."""
    if not space.as_graph or not isinstance(model, fx.GraphModule):
        return None
    # Of axes that have lost units, what is left: ``found`` has the units that there were at first.
    return Rewriter(model, args, replace(space.found, groups=tuple(axis.group for axis in space.channels)))


def cut_network(
    space: SearchSpace,
    masks: MaskSet,
    model: nn.Module,
    *,
    renumber: bool = True,
    rewriter: Rewriter | None = None,
    absent: Collection[str] = (),
) -> nn.Module:
    """The network without what the masks remove, and without the axes ``absent``.

    ``renumber``: adapt the sizes in attributes of the user's modules. ``rewriter``: of a graph, ``rewriter_of``.
    """
    flat = masks().hard.detach().cpu() > 0
    for axis in space.channels:
        if axis.label in absent:
            flat[masks.start(axis.label) : masks.start(axis.label) + axis.units] = False
    kept = {dimension: flat[place].nonzero().flatten() for dimension, place in masks.places(shapes_of(model)).items()}
    dilations = {}
    decisions = masks.decisions()
    for kernel in space.kernels:
        conv = model.get_submodule(kernel.weight.rpartition(".")[0])
        factor = decisions[kernel.dilation_label] if kernel.dilated else 1
        dilations[kernel.weight] = tuple(d * factor for d in conv.dilation)  # type: ignore[union-attr]
    numbers = None
    units = {a.label: flat[masks.start(a.label) : masks.start(a.label) + a.units] for a in space.channels}
    if rewriter is not None:
        model = rewriter(units)
    elif renumber:
        numbers = numbers_of_modules(model, space.found.renumbered(units_at_first(masks, units)))
    small = cut(model, kept, dilations=dilations, numbers=numbers)
    for module in small.modules():
        if isinstance(module, LayerChoice) and module.padding is not None:
            module.padding.forget()  # the candidates may have become narrower
    return small


def units_at_first(masks: MaskSet, units: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Flags of the units that axes had at first, of which ``found`` speaks, from those of their units of now."""
    found = {}
    for label, flags in units.items():
        found[label] = torch.zeros(masks[label].made_with, dtype=torch.bool)
        found[label][list(masks[label].left)] = flags
    return found


def numbers_of_modules(model: nn.Module, numbers: Mapping[str, Mapping[int, int]]) -> dict[str, dict[int, int]]:
    """For each number the user's module nearest to where it was used that has an attribute of that value."""
    found: dict[str, dict[int, int]] = {}
    modules = dict(model.named_modules())
    for path, of_path in numbers.items():
        for old, new in of_path.items():
            at: str | None = path
            while at is not None:
                if _has_number(modules[at], old):
                    found.setdefault(at, {})[old] = new
                    break
                at = at.rpartition(".")[0] if at else None
    return found


def _has_number(module: nn.Module, number: int) -> bool:
    if type(module).__module__.startswith("torch.nn.modules") or isinstance(module, Mutable):
        return False  # the numbers of a choice are those of its options
    values = [v for value in vars(module).values() for v in (value if type(value) in (list, tuple) else [value])]
    return any(type(value) is int and value == number for value in values)
