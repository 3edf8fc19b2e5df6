"""From a plain network to a search space: trace, find what is cut together, name it, try it."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils import _pytree as pytree

from ..cost.counts import one_sample
from ..errors import ConfigurationError, UnsupportedModelError
from ..graph import evaluated
from ..graph.cut import copied
from ..graph.dimensions import Dimension, Dimensions, Group, find_dimensions
from ..graph.fx_graph import graph_of
from ..graph.operators import Program, trace_operators
from ..mutables import EveryPath, LayerChoice, arch_parameters
from ..mutables.masked import MASKED_LAYERS, placed_masks, plain_layer
from ..mutables.masks import ChannelMask, Mask
from ..mutables.padding import Padding
from .axes import ChannelAxis, kernel_axes
from .presence import presence_of
from .search_space import SearchSpace
from .trial import NoDropout, check_widths, confirmed

__all__ = [
    "Found",
    "Granularity",
    "PlacedMasks",
    "Plan",
    "find_space",
    "learn_widths",
    "searched_weights",
    "take_masks",
]

Granularity = int | Mapping[str, int]
Excluded = str | type[nn.Module] | Sequence[str | type[nn.Module]]


class _Place(nn.Module):
    """Stands where a ChannelMask is called, and shows which dimension it is of."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.place_of_mask = nn.Parameter(torch.ones(units))

    def forward(self, x: Tensor, dim: int = 1) -> Tensor:
        return x * self.place_of_mask.to(x.dtype).reshape([-1 if d == dim % x.dim() else 1 for d in range(x.dim())])


class PlacedMasks:
    """The masks that a network was written with. ``channels``: a dimension each of them is of."""

    def __init__(self) -> None:
        self.channels: list[tuple[Dimension, ChannelMask]] = []
        self.kernels: dict[str, dict[str, Mask]] = {}
        self.places: list[str] = []


def take_masks(network: nn.Module) -> PlacedMasks:
    """Turn the masked layers of a network (a copy, of ours) into plain ones, and return their masks."""
    taken = PlacedMasks()
    for path, module in list(network.named_modules()):
        if isinstance(module, MASKED_LAYERS):
            of_layer = placed_masks(module)
            weight = f"{path}.weight".lstrip(".")
            if "channel_mask" in of_layer:
                taken.channels.append((Dimension(weight, 0), of_layer.pop("channel_mask")))  # type: ignore[arg-type]
            if of_layer:
                taken.kernels[weight] = of_layer  # type: ignore[assignment]
            _put(network, path, plain_layer(module))
    for path, module in list(network.named_modules()):  # what is left is called on a tensor
        if isinstance(module, ChannelMask):
            taken.channels.append((Dimension(f"{path}.place_of_mask", 0), module))
            taken.places.append(path)
            _put(network, path, _Place(len(module.alpha)))
    return taken


