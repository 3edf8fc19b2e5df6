"""Slices of channels in PIT networks: an export adapts the indices, and costs know which channels are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pit_networks import export_equal, plain_params, scatter
from torch import Tensor, nn

from oneshot.mutables.masks import ChannelMask
from oneshot.pit import PIT

BLOCKS = 16


class Indexing(nn.Module):
    """Input (3, 12): 16 channels, of which ``take`` reads some, into a second convolution."""

    def __init__(self, take: Callable[[Tensor], Tensor], read: int) -> None:
        super().__init__()
        self.take = take
        self.conv0, self.conv1 = nn.Conv1d(3, BLOCKS, 3, padding="same"), nn.Conv1d(read, 4, 3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(self.take(torch.relu(self.conv0(x))))


EVEN = [i % 2 == 0 for i in range(BLOCKS)]
TAKES: dict[str, tuple[Callable[[Tensor], Tensor], list[int]]] = {
    "slice": (lambda x: x[:, 2:11], list(range(2, 11))),
    "step": (lambda x: x[:, 1::3], list(range(1, BLOCKS, 3))),
    "whole": (lambda x: x[:, :], list(range(BLOCKS))),
    "ellipsis": (lambda x: x[:, 4:, ...], list(range(4, BLOCKS))),
    "negative": (lambda x: x[:, -5:], list(range(11, BLOCKS))),
    "narrow": (lambda x: x.narrow(1, 3, 6), list(range(3, 9))),
    "list": (lambda x: x[:, [0, 3, 7, 8, 15]], [0, 3, 7, 8, 15]),
    "bool": (lambda x: x[:, torch.tensor(EVEN)], list(range(0, BLOCKS, 2))),
    "tensor": (lambda x: x[:, torch.tensor([12, 4, 3])], [12, 4, 3]),
    "int": (lambda x: x[:, 4].unsqueeze(1), [4]),
    "select": (lambda x: torch.index_select(x, 1, torch.tensor([0, 3, 15])), [0, 3, 15]),
}
PATTERN = [i for i in range(BLOCKS) if i % 4 in (0, 3)]  # alpha = [1, 0, 0, 1] * 4


def indexing(name: str) -> tuple[PIT, list[int]]:
    take, read = TAKES[name]
    return PIT(Indexing(take, len(read)).double(), (3, 12), cost="params_no_norm"), read


@pytest.mark.parametrize("name", list(TAKES))
def test_every_other_pair_of_channels(name: str) -> None:
    """With [1, 0, 0, 1] * 4 on what can be cut, the export runs and computes the same."""
    pit, _ = indexing(name)
    for label, mask in pit.masks.items():
        if isinstance(mask, ChannelMask):
            alpha = torch.tensor([1.0, 0, 0, 1]).repeat(len(mask.alpha) // 4 + 1)[: len(mask.alpha)]
            with torch.no_grad():
                pit.masks[label].alpha.copy_(alpha)
    small = export_equal(pit, torch.randn(3, 3, 12, dtype=torch.float64))
    assert pit.get_cost("params_no_norm").item() == plain_params(small)


@pytest.mark.parametrize("name", ["slice", "step", "whole", "ellipsis", "negative", "narrow"])
def test_the_limits_of_slices_are_adapted(name: str) -> None:
    pit, read = indexing(name)
    check_indices(pit, read)


@pytest.mark.parametrize("name", ["list", "bool", "tensor", "select"])
def test_lists_of_indices_are_adapted(name: str) -> None:
    pit, read = indexing(name)
    check_indices(pit, read)


def check_indices(pit: PIT, read: list[int]) -> None:
    """All channels that are read can be cut, with the columns of conv1 in the order in which they are read."""
    rows = [
        (axis.label, indices[:, 0].tolist())
        for axis in pit.space.channels
        for dimension, indices in axis.dimensions.items()
        if (dimension.name, dimension.dim) == ("conv0.weight", 0)
    ]
    searched = {channel for _, channels in rows for channel in channels}
    assert searched >= set(read)
    kept = set(range(BLOCKS)) - searched
    for label, channels in rows:
        units = [unit for unit, channel in enumerate(channels) if channel in PATTERN]
        pit.masks[label].keep(units)
        kept |= {channels[unit] for unit in units}
    small: Any = export_equal(pit, torch.randn(3, 3, 12, dtype=torch.float64))
    original: Any = pit.network
    columns = [place for place, channel in enumerate(read) if channel in kept]
    assert torch.equal(small.conv0.weight[:, :, -1], original.conv0.weight[sorted(kept), :, -1])
    assert torch.equal(small.conv1.weight[:, :, -1], original.conv1.weight[:, columns, -1])


class SlicedGroups(nn.Module):
    """A grouped convolution by hand: each slice of the channels has a convolution of its own."""

    def __init__(self, groups: int, width: int) -> None:
        super().__init__()
        self.groups, self.width = groups, width
        self.conv0 = nn.Conv1d(3, groups * width, 3, padding="same")
        self.parts = nn.ModuleList(nn.Conv1d(width, 2, 3, padding="same") for _ in range(groups))
        self.fc = nn.Linear(2 * groups, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, w = torch.relu(self.conv0(x)), self.width
        parts = [part(x[:, w * i : w * (i + 1)]) for i, part in enumerate(self.parts)]
        return self.fc(torch.cat(parts, 1).mean(2))


class GroupsOfSlices(SlicedGroups):
    """The slices are read by one grouped convolution behind them, in the reverse order."""

    def __init__(self, groups: int, width: int) -> None:
        super().__init__(groups, width)
        self.parts = nn.ModuleList()
        self.grouped = nn.Conv1d(groups * width, 2 * groups, 3, padding="same", groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        x, w = torch.relu(self.conv0(x)), self.width
        parts = [x[:, w * i : w * (i + 1)] for i in reversed(range(self.groups))]
        return self.fc(torch.relu(self.grouped(torch.cat(parts, 1))).mean(2))


@pytest.mark.parametrize(
    ("network", "groups", "width"),
    [(SlicedGroups, 3, 4), (SlicedGroups, 5, 2), (GroupsOfSlices, 3, 4), (GroupsOfSlices, 35, 2)],
)
def test_groups_made_of_slices(network: type[SlicedGroups], groups: int, width: int) -> None:
    pit = PIT(network(groups, width).double(), (3, 6), cost="params_no_norm")
    for seed in range(2):
        scatter(pit, seed)
        small = export_equal(pit, torch.randn(2, 3, 6, dtype=torch.float64))
        assert pit.get_cost("params_no_norm").item() == plain_params(small)


def test_slices_of_a_group_can_be_cut() -> None:
    """Each of the 3 slices is a group of channels of its own: 4 rows of conv0 with the columns of one part."""
    pit = PIT(SlicedGroups(3, 4).double(), (3, 6))
    of_conv0 = [
        axis.units
        for axis in pit.space.channels
        if any((d.name, d.dim) == ("conv0.weight", 0) for d in axis.dimensions)
    ]
    assert sorted(of_conv0) == [4, 4, 4]


class SliceBetween(nn.Module):
    """Input (3, 5, 5): all 8 channels of a convolution through a slice into a second one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.conv1 = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 6, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(self.conv0(x)[:, 0:8])


@pytest.mark.parametrize("discrete", [False, True])
def test_the_gradient_passes_a_slice(discrete: bool) -> None:
    """Each of 8 channels has 3 weights before the slice and 6 behind it: d params / d alpha = 9."""
    pit = PIT(SliceBetween(), (3, 5, 5), cost="params_no_norm", discrete_cost=discrete)
    assert pit.cost.item() == 3 * 8 + 8 * 6
    pit.cost.backward()
    assert pit.masks["conv0"].alpha.grad.tolist() == pytest.approx([9] * 8)
    pit.masks["conv0"].keep([1, 2, 7])
    assert pit.cost.item() == 9 * 3
    assert plain_params(pit.export()) == 9 * 3
