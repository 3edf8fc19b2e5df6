"""A search that gets cheaper while it runs: units that masks have switched off leave the network, in place.

The network, its modules, its parameters and its masks stay the objects they were, and so does what optimizers keep of
them: numbers are taken out of all alike. Architectures go on to speak of the units of the network at first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import isclose
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from ..errors import ArchMismatchError, ConfigurationError, ExportError, UnsupportedModelError
from ..export.unchanged import Unchanged
from ..graph.cut import cut
from ..graph.dimensions import Dimension, Dimensions, Group
from ..mutables import Argmax, EveryPath, LayerChoice, Sampler
from ..mutables.in_place import Changes, Slice, check_states, cut_tensor, take_slice
from ..mutables.masks import ChannelMask
from .axes import ChannelAxis
from .network import SearchedNetwork
from .search_space import SearchSpace, numbers_of_modules, rewriter_of, shapes_of, units_at_first
from .trial import NoDropout

__all__ = [
    "Followers",
    "Proof",
    "cut_all",
    "cut_followers",
    "names_in",
    "proved",
    "remove_units_",
    "removed_units",
    "shrink_",
    "take_sizes",
]

Followers = Sequence[MutableMapping[str, Tensor]]


def shrink_(
    network: SearchedNetwork,
    optimizers: Sequence[Optimizer] = (),
    followers: Followers = (),
    archs: Sequence[Mapping[str, Any]] = (),
) -> dict[str, int]:
    """Take out of a network under search the channels that its masks have switched off; label -> how many went.

    Channels only: kernels keep their size and dilation until the export. Parameters, buffers, alphas and gradients lose
    the same units, in place, and so does every tensor in the state of ``optimizers`` that has the shape of its
    parameter (momentum, moments). What is left computes what it did, has the same costs, and learns on as if the alphas
    of the units that went were 0 for good: these no longer count in relaxed sizes either, where each had its |alpha| of
    at most 0.5. An architecture is told in the units of the network at first, before and after. What is cut is
    contiguous afterwards: say ``to(memory_format=torch.channels_last)`` again if it was that.

    Args:
        optimizers: all that hold parameters of the network. ConfigurationError for one whose state cannot be cut.
        followers: tensors by the names of parameters and buffers in ``network`` and of their shapes (an average of the
            weights, a ``state_dict`` of an earlier epoch), which are replaced by smaller ones.
        archs: architectures that stay possible, with all of their units: that of an earlier epoch, say.

    What the network computes in eval mode is compared before and after, on its example and on random inputs, with the
    likeliest options of its choices and with all of them: at most 1e-4 apart in float32 and 1e-9 in float64 (max
    |difference| / max |output|). Else ExportError, and everything is as it was.

    >>> from oneshot.pit import PIT
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> pit = PIT(net, (3,), cost="params")
    >>> pit.masks["0"].keep([1, 3])
    >>> shrink_(pit), pit.network[0], pit.arch()
    ({'0': 2}, Linear(in_features=3, out_features=2, bias=True), {'0': [1, 3]})
    >>> removed_units(pit)
    {'0': [0, 2]}
    """
    hard = network.masks().hard.detach().cpu() > 0
    starts = {axis.label: network.masks.start(axis.label) for axis in network.space.channels}
    flags = {axis.label: hard[starts[axis.label] :][: axis.units] for axis in network.space.channels}
    if archs:
        flags = {label: _with_units(network.masks[label], of_axis, label, archs) for label, of_axis in flags.items()}
    return _without(network, flags, optimizers, followers)


def _with_units(mask: ChannelMask, flags: Tensor, label: str, archs: Sequence[Mapping[str, Any]]) -> Tensor:
    """The units that stay, those of architectures, and as many of the largest others as make a multiple of them."""
    units = {unit for arch in archs for unit in arch.get(label, ())}
    staying = flags | torch.tensor([unit in units for unit in mask.left])
    theta = mask.soft().detach().cpu().masked_fill(staying, -1.0)
    missing = min(-int(staying.sum()) % mask.granularity, len(staying) - int(staying.sum()))
    staying[theta.argsort(descending=True)[:missing]] = True
    return staying


def removed_units(network: SearchedNetwork) -> dict[str, list[int]]:
    """Label of a mask -> the units of the network at first that are gone; only labels of which some are."""
    found = {}
    for axis in network.space.channels:
        mask: ChannelMask = network.masks[axis.label]
        found[axis.label] = sorted(set(range(mask.made_with)) - set(mask.left))
    return {label: gone for label, gone in found.items() if gone}


def remove_units_(
    network: SearchedNetwork, removed: Mapping[str, Sequence[int]], optimizers: Sequence[Optimizer] = ()
) -> dict[str, int]:
    """Bring a network of the full size to the shape that ``removed_units`` tells, whatever its masks say.

    A ``state_dict`` of the smaller network then loads, and one of its optimizers into these. Alphas of what is left
    stay as they are. ArchMismatchError, with nothing changed, for units that the network does not have or cannot lack.
    """
    flags = _flags_of(network, removed)
    if all(bool(of_axis.all()) for of_axis in flags.values()):
        return {}
    before = {label: network.masks[label].alpha.detach().clone() for label in flags}
    try:
        with torch.no_grad():
            for label, of_axis in flags.items():
                alpha = network.masks[label].alpha
                alpha.copy_(of_axis.to(alpha))
        _check_masks(network, flags)
        counts = _without(network, flags, optimizers, ())
        before = {label: take_slice(alpha, {0: flags[label].nonzero().flatten()}) for label, alpha in before.items()}
    finally:
        with torch.no_grad():
            for label, alpha in before.items():
                network.masks[label].alpha.copy_(alpha)
    return counts


def _flags_of(network: SearchedNetwork, removed: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    axes = {axis.label: axis for axis in network.space.channels}
    strange = [label for label in removed if label not in axes]
    if strange:
        raise ArchMismatchError(f"removed: masks {strange} that the network does not have; it has {list(axes)}")
    flags = {}
    for label in axes:
        mask: ChannelMask = network.masks[label]
        gone = set(removed.get(label, ()))
        if not gone <= set(range(mask.made_with)) or not gone >= set(range(mask.made_with)) - set(mask.left):
            raise ArchMismatchError(
                f"removed: units {sorted(gone)} of {label!r}, which has {mask.made_with} of them, of which "
                f"{list(mask.left)} are left. Begin with a network of the full size"
            )
        flags[label] = torch.tensor([unit not in gone for unit in mask.left])
    return flags


def _check_masks(network: SearchedNetwork, flags: Mapping[str, Tensor]) -> None:
    for label, of_axis in flags.items():
        mask: ChannelMask = network.masks[label]
        if not torch.equal(mask.hard().detach().cpu() > 0, of_axis):
            raise ArchMismatchError(
                f"removed: {int(of_axis.sum())} units would be left of {label!r}; its mask keeps at least "
                f"{mask.least}, and multiples of {mask.granularity}"
            )


# --- one step ---------------------------------------------------------------------------------------------------------


def _without(
    network: SearchedNetwork, flags: Mapping[str, Tensor], optimizers: Sequence[Optimizer], followers: Followers
) -> dict[str, int]:
    """Only these units of each axis, verified."""
    counts = {label: int((~of_axis).sum()) for label, of_axis in flags.items()}
    if not any(counts.values()):
        return {}
    proof = Proof(network, [Argmax(), EveryPath()] if network.choices else [Argmax()])
    failure: ExportError | None = None
    for renumber in (True,) if network.space.as_graph else (True, False):
        changes = Changes()
        try:
            with proved(proof, changes):
                _cut(network, flags, renumber, optimizers, followers, changes)
        except ExportError as error:
            failure = failure or error
            continue
        return {label: count for label, count in counts.items() if count}
    assert failure is not None
    raise failure


class Proof:
    """What a network computes and costs, and the architecture that it stands for, to be asked again once it is smaller.

    ``samplers``: those under which outputs are compared. ``exact``: costs are the same numbers, and not to 12 digits.
    """

    def __init__(self, network: SearchedNetwork, samplers: Sequence[Sampler], *, exact: bool = True) -> None:
        self.network, self.exact = network, exact
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            examples = [network._on_device(network.example), network._on_device(network.example, random=True)]
        self.costs, self.arch = network.hard_costs(), network.arch()
        with NoDropout():
            self.unchanged = Unchanged(network, examples, samplers)

    def __call__(self) -> None:
        """ExportError unless all of it is the same."""
        with NoDropout():
            self.unchanged("the smaller network")
        costs = self.network.hard_costs()
        same = (
            costs == self.costs
            if self.exact
            else all(isclose(costs[k], v, rel_tol=1e-12) for k, v in self.costs.items())
        )
        if not same or self.network.arch() != self.arch:
            raise ExportError(
                f"the smaller network has the costs {costs} instead of {self.costs}, or another architecture"
            )


@contextmanager
def proved(proof: Proof, changes: Changes) -> Iterator[None]:
    """What is changed inside stays only if it can be proved; else it is put back, and ExportError says why."""
    try:
        yield
        proof()
    except (ExportError, UnsupportedModelError) as error:
        changes.undo()
        raise ExportError(f"{error}. Nothing was removed: the network is as it was") from error
    except BaseException:
        changes.undo()
        raise


class _Plan(NamedTuple):
    """``kept``: the indices left of each dimension that loses some. ``first``: flags of the units at first."""

    flags: Mapping[str, Tensor]
    kept: Mapping[Dimension, Tensor]
    first: Mapping[str, Tensor]


def _cut(
    network: SearchedNetwork,
    flags: Mapping[str, Tensor],
    renumber: bool,
    optimizers: Sequence[Optimizer],
    followers: Followers,
    changes: Changes,
) -> None:
    model, masks = network.network, network.masks
    flat = torch.ones(masks.size, dtype=torch.bool)
    for label, of_axis in flags.items():
        flat[masks.start(label) : masks.start(label) + len(of_axis)] = of_axis
    places = masks.places(shapes_of(model))
    kept = {d: flat[place].nonzero().flatten() for d, place in places.items() if not bool(flat[place].all())}
    plan = _Plan(flags, kept, units_at_first(masks, flags))
    space = _smaller_space(network.space, plan)
    space = _cut_modules(network, space, plan, renumber, changes)
    _cut_tensors(network, plan, optimizers, followers, changes)
    network._take_space(space, network._costs.for_smaller_masks(), changes)


def _cut_modules(
    network: SearchedNetwork, space: SearchSpace, plan: _Plan, renumber: bool, changes: Changes
) -> SearchSpace:
    """Sizes in the attributes of modules, and the numbers in the code of a graph, as ``cut_network`` has them."""
    model, numbers = network.network, None
    rewriter = rewriter_of(network.space, model, network._on_device(network.example))
    source: nn.Module = model
    if rewriter is not None:
        source = rewriter(plan.flags)
    elif renumber:
        found = network.space.found.renumbered(plan.first)
        numbers = numbers_of_modules(model, found)
        space = replace(space, found=_with_numbers(space.found, found, plan.first))
    small = cut(source, plan.kept, numbers=numbers)
    take_sizes(model, small, changes)
    for module in model.modules():
        if isinstance(module, LayerChoice) and module.padding is not None and module.decided is None:
            changes.set(module.padding, "width", -1)  # learnt anew where the smaller network is compared
    if rewriter is not None:
        assert isinstance(small, fx.GraphModule)
        changes.set(model, "graph", small.graph)
    return space


def take_sizes(model: nn.Module, small: nn.Module, changes: Changes) -> None:
    """Numbers in the attributes of modules, as they are in a cut copy of the model."""
    twins = dict(small.named_modules())
    for path, module in model.named_modules():
        for name, value in vars(twins[path]).items():
            if (
                not name.startswith("_")
                and type(value) in (int, tuple, list)
                and vars(module).get(name, value) != value
            ):
                changes.set(module, name, value)


def _cut_tensors(
    network: SearchedNetwork, plan: _Plan, optimizers: Sequence[Optimizer], followers: Followers, changes: Changes
) -> None:
    tensors = dict((*network.network.named_parameters(), *network.network.named_buffers()))
    slices: dict[int, tuple[Tensor, dict[int, Tensor]]] = {}
    for dimension, indices in plan.kept.items():
        tensor = tensors[dimension.name]
        slices.setdefault(id(tensor), (tensor, {}))[1][dimension.dim] = indices
    for label, of_axis in plan.flags.items():
        mask: ChannelMask = network.masks[label]
        if not bool(of_axis.all()) and id(mask.alpha) not in slices:  # one mask may be that of several axes
            places = of_axis.nonzero().flatten()
            slices[id(mask.alpha)] = (mask.alpha, {0: places})
            changes.set(mask, "left", tuple(mask.left[i] for i in places.tolist()))
    cut_all(network, list(slices.values()), optimizers, followers, changes)


def cut_all(
    network: SearchedNetwork,
    slices: Sequence[tuple[Tensor, Slice]],
    optimizers: Sequence[Optimizer],
    followers: Followers,
    changes: Changes,
) -> None:
    """Cut these tensors of a network, with what optimizers keep of them and what follows them by their names."""
    check_states(optimizers, [tensor for tensor, _ in slices])
    names = names_in(network)
    for tensor, kept in slices:
        cut_followers(names[id(tensor)], tensor.shape, kept, followers, changes)
        cut_tensor(changes, tensor, kept, optimizers)


def cut_followers(names: Sequence[str], shape: torch.Size, kept: Slice, followers: Followers, changes: Changes) -> None:
    """Cut what follows the tensor of these names, which has this shape until now."""
    for follower in followers:
        for name in names:
            if name in follower:
                changes.set_item(follower, name, _followed(name, follower[name], shape, kept))


def names_in(network: SearchedNetwork) -> dict[int, list[str]]:
    """All names of each parameter and buffer, by its identity: those that a ``state_dict`` has."""
    every = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
    found: dict[int, list[str]] = {}
    for name, tensor in every:
        found.setdefault(id(tensor), []).append(name)
    return found


def _followed(name: str, tensor: Tensor, shape: torch.Size, kept: Slice) -> Tensor:
    if tensor.shape != shape:
        raise ConfigurationError(
            f"followers: {name!r} has shape {tuple(tensor.shape)}, the tensor that it follows {tuple(shape)}"
        )
    return take_slice(tensor, kept)


# --- what is searched, of fewer units -----------------------------------------------------------------------------


def _smaller_space(space: SearchSpace, plan: _Plan) -> SearchSpace:
    return replace(space, channels=tuple(_smaller_axis(axis, plan) for axis in space.channels))


def _smaller_axis(axis: ChannelAxis, plan: _Plan) -> ChannelAxis:
    """Of the units that stay, with the indices that they have in the smaller tensors."""
    units = plan.flags[axis.label].nonzero().flatten()
    members = {}
    for dimension, indices in axis.dimensions.items():
        left = indices[units]
        kept = plan.kept.get(dimension)
        members[dimension] = left if kept is None else torch.searchsorted(kept, left)
    return replace(axis, group=Group(axis.group.label, len(units), members, axis.group.columns))


def _with_numbers(
    found: Dimensions, changed: Mapping[str, Mapping[int, int]], first: Mapping[str, Tensor]
) -> Dimensions:
    """The sizes in the code of the user's modules, as they are once the ``changed`` ones are written into it."""
    groups = [first.get(group.label, torch.ones(group.units, dtype=torch.bool)) for group in found.groups]
    alive = torch.cat([*groups, torch.ones(1, dtype=torch.bool)]).numpy()  # the last one: of no group
    numbers = []
    for number in found.numbers:
        if number.size in changed.get(number.path, {}):
            along = np.moveaxis(alive[found.unit_of[number.label.numpy()]], number.dim, 0)
            number = number._replace(size=int(along.reshape(len(along), -1).any(1).sum()))
        numbers.append(number)
    return replace(found, numbers=tuple(numbers))
