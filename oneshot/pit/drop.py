"""Candidates of a network under search that have become improbable leave it, with the masks that they alone had."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..export.dropping import (
    BELOW,
    check_below,
    drop_options_,
    dropped_candidates,
    led_by_others_,
    left_options,
    narrowed,
    positions_of,
    put_back_,
    unlikely_options,
)
from ..graph import Condition, evaluated
from ..graph.cut import cut
from ..graph.dimensions import Dimension, Dimensions, Group
from ..graph.labels import Label, dims_of
from ..mutables import Argmax, EveryPath, LayerChoice
from ..mutables.in_place import Changes, check_states, forget_parameters, take_slice
from .axes import ChannelAxis, KernelAxis
from .network import GoneMask, SearchedNetwork
from .search_space import SearchSpace
from .shrink import Followers, Proof, cut_all, cut_followers, names_in, proved, take_sizes
from .trial import NoDropout

__all__ = ["drop_", "remove_options_"]

Narrow = Callable[[Condition], Condition | None]


def drop_(
    network: SearchedNetwork,
    below: float = BELOW,
    optimizers: Sequence[Optimizer] = (),
    followers: Followers = (),
    archs: Sequence[Mapping[str, Any]] = (),
) -> dict[str, list[Any]]:
    """Take the improbable candidates out of a network under search, in place; label -> what went, by name or index.

    As ``oneshot.export.dropping.drop_candidates_`` of a model without masks, which says which candidates go. Masks of
    layers that no other candidate has go with them, and so do channels that only wider candidates had; an architecture
    goes on to say of each what it had decided last. Expected costs are those under the probabilities of what is left;
    what the network computes and costs with its likeliest options stays the same, which is compared, ExportError.
    ``reachable_costs`` goes on to tell those of the network at first. ``followers`` lose what the network loses, and
    the candidates of ``archs`` stay, as in ``oneshot.pit.shrink.shrink_``.

    >>> from oneshot import LayerChoice
    >>> from oneshot.pit import PIT
    >>> net = nn.Sequential(LayerChoice([nn.Linear(4, 3), nn.Linear(4, 3)], label="a"), nn.ReLU(), nn.Linear(3, 2))
    >>> pit = PIT(net, (4,), cost="params")  # 15 + 8 with either
    >>> with torch.no_grad():
    ...     _ = pit.choices["a"].alpha.copy_(torch.tensor([0.0, 9.0]))
    >>> drop_(pit), pit.arch(), pit.hard_costs()
    ({'a': [0]}, {'a': 1, '0.candidates.0': [0, 1, 2]}, {'params': 23.0})
    """
    check_below(below)
    gone = unlikely_options(network.choices, below, archs)
    return _without(network, gone, optimizers, followers)


def remove_options_(
    network: SearchedNetwork,
    dropped: Mapping[str, Sequence[Any]],
    decided: Mapping[str, Any],
    optimizers: Sequence[Optimizer] = (),
) -> dict[str, list[Any]]:
    """Take these candidates out, whatever the alphas say; ``decided``: what the masks that go with them had decided."""
    gone = positions_of(network.choices, dropped)
    sizes = {label: len(network.choices[label].options) for label in gone}
    before = led_by_others_(network.choices, gone)
    try:
        found = _without(network, gone, optimizers, ())
        before = {
            label: take_slice(alpha, {0: torch.tensor([k for k in range(sizes[label]) if k not in gone[label]])})
            for label, alpha in before.items()
        }
    finally:
        put_back_(network.choices, before)
    network._gone = {x: mask._replace(decision=decided.get(x, mask.decision)) for x, mask in network._gone.items()}
    return found


def _without(
    network: SearchedNetwork,
    gone: Mapping[str, Sequence[int]],
    optimizers: Sequence[Optimizer],
    followers: Followers,
) -> dict[str, list[Any]]:
    if not any(gone.values()):
        return {}
    check_states(optimizers, [network.choices[label].alpha for label in gone])
    changes, proof = Changes(), Proof(network, [Argmax()], exact=False)
    with proved(proof, changes):
        found = _drop(network, gone, optimizers, followers, changes)
    return found  # noqa: RET504  (what is proved at the end of the block may undo it)


def _drop(
    network: SearchedNetwork,
    gone: Mapping[str, Sequence[int]],
    optimizers: Sequence[Optimizer],
    followers: Followers,
    changes: Changes,
) -> dict[str, list[Any]]:
    left = left_options(network.choices, gone)

    def narrow(when: Condition) -> Condition | None:
        return narrowed(when, left)

    changes.set(network, "_reachable", network.reachable_costs())
    every_name = names_in(network)
    for label, places in left.items():
        alpha = network.choices[label].alpha
        cut_followers(every_name[id(alpha)], alpha.shape, {0: torch.tensor(list(places))}, followers, changes)
    names, paths = _names(network.network), _paths(network.network)
    found = drop_options_(network.network, network.choices, gone, optimizers, changes)
    now_names, now_paths = _names(network.network), _paths(network.network)
    new_name = {name: now_names[key] for key, name in names.items() if key in now_names}
    new_path = {path: now_paths[key] for key, path in paths.items() if key in now_paths}
    space = _renamed(network.space, new_name, new_path, narrow)
    absent = [axis for axis in space.channels if axis.label in space.presence and not space.presence[axis.label]]
    space = _without_absent(network, space, absent, optimizers, followers, changes)
    _forget_masks(network, space, optimizers, changes)
    axes = [axis.label for axis in network.space.channels] + [k.kernel_label for k in network.space.kernels]
    staying = {axes.index(label): i for i, label in enumerate(space.labels)}
    network._take_space(space, network._costs.narrowed(staying, narrow), changes)
    _forget_followed(network, followers, changes)
    _learn_widths(network)
    return found


def _learn_widths(network: SearchedNetwork) -> None:
    """Let choices between different widths see the largest one that is left, before a step of training does."""
    choices = [m for m in network.network.modules() if isinstance(m, LayerChoice) and m.padding is not None]
    if choices:
        with torch.random.fork_rng(devices=[]), evaluated(network, EveryPath()), NoDropout():
            network(*network._on_device(network.example))


def _names(model: nn.Module) -> dict[int, str]:
    return {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _paths(model: nn.Module) -> dict[int, str]:
    return {id(module): path for path, module in model.named_modules()}


# --- what is searched, of fewer candidates ---------------------------------------------------------------------------


def _renamed(space: SearchSpace, names: Mapping[str, str], paths: Mapping[str, str], narrow: Narrow) -> SearchSpace:
    """Without tensors that are gone; one that stood at several paths may have another name now."""

    def new(dimension: Dimension) -> Dimension:
        return dimension._replace(name=names[dimension.name])

    channels = []
    for axis in space.channels:
        members = {new(d): indices for d, indices in axis.dimensions.items() if d.name in names}
        columns = frozenset(new(d) for d in axis.group.columns if d.name in names)
        if members:
            channels.append(_with_members(axis, members, columns))
    kernels: list[KernelAxis] = []
    for kernel in space.kernels:
        if kernel.weight in names:
            positions = {new(d): places for d, places in kernel.positions.items()}
            kernels.append(replace(kernel, weight=names[kernel.weight], positions=positions))
    labels = {axis.label for axis in channels}
    presence = {
        label: [when for condition in conditions if (when := narrow(condition)) is not None]
        for label, conditions in space.presence.items()
        if label in labels
    }
    frozen = {new(d): why for d, why in space.frozen.items() if d.name in names}
    return replace(
        space,
        channels=tuple(channels),
        kernels=tuple(kernels),
        frozen=frozen,
        found=_found(space.found, paths, narrow),
        presence=presence,
    )


def _with_members(axis: ChannelAxis, members: Mapping[Dimension, Tensor], columns: frozenset[Dimension]) -> ChannelAxis:
    return replace(axis, group=Group(axis.group.label, axis.units, members, columns))


def _found(found: Dimensions, paths: Mapping[str, str], narrow: Narrow) -> Dimensions:
    """Without what ran in candidates that are gone."""
    numbers = tuple(number._replace(path=paths[number.path]) for number in found.numbers if number.path in paths)
    products = []
    for product in found.products:
        when = narrow(product.operator.when)
        if when is not None and product.operator.path in paths:
            operator = replace(product.operator, when=when, path=paths[product.operator.path])
            products.append(replace(product, operator=operator))
    return replace(found, numbers=numbers, products=tuple(products), widened=())


def _without_absent(
    network: SearchedNetwork,
    space: SearchSpace,
    absent: Sequence[ChannelAxis],
    optimizers: Sequence[Optimizer],
    followers: Followers,
    changes: Changes,
) -> SearchSpace:
    """Cut off the channels that only dropped candidates had: what reads them has read zeros since."""
    if not absent:
        return space
    model = network.network
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    alive: dict[Dimension, Tensor] = {}
    for axis in absent:
        for dimension, indices in axis.dimensions.items():
            size = tensors[dimension.name].shape[dimension.dim]
            alive.setdefault(dimension, torch.ones(size, dtype=torch.bool))[indices.flatten()] = False
    kept = {dimension: flags.nonzero().flatten() for dimension, flags in alive.items()}
    take_sizes(model, cut(model, kept), changes)
    slices: dict[str, dict[int, Tensor]] = {}
    for dimension, left in kept.items():
        slices.setdefault(dimension.name, {})[dimension.dim] = left
    cut_all(network, [(tensors[name], of_tensor) for name, of_tensor in slices.items()], optimizers, followers, changes)
    gone = {axis.label for axis in absent}
    channels = []
    for axis in space.channels:
        if axis.label not in gone:
            members = {
                d: torch.searchsorted(kept[d], indices) if d in kept else indices
                for d, indices in axis.dimensions.items()
            }
            channels.append(_with_members(axis, members, axis.group.columns))
    presence = {label: conditions for label, conditions in space.presence.items() if label not in gone}
    return replace(space, channels=tuple(channels), presence=presence, found=_without_units(space.found, gone))


def _without_units(found: Dimensions, gone: Collection[str]) -> Dimensions:
    """Labels of tensors without the channels of these groups."""
    of_group = np.repeat([group.label in gone for group in found.groups], [group.units for group in found.groups])
    is_gone = np.append(of_group, False)[found.unit_of]  # of each atom; the last one stands for those of no group

    def cut_label(label: Label) -> Label:
        for d in dims_of(label):
            along = np.moveaxis(is_gone[label.numpy()], d, 0).reshape(label.shape[d], -1)
            label = label.index_select(d, torch.from_numpy(~along.all(1)).nonzero().flatten())
        return label

    numbers = []
    for number in found.numbers:
        label = cut_label(number.label)
        is_whole = label.shape == number.label.shape
        numbers.append(number if is_whole else number._replace(label=label, size=label.shape[number.dim]))
    products = []
    for product in found.products:
        labelled = {
            n: replace(of_one, labels=tuple(cut_label(label) for label in of_one.labels))
            for n, of_one in product.labelled.items()
        }
        products.append(replace(product, labelled=labelled))
    return replace(found, numbers=tuple(numbers), products=tuple(products))


def _forget_masks(
    network: SearchedNetwork,
    space: SearchSpace,
    optimizers: Sequence[Optimizer],
    changes: Changes,
) -> None:
    """Of masks that are no more, what they had decided stays."""
    now = network.masks.decisions()
    staying = {*space.labels, *(kernel.dilation_label for kernel in space.kernels if kernel.dilated)}
    gone = {label: mask for label, mask in network.masks.items() if label not in staying}
    forgotten = {
        label: GoneMask(now[label], mask.signature()) for label, mask in gone.items() if label in network._decided
    }
    changes.set(network, "_gone", {**network._gone, **forgotten})
    held = {id(network.masks[label].alpha) for label in network.masks if label in staying}
    forget_parameters(changes, [mask.alpha for mask in gone.values() if id(mask.alpha) not in held], optimizers)


def _forget_followed(network: SearchedNetwork, followers: Followers, changes: Changes) -> None:
    names = {name for of_one in names_in(network).values() for name in of_one}
    for follower in followers:
        left = {name: tensor for name, tensor in follower.items() if name in names}
        if len(left) < len(follower):
            changes.replace_items(follower, left)


def dropped_options(network: SearchedNetwork) -> dict[str, list[Any]]:
    """Label of a choice -> the candidates that it had at first and has no more."""
    return dropped_candidates(network.network)