def _put(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    if not path:
        raise ConfigurationError(
            "a masked layer alone is no network: nothing that follows its output would get smaller. Put it into one"
        )
    old = network.get_submodule(path)
    for other in network.modules():
        for key, child in other._modules.items():
            if child is old:
                other._modules[key] = module
    assert network.get_submodule(parent)._modules[name] is module


class Found(NamedTuple):
    """``network``: the one given, or the same as a graph. ``own``: the masks placed by hand, by label."""

    network: nn.Module
    space: SearchSpace
    own: Mapping[str, Mask]


def learn_widths(network: nn.Module, args: Sequence[Any]) -> None:
    """Let the choices of a network (a copy, of ours) pad outputs of different widths, and none of the others."""
    choices = [m for m in network.modules() if isinstance(m, LayerChoice) and m.decided is None]
    for choice in choices:
        choice.padding = Padding()
    if choices:
        with torch.random.fork_rng(devices=[]), evaluated(network, EveryPath()), suppress(Exception):
            network(*args)  # if it does not run, the trace that follows says why
    for choice in choices:
        if choice.padding is not None and not choice.padding.is_needed:
            choice.padding = None


@dataclass(frozen=True)
class Plan:
    """What the user wants searched."""

    exclude: Excluded
    granularity: Granularity
    autoconvert: bool


def find_space(network: nn.Module, args: Sequence[Any], placed: PlacedMasks, plan: Plan) -> Found:
    """The confirmed axes of a network, in the user's own modules or, where that has more to search, as a graph.

    The user's modules are kept unless numbers in their code (``x[:, :8]``, ``view(-1, 48)``) stand in the way of a cut
    and ``torch.fx`` can write the network as a graph, in which they can be changed.
    """
    found = _found(network, args, placed, plan, as_graph=False)
    if any(_is_of_code(reason) for reason in found.space.frozen.values()):
        graph = graph_of(network, args, (_Place,))
        if graph is not None:
            other = _found(graph, args, placed, plan, as_graph=True)
            found = max(found, other, key=lambda one: searched_weights(one.network, one.space))
    for path in placed.places:
        _put(found.network, path, _passing())
    if isinstance(found.network, fx.GraphModule):
        found.network.recompile()
    own = _checked(found.space, placed, found.own)
    channels = tuple(replace(axis, group=_without_places(axis.group)) for axis in found.space.channels)
    return Found(found.network, replace(found.space, channels=channels), own)


_OF_CODE = ("a cut of it", "positions that the code", "pieces of fixed lengths", "of a dimension that is a part")


def _is_of_code(reason: str) -> bool:
    return any(text in reason for text in _OF_CODE)


def searched_weights(network: nn.Module, space: SearchSpace) -> int:
    """Elements of the parameters that are searched, for each of their searched dimensions."""
    searched = {d for axis in space.channels for d in axis.dimensions} | {d for k in space.kernels for d in k.positions}
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    return sum(sizes.get(dimension.name, 0) for dimension in searched)


def _found(network: nn.Module, args: Sequence[Any], placed: PlacedMasks, plan: Plan, *, as_graph: bool) -> Found:
    if isinstance(plan.granularity, Mapping):
        unused = [p for p in plan.granularity if not any(fnmatchcase(path, p) for path, _ in network.named_modules())]
        if unused:
            raise ConfigurationError(f"granularity={plan.granularity!r}: {unused} fit no module")
    excluded = {**_checking_layers(network), **_excluded(network, plan.exclude)}
    samples, programs = _programs(network, args)
    found = find_dimensions(programs, network, excluded, literals=as_graph)
    own = _own_masks(found, placed)
    kernels, frozen_kernels = kernel_axes(network)
    for weight, masks in placed.kernels.items():
        for kernel in kernels:
            if kernel.weight == weight:
                names = {"kernel_mask": kernel.kernel_label, "dilation_mask": kernel.dilation_label}
                own.update({names[name]: mask for name, mask in masks.items()})
                sizes = getattr(masks.get("kernel_mask"), "sizes", kernel.sizes)
                if sizes != kernel.sizes:
                    raise ConfigurationError(f"the KernelMask of {weight} has sizes {sizes}, its taps {kernel.sizes}")
    presence = presence_of(found, network)
    channels = [_axis(group, plan.granularity) for group in found.groups]
    gone = {d: excluded[d] for k in kernels for d in k.positions if d in excluded}
    kernels = [k for k in kernels if not any(d in gone for d in k.positions)]
    if not plan.autoconvert:
        channels = [axis for axis in channels if axis.label in own or axis.label in presence]
        kernels = [k for k in kernels if k.kernel_label in own or k.dilation_label in own]
    alphas = {id(alpha) for alpha in arch_parameters(network)}
    weights = {name for name, parameter in network.named_parameters() if id(parameter) not in alphas}
    frozen = {d: why for d, why in found.frozen.items() if d.name in weights and not _is_kernel(network, d)}
    space = SearchSpace(
        tuple(channels), tuple(kernels), {**frozen, **frozen_kernels, **gone}, found, as_graph, presence
    )
    used = [weights & set(program.parameters.values()) for program in programs]
    in_training = any(names - used[0] for names in used)
    # One sample is enough for a trial, but not for the statistics of a batch.
    space = confirmed(space, network, args if in_training else samples, in_training=in_training)
    missing = [label for label in presence if label not in space.labels]
    if missing:
        of_missing = {d for group in found.groups if group.label in missing for d in group.members}
        reasons = [why for dimension, why in space.frozen.items() if dimension in of_missing]
        raise UnsupportedModelError(
            f"{', '.join({widened.label: '' for widened in found.widened})}: the candidates have outputs of different "
            f"widths, and the channels of the wider ones cannot be cut: {(reasons or ['nothing sums over them'])[0]}. "
            "Give the candidates one width"
        )
    check_widths(space, network, samples)
    return Found(network, space, own)


def _is_kernel(network: nn.Module, dimension: Dimension) -> bool:
    """Whether it is a dimension of a kernel in space or time, which ``kernel_axes`` reports on."""
    path, _, leaf = dimension.name.rpartition(".")
    return dimension.dim > 1 and leaf == "weight" and isinstance(network.get_submodule(path), _ConvNd)


def _checked(space: SearchSpace, placed: PlacedMasks, own: Mapping[str, Mask]) -> Mapping[str, Mask]:
    """ConfigurationError for a mask placed by hand that cannot be searched."""
    labels = set(space.labels)
    labels |= {kernel.dilation_label for kernel in space.kernels if kernel.dilated}
    searched = {id(mask) for label, mask in own.items() if label in labels}
    for dimension, mask in placed.channels:
        if id(mask) not in searched:
            reason = space.frozen.get(dimension) or space.found.frozen.get(dimension, "nothing that runs depends on it")
            raise ConfigurationError(f"the ChannelMask at {dimension} cannot be searched: {reason}")
    for weight, masks in placed.kernels.items():
        for name, of_kernel in masks.items():
            if id(of_kernel) not in searched:
                reason = space.frozen.get(Dimension(weight, 2), "a kernel of one tap")
                raise ConfigurationError(f"the {name} of {weight} cannot be searched: {reason}")
    return {label: mask for label, mask in own.items() if label in labels}


def _passing() -> nn.Module:
    """A module that returns its first argument, of no class of this library."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.placeholder("dim", default_value=1)
    graph.output(x)
    return fx.GraphModule(nn.Module(), graph, class_name="Passing")


def _programs(network: nn.Module, args: Sequence[Any]) -> tuple[Sequence[Any], list[Program]]:
    """One sample, what runs in eval mode on it, and what runs in train mode where the network runs in it."""
    try:
        samples: Sequence[Any] = one_sample(network, args)
        programs = [trace_operators(network, samples)]
    except UnsupportedModelError:  # one that needs a batch, or has something else in the first dimension
        samples = args
        programs = [trace_operators(network, args)]
    in_training = copied(network).train()
    calls: list[str] = []
    try:
        with NoDropout(), _watched(torch.utils.checkpoint.__file__, calls):
            programs.append(trace_operators(in_training, args, training=True))
            with evaluated(in_training, EveryPath(), training=True), torch.enable_grad():
                # Some check whether there is a gradient to compute before they do.
                in_training(*pytree.tree_map_only(Tensor, _with_gradient, list(args)))
    except UnsupportedModelError:
        # BatchNorm does not train on one number per channel. What runs in eval mode is what is exported.
        return samples, programs
    if calls:
        raise UnsupportedModelError(
            f"PIT: {type(network).__name__} uses activation checkpointing (torch.utils.checkpoint), which runs layers "
            "again in the backward pass, where they have their unmasked weights: the gradients would be wrong. Switch "
            "it off"
        )
    return samples, programs


def _with_gradient(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().clone()
    return tensor.requires_grad_() * 1 if tensor.is_floating_point() else tensor  # no leaf: it may be written into


@contextmanager
def _watched(file: str, calls: list[str]) -> Iterator[None]:
    """Note the functions of a file that are called inside."""

    def watch(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename == file:
            calls.append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(before)


def _excluded(network: nn.Module, exclude: Excluded) -> dict[Dimension, str]:
    """The outputs of excluded layers: dimension -> reason. ConfigurationError for an entry that fits no module."""
    if isinstance(exclude, str | type):
        exclude = (exclude,)
    if not isinstance(exclude, Sequence):
        raise ConfigurationError(f"exclude={exclude!r}: paths of modules, patterns of paths, and layer types")
    modules = dict(network.named_modules())
    found: dict[Dimension, str] = {}
    for entry in exclude:
        if isinstance(entry, str):
            matching = [path for path in modules if fnmatchcase(path, entry)]
        elif isinstance(entry, type):
            matching = [path for path, module in modules.items() if isinstance(module, entry)]
        else:
            raise ConfigurationError(f"exclude={entry!r}: the path of a module, a pattern of paths, or a layer type")
        if not matching:
            raise ConfigurationError(
                f"exclude={entry!r} fits no module of {type(network).__name__}; it has "
                f"{_some([path for path in modules if path])}"
            )
        for path in matching:
            found.update(_outputs_of(modules[path], path, f"excluded by {entry!r}"))
    return found


def _checking_layers(network: nn.Module) -> dict[Dimension, str]:
    """The weights of layers that compare their widths with each other, or hand them on as one: no cut of them runs."""
    found = {}
    for path, module in network.named_modules():
        if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            reason = f"a weight of nn.{type(module).__name__}, which has one width for several"
            for name, parameter in module.named_parameters(prefix=path):
                found.update({Dimension(name, d): reason for d in range(parameter.dim())})
    return found


def _outputs_of(module: nn.Module, path: str, reason: str) -> dict[Dimension, str]:
    found = {}
    for below, inner in module.named_modules(prefix=path):
        for name, parameter in inner.named_parameters(prefix=below, recurse=False):
            is_matrix = isinstance(inner, nn.Linear | nn.modules.conv._ConvNd) and parameter.dim() > 1
            inputs = (0 if isinstance(inner, _ConvTransposeNd) else 1) if is_matrix else None
            found.update({Dimension(name, d): reason for d in range(parameter.dim()) if d != inputs})
    return found


def _some(names: Sequence[str], count: int = 12) -> str:
    return f"{list(names[:count])}{' and others' if len(names) > count else ''}"


def _own_masks(found: Dimensions, placed: PlacedMasks) -> dict[str, Mask]:
    own: dict[str, Mask] = {}
    for dimension, mask in placed.channels:
        group = next((g for g in found.groups if dimension in g.members), None)
        if group is None:
            continue
        if group.units != len(mask.alpha):
            raise ConfigurationError(
                f"the ChannelMask at {dimension} has {len(mask.alpha)} units, and {group.units} can be cut there: "
                f"{[str(d) for d in group.members]} go together"
            )
        if own.setdefault(group.label, mask) is not mask:
            raise ConfigurationError(
                f"two ChannelMasks on dimensions that are cut together, {[str(d) for d in group.members]}: hand one "
                "and the same object to both layers"
            )
    return own


def _without_places(group: Group) -> Group:
    members = {d: indices for d, indices in group.members.items() if not _is_place(d)}
    return Group(group.label, group.units, members, group.columns & set(members))


def _is_place(dimension: Dimension) -> bool:
    return dimension.name.rpartition(".")[2] == "place_of_mask"


def _axis(group: Group, granularity: Granularity) -> ChannelAxis:
    """Granularity is given in channels of the layer a group is named after; a unit may be several of them."""
    path = group.label.partition(":")[0]
    wanted = _of_pattern(granularity, path) if isinstance(granularity, Mapping) else granularity
    if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
        raise ConfigurationError(f"granularity={granularity!r}: integers of at least 1 are needed")
    width = next((i.shape[1] for d, i in group.members.items() if d.name.startswith(f"{path}.")), 1)
    return ChannelAxis(group.label, group, wanted // math.gcd(wanted, width))


def _of_pattern(granularity: Mapping[str, int], path: str) -> int:
    return next((n for pattern, n in granularity.items() if fnmatchcase(path, pattern)), 1)
