"""PIT over networks of every kind: conversion changes nothing, an export is the masked network, groups are as by hand.

The networks and their groups stand in ``models``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from models import ZOO, Group, randomize
from pit_networks import same, scatter
from torch import Tensor, fx, nn

from oneshot import count_macs
from oneshot.graph import trace_operators
from oneshot.graph.dimensions import Dimension, find_dimensions
from oneshot.graph.dimensions import Group as FoundGroup
from oneshot.pit import PIT
from oneshot.pit.axes import ChannelAxis
from oneshot.pit.search_space import SearchSpace
from oneshot.pit.trial import confirmed

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
BY_HAND = [name for name, entry in ZOO.items() if entry.groups is not None]
# Modules of the user with parameters of their own, of which a count cannot know what they do: they cost nothing.
UNCOUNTED = {
    **dict.fromkeys(["vit_fused_qkv", "vit_separate_qkv", "multihead_attention", "swiglu", "tied_autoencoder"], ("",)),
    "convnext": ("[0-9]",),
    "channel_attention_einsum": ("",),
}
# Numbers in their code would have to change with the channels: their exports are graphs. All others keep their class.
AS_GRAPH = {"head_view_literal", "slice_channels", "unequal_split"}
DTYPES = {torch.float32: 1e-4, torch.float64: 1e-9}


def cast(args: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in args)


def inputs(name: str, dtype: torch.dtype, batch: int = 2) -> tuple[Tensor, ...]:
    """Other numbers at each call."""
    pieces = [ZOO[name].inputs() for _ in range((batch + 1) // 2)]
    return cast([torch.cat(several)[:batch] for several in zip(*pieces, strict=True)], dtype)


def network(name: str, dtype: torch.dtype) -> nn.Module:
    return randomize(ZOO[name].build(), seed=0).eval().to(dtype)


class Conversion(NamedTuple):
    model: nn.Module
    before: list[Any]  # the model as it was
    pit: PIT


@cache
def converted(name: str, dtype: torch.dtype) -> Conversion:
    """Of each network once for all tests, which change its masks only."""
    model = network(name, dtype)
    before = snapshot(model)
    pit = PIT(model, example_input=inputs(name, dtype), cost=["params", "macs"], ignore=UNCOUNTED.get(name, ()))
    return Conversion(model, before, pit)


# ---- conversion ----------------------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> list[Any]:
    """Modules, modes and tensors of a model by identity and value, and everything else in it as text."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    modules = [(path, id(m), type(m), m.training, _rest(m)) for path, m in model.named_modules(remove_duplicate=False)]
    return [modules, [(name, id(t), t.requires_grad, t.grad, t.detach().clone().tolist()) for name, t in tensors]]


def _rest(module: nn.Module) -> str:
    own = ("_parameters", "_buffers", "_modules")
    return str({name: value for name, value in vars(module).items() if name not in own and not callable(value)})


@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_conversion_changes_nothing(name: str) -> None:
    """Neither the user's network, also by an export, nor what it computes."""
    model, before, pit = converted(name, torch.float32)
    for parameter in pit.nas_parameters():
        parameter.fill_(1)
    args = inputs(name, torch.float32)
    same(model(*copy.deepcopy(args)), pit(*copy.deepcopy(args)), 1e-6)
    scatter(pit)
    pit.export()
    assert snapshot(model) == before
    assert not {id(p) for p in model.parameters()} & {id(p) for p in pit.parameters()}


def test_all_of_them_have_channels_to_search() -> None:
    assert len(ZOO) >= 69
    assert [name for name in ZOO if not converted(name, torch.float32).pit.space.channels] == []


