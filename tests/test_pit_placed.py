"""Masks that a network was written with: which of them are searched, and what happens to the rest."""

from __future__ import annotations

import copy

import pytest
import torch
from pit_networks import same, scatter
from torch import Tensor, nn

from oneshot import PIT, ChannelMask, DilationMask, KernelMask, MaskedConv1d, MaskedConv2d, MaskedLinear
from oneshot.errors import ConfigurationError


def written() -> tuple[nn.Sequential, ChannelMask, KernelMask]:
    channels, kernel = ChannelMask(8), KernelMask(5)
    net = nn.Sequential(
        MaskedConv1d(3, 8, 5, padding=2, channel_mask=channels, kernel_mask=kernel),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Conv1d(8, 6, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(60, 2),
    )
    return net, channels, kernel


@torch.no_grad()
def test_only_masks_placed_by_hand_are_searched() -> None:
    net, _, _ = written()
    pit = PIT(net, (3, 10), autoconvert_layers=False)
    assert list(pit.masks) == ["0", "0.kernel_size", "0.dilation"]
    assert [mask.alpha.requires_grad for _, mask in pit.masks.items()] == [True, True, False]  # no DilationMask there
    assert pit.reachable_costs()["params"][0] == 1 * 3 * 1 + 1 + 2 + 6 * 1 * 3 + 6 + 122
    scatter(pit, 0)
    small = pit.eval().export()
    x = torch.randn(4, 3, 10)
    same(pit(x), small(x), 1e-5)
    assert not any(type(module).__module__.startswith("oneshot") for module in small.modules())


def test_the_decisions_of_placed_masks_are_taken_over() -> None:
    net, channels, kernel = written()
    channels.keep([1, 5])
    kernel.decide(3)
    pit = PIT(net, (3, 10), autoconvert_layers=False)
    assert pit.arch() == {"0": [1, 5], "0.kernel_size": 3, "0.dilation": 1}
    small = pit.export()
    assert pit.summary()["0"]["kernel_size"] == (3,)
    assert sum(p.numel() for p in small.parameters()) == 2 * 9 + 2 + 2 * 2 + 6 * 2 * 3 + 6 + 122
    assert isinstance(net[0], MaskedConv1d)  # the network handed over is as it was
    assert channels.decision() == [1, 5]


def test_all_layers_are_searched_beside_them() -> None:
    net, _, _ = written()
    labels = list(PIT(net, (3, 10)).masks)
    assert {"0", "0.kernel_size", "3", "3.kernel_size"} <= set(labels)


class Called(nn.Module):
    """A mask that is called on a tensor, after the normalisation."""

    def __init__(self, units: int = 6) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.mask, self.head = ChannelMask(units), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mask(torch.relu(self.norm(self.conv(x))))).mean((2, 3))


@torch.no_grad()
def test_a_mask_called_on_a_tensor() -> None:
    net = Called().eval()
    net.mask.keep([0, 4, 5])
    pit = PIT(net, (3, 8, 8), autoconvert_layers=False)
    assert pit.arch() == {"conv": [0, 4, 5]}
    x = torch.randn(2, 3, 8, 8)
    same(net(x), pit(x), 1e-6)  # after the normalisation a zero is a zero: both agree
    same(pit(x), pit.export()(x), 1e-5)


def test_a_mask_as_a_layer_and_in_another_one() -> None:
    shared = ChannelMask(8)
    net = nn.Sequential(
        MaskedConv2d(3, 8, 1, channel_mask=shared), nn.Conv2d(8, 8, 1, groups=8), shared, nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    pit = PIT(net, (3, 5, 5), autoconvert_layers=False)
    assert list(pit.masks) == ["0"]
    pit.masks["0"].keep([1, 2, 6])
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        same(pit(x), pit.export()(x), 1e-5)


def test_masks_that_cannot_be_searched_are_errors() -> None:
    circular = MaskedConv1d(3, 4, 3, padding=1, padding_mode="circular", kernel_mask=KernelMask(3))
    with pytest.raises(ConfigurationError, match=r"the kernel_mask of 0\.weight cannot be searched: padding_mode"):
        PIT(nn.Sequential(circular, nn.Conv1d(4, 2, 1)), (3, 9))
    sizes = MaskedConv1d(3, 4, 3, kernel_mask=KernelMask(3, sizes=(1, 3, 5)))
    with pytest.raises(ConfigurationError, match=r"has sizes \(1, 3, 5\), its taps \(1, 2, 3\)"):
        PIT(nn.Sequential(sizes, nn.Conv1d(4, 2, 1)), (3, 9))


def test_one_mask_object_in_two_layers() -> None:
    shared = ChannelMask(5)
    net = nn.ModuleDict(
        {
            "a": MaskedLinear(3, 5, channel_mask=shared),
            "b": MaskedLinear(3, 5, channel_mask=shared),
            "head": nn.Linear(5, 2),
        }
    )

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = net

        def forward(self, x: Tensor) -> Tensor:
            head: Tensor = self.parts["head"](torch.relu(self.parts["a"](x) + self.parts["b"](x)))
            return head

    pit = PIT(Sum(), (3,), autoconvert_layers=False)
    assert list(pit.masks) == ["parts.a"]
    other = copy.deepcopy(Sum())
    other.parts["b"].channel_mask = ChannelMask(5)
    with pytest.raises(ConfigurationError, match="hand one and the same object to both"):
        PIT(other, (3,), autoconvert_layers=False)


def test_a_mask_of_the_wrong_size_or_on_an_output() -> None:
    with pytest.raises(ConfigurationError, match="which has 6 there"):
        Called(5)(torch.randn(1, 3, 8, 8))
    output = nn.Sequential(nn.Linear(3, 4), MaskedLinear(4, 2, channel_mask=ChannelMask(2)))
    with pytest.raises(ConfigurationError, match=r"1\.weight\[0\] cannot be searched: an output of the network"):
        PIT(output, (3,))
    with pytest.raises(ConfigurationError, match="stride 1"):
        MaskedConv1d(1, 1, 3, stride=2, dilation_mask=DilationMask(3))
    with pytest.raises(ConfigurationError, match="a ChannelMask is needed"):
        MaskedConv2d(1, 2, 3, channel_mask=KernelMask(2))  # type: ignore[arg-type]
