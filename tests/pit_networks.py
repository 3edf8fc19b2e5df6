"""Toy networks for PIT with hand counts, and what its tests do to all of them: prune, export, compare, count."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from oneshot.mutables.masks import ChannelMask
from oneshot.pit import PIT

COSTS = {"params": "params_no_norm", "ops": "ops"}


class ToyAdd(nn.Module):
    """Input (3, 15): two convolutions added, then one more and a Linear on all of its maps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv1d(3, 10, 3, padding="same")
        self.conv1 = nn.Conv1d(3, 10, 3, padding="same")
        self.pool = nn.MaxPool1d(2)
        self.conv2 = nn.Conv1d(10, 20, 5, padding="same")
        self.fc = nn.Linear(140, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.conv0(x) + self.conv1(x)))
        return self.fc(torch.flatten(self.conv2(x), 1))


class ToyAdd2D(nn.Module):
    """The same for images, input (3, 15, 15)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 10, 3, padding="same")
        self.conv1 = nn.Conv2d(3, 10, 3, padding="same")
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(10, 20, 5, padding="same")
        self.fc = nn.Linear(980, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.conv0(x) + self.conv1(x)))
        return self.fc(torch.flatten(self.conv2(x), 1))


class SimpleNN(nn.Module):
    """Input (3, 40): two convolutions with BatchNorm and pooling, dropout, a Linear on 57 maps of 10 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.bn0 = nn.Conv1d(3, 32, 3, padding="same"), nn.BatchNorm1d(32)
        self.conv1, self.bn1 = nn.Conv1d(32, 57, 5, padding="same"), nn.BatchNorm1d(57)
        self.pool, self.dropout, self.fc = nn.AvgPool1d(2), nn.Dropout(0.5), nn.Linear(570, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.pool(self.bn0(self.conv0(x))))
        x = F.relu(self.pool(self.bn1(self.conv1(x))))
        return self.fc(self.dropout(x.flatten(1)))


class Cat(nn.Module):
    """Input (3, 24): 10 and 15 channels concatenated into a convolution whose 32 are the output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.conv1, self.conv2 = nn.Conv1d(3, 10, 3), nn.Conv1d(3, 15, 3), nn.Conv1d(25, 32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(torch.cat([self.conv0(x), self.conv1(x)], 1))


class CatDepthwise(nn.Module):
    """Input (16, 20): 8 and 8 channels concatenated, a depthwise and a pointwise convolution behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.conv1 = nn.Conv1d(16, 8, 3), nn.Conv1d(16, 8, 3)
        self.depthwise = nn.Conv1d(16, 16, 5, groups=16)
        self.pointwise = nn.Conv1d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(torch.cat([self.conv0(x), self.conv1(x)], 1)))


class MultiPath(nn.Module):
    """Input (3, 40): conv0 and conv1 into conv5, conv3 into conv4; conv2, conv4 and conv5 are added; two Linears."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.conv1 = (nn.Conv1d(3, 32, 3, padding="same") for _ in range(2))
        self.conv2 = nn.Conv1d(3, 64, 3, padding="same")
        self.conv3, self.conv4 = nn.Conv1d(3, 50, 5, padding="same"), nn.Conv1d(50, 64, 9, padding="same")
        self.conv5, self.norm = nn.Conv1d(64, 64, 3, padding="same"), nn.BatchNorm1d(64)
        self.pool, self.hidden, self.fc = nn.AvgPool1d(4), nn.Linear(640, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        one = self.conv5(torch.cat([self.conv0(x), torch.relu(self.conv1(x))], dim=1))
        x = one + self.conv4(torch.relu(self.conv3(x))) + self.conv2(x)
        return self.fc(torch.relu(self.hidden(self.pool(self.norm(x)).flatten(1))))


class TCBlock(nn.Module):
    """Two convolutions over time of 9 taps, the first one strided where the width changes, and a shortcut."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        stride = 1 if cin == cout else 2
        self.conv1, self.norm1 = nn.Conv1d(cin, cout, 9, stride, 4, bias=False), nn.BatchNorm1d(cout)
        self.conv2, self.norm2 = nn.Conv1d(cout, cout, 9, 1, 4, bias=False), nn.BatchNorm1d(cout)
        self.shortcut: nn.Module = nn.Identity()
        if cin != cout:
            self.shortcut = nn.Sequential(nn.Conv1d(cin, cout, 1, stride, bias=False), nn.BatchNorm1d(cout), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class TCResNet14(nn.Module):
    """TC-ResNet14 for keyword spotting: 40 coefficients are channels, six blocks."""

    def __init__(self) -> None:
        super().__init__()
        widths = [16, 24, 24, 32, 32, 48, 48]
        self.stem = nn.Conv1d(40, 16, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*(TCBlock(cin, cout) for cin, cout in pairwise(widths)))
        self.pool, self.dropout, self.fc = nn.AdaptiveAvgPool1d(1), nn.Dropout(0.5), nn.Linear(48, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(self.pool(self.blocks(self.stem(x))).flatten(1)))


@torch.no_grad()
def half(pit: PIT) -> None:
    """The first half of the channels of each mask to 0."""
    for _, mask in pit.masks.items():
        if isinstance(mask, ChannelMask):
            mask.alpha[: len(mask.alpha) // 2] = 0


@torch.no_grad()
def scatter(pit: PIT, seed: int = 0) -> None:
    """Every alpha anywhere in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    for _, mask in pit.masks.items():
        mask.alpha.copy_(torch.rand(mask.alpha.shape, generator=generator))


@torch.no_grad()
def put(pit: PIT, label: str, alpha: Sequence[float]) -> None:
    pit.masks[label].alpha.copy_(torch.tensor(alpha))


@torch.no_grad()
def export_equal(pit: PIT, *inputs: Tensor, tolerance: float = 1e-9) -> nn.Module:
    """The exported network, after it computed in eval mode what the masked one computes; inputs in float64."""
    pit.eval()
    small = pit.export().eval()
    same(pit(*inputs), small(*inputs), tolerance)
    return small


def same(one: Any, other: Any, tolerance: float) -> None:
    """Equal to ``tolerance`` times the largest number, and not all zero."""
    ones, others = pytree.tree_leaves(one), pytree.tree_leaves(other)
    assert [t.shape for t in ones] == [t.shape for t in others]
    for a, b in zip(ones, others, strict=True):
        scale = float(a.abs().max())
        assert scale > 0
        assert float((a - b).abs().max()) <= tolerance * scale


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the weight of each convolution and Linear."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    return {path: tuple(m.weight.shape) for path, m in model.named_modules() if isinstance(m, kinds)}


def plain_params(model: nn.Module) -> int:
    """Numbers in the convolutions and Linears of a network."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    return sum(p.numel() for m in model.modules() if isinstance(m, kinds) for p in m.parameters(recurse=False))


@torch.no_grad()
def plain_ops(model: nn.Module, x: Tensor) -> int:
    """Products as torch's counter has them (two FLOPs each), and one addition per output of a layer with bias."""
    added: list[int] = []

    def see(module: nn.Module, args: Any, output: Tensor) -> None:
        added.append(output.numel() if getattr(module, "bias", None) is not None else 0)

    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    hooks = [m.register_forward_hook(see) for m in model.modules() if isinstance(m, kinds)]
    with FlopCounterMode(display=False) as counter:
        model(x[:1])
    for hook in hooks:
        hook.remove()
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2 + sum(added)