# ---- export --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_an_export_is_the_masked_network(name: str, dtype: torch.dtype) -> None:
    """With random masks: the same outputs, also on other batches, of exactly the size and the MACs reported."""
    pit = converted(name, dtype).pit
    scatter(pit, seed=1)
    small = pit.export()
    for batch in (2, 3):
        args = inputs(name, dtype, batch)
        same(pit(*copy.deepcopy(args)), small(*copy.deepcopy(args)), DTYPES[dtype])
    assert pit.get_cost("params").item() == sum(p.numel() for p in small.parameters())
    macs = count_macs(small, inputs(name, dtype), ignore=UNCOUNTED.get(name, ()))
    assert pit.get_cost("macs").item() == macs.of({})
    if name in AS_GRAPH:
        assert isinstance(small, fx.GraphModule)
    else:
        assert type(small) is type(ZOO[name].build())
    assert not [m for m in small.modules() if type(m).__module__.split(".")[0] == "oneshot"]
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in pit.net_parameters())


# ---- groups --------------------------------------------------------------------------------------------------------


def of_layers(groups: Sequence[FoundGroup], model: nn.Module) -> list[tuple[int, list[str]]]:
    """Units and members of each group, as far as they are rows or columns of convolutions and Linears."""

    def is_of_layer(dimension: Dimension) -> bool:
        path, _, leaf = dimension.name.rpartition(".")
        return leaf == "weight" and dimension.dim < 2 and isinstance(model.get_submodule(path), LAYERS)

    return sorted((group.units, sorted(str(d) for d in group.members if is_of_layer(d))) for group in groups)


def by_hand(groups: Sequence[Group]) -> list[tuple[int, list[str]]]:
    return sorted((group.units, sorted(group.members)) for group in groups)


@pytest.mark.parametrize("name", BY_HAND)
def test_what_is_cut_together_is_known_by_hand(name: str) -> None:
    """Both what following the operators proposes, and what is left of it after the trials."""
    wanted = ZOO[name].groups
    assert wanted is not None
    model, _, pit = converted(name, torch.float32)
    args = inputs(name, torch.float32)
    training = copy.deepcopy(model).train()
    programs = [trace_operators(model, args), trace_operators(training, args, training=True)]
    assert of_layers(find_dimensions(programs, model, {}).groups, model) == by_hand(wanted)
    assert of_layers([axis.group for axis in pit.space.channels], model) == by_hand(wanted)


# ---- trials --------------------------------------------------------------------------------------------------------


def shifted(axis: ChannelAxis, member: Dimension) -> ChannelAxis:
    """The indices of one member belong to the unit before theirs."""
    members = {**axis.group.members, member: axis.group.members[member].roll(1, 0)}
    return replace(axis, group=replace(axis.group, members=members))


def with_axis(space: SearchSpace, axis: ChannelAxis) -> SearchSpace:
    return replace(space, channels=tuple(axis if axis.label == a.label else a for a in space.channels))


@pytest.mark.parametrize("name", ["plain_cnn", "resnet_projection", "resnext", "vit_fused_qkv", "glu_chunk"])
def test_a_trial_finds_every_member_that_is_one_off(name: str) -> None:
    """Of every group every member, alone: the trial of that group fails, and of the group as it is passes."""
    pit = converted(name, torch.float64).pit
    tried = 0
    for axis in pit.space.channels:
        alone = pit.space.only([axis.label])
        assert confirmed(alone, pit.network, pit.example).labels == [axis.label]
        for member in axis.dimensions:
            wrong = confirmed(with_axis(alone, shifted(axis, member)), pit.network, pit.example)
            assert wrong.labels == []
            assert "computes something else" in wrong.frozen[member]
            tried += 1
    assert tried >= 6


@pytest.mark.parametrize("name", ["plain_cnn", "se_conv"])
def test_a_trial_keeps_the_other_groups(name: str) -> None:
    """Where one of all groups is wrong, that one is frozen and no other."""
    pit = converted(name, torch.float64).pit
    for axis in pit.space.channels:
        wrong = with_axis(pit.space, shifted(axis, next(iter(axis.dimensions))))
        left = confirmed(wrong, pit.network, pit.example).labels
        assert left == [label for label in pit.space.labels if label != axis.label]
