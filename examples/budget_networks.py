"""Small networks, their data and their targets, for ``bench_budgets.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from pit_supernet_tcn import parts, spoken_digits
from supernet_digits import conv, layer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset, TensorDataset

from oneshot.data import digits
from search_spaces.dscnn import SeparableNet, SeparableSizes
from search_spaces.resnet import ResNet, ResNetSizes
from search_spaces.tcn import SmallTCN, SmallTCNSizes

__all__ = ["COSTS", "Data", "Task", "tasks_of"]

COSTS = ("params", "macs")
_EVERY = 2  # of the spoken digits, one in so many is trained on: a run is to take ten seconds


class Data(NamedTuple):
    """Samples are (float32, class int64)."""

    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]


@dataclass(frozen=True)
class Task:
    """A network and its data; ``shares``: the targets, cost -> share of the whole (largest) network.

    ``method``: 'pit' for masks; 'supernet' or 'proxyless' for choices. ``strengths``: of the sweep, from one that
    cuts hardly anything to one that keeps the tightest targets.
    """

    name: str
    method: str
    shape: tuple[int, ...]
    build: Callable[[], nn.Module]
    data: Callable[[int], Data]
    shares: tuple[Mapping[str, float], ...]
    strengths: tuple[float, ...]


def tasks_of(spoken: Path | None) -> dict[str, Task]:
    """The tasks by name; without a folder of spoken digits, those of scikit-learn stand in for them."""
    images = digit_images
    if spoken is None:
        frames, rows, shape = images, partial(digit_images, as_signals=True), (8, 8)
        keywords = partial(dscnn, (3, 3), (1, 1), (1, 1))
    else:
        frames, rows, shape = partial(spoken_images, spoken), partial(spoken_signals, spoken), (24, 32)
        keywords = partial(dscnn, (10, 4), (4, 2), (5, 1))
    found = [
        Task("ResNet-8", "pit", (1, 8, 8), resnet8, images, RESNET_SHARES, (0.2, 0.45, 1.0, 2.2, 5.0)),
        Task(
            "DS-CNN",
            "pit",
            (1, 8, 8) if spoken is None else (1, 32, 12),
            keywords,
            frames,
            MASK_SHARES,
            (0.15, 0.27, 0.5, 0.9, 1.6),
        ),
        Task("TCN", "pit", shape, partial(tcn, shape[0]), rows, MASK_SHARES, (0.1, 0.25, 0.6, 1.5, 3.6)),
        Task("SuperNet", "supernet", (1, 8, 8), ChoiceNet, images, CHOICE_SHARES, (0.015, 0.03, 0.06, 0.12, 0.25)),
        Task("Proxyless", "proxyless", (1, 8, 8), ChoiceNet, images, CHOICE_SHARES, (0.02, 0.028, 0.04, 0.055, 0.08)),
    ]
    return {task.name: task for task in found}


# Pairs in which now the parameters bind, now the MACs.
RESNET_SHARES = ({"params": 0.5, "macs": 0.4}, {"params": 0.08, "macs": 0.2}, {"params": 0.06, "macs": 0.04})
MASK_SHARES = ({"params": 0.6, "macs": 0.5}, {"params": 0.2, "macs": 0.4}, {"params": 0.25, "macs": 0.12})
CHOICE_SHARES = ({"params": 0.4, "macs": 0.3}, {"params": 0.12}, {"params": 0.2, "macs": 0.1})


# ---- networks --------------------------------------------------------------------------------------------------


def resnet8() -> ResNet:
    """ResNet-8 of MLPerf Tiny, at most 48 channels wide instead of 64, for 1x8x8."""
    stages = ((12, 1, 1), (24, 1, 2), (48, 1, 2))
    return ResNet(ResNetSizes(stages, stem=12, n_classes=10, in_channels=1, shortcut="conv", bias=True))


def dscnn(kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> SeparableNet:
    """DS-CNN of MLPerf Tiny, half as wide and without dropout; time is the height."""
    return SeparableNet(SeparableSizes(32, ((32, 1),) * 4, 10, 1, kernel, stride, padding))


def tcn(in_channels: int) -> SmallTCN:
    return SmallTCN(SmallTCNSizes(in_channels, ((16, 9), (32, 9), (32, 9)), n_classes=10, dropout=0.0))


class ChoiceNet(nn.Module):
    """A stem, six layers to choose, the mean over the image, a linear layer: 3 * 4^5 = 3,072 networks for 1x8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(1, 8, 3, 1)  # 1x8x8 -> 8x8x8
        self.layers = nn.Sequential(
            layer(8, 8, 1, "layer1"),
            layer(8, 8, 1, "layer2"),
            layer(8, 16, 2, "layer3"),  # -> 16x4x4
            *(layer(16, 16, 1, f"layer{i}") for i in (4, 5, 6)),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.stem(x))  # (N, 1, 8, 8) -> (N, 16, 4, 4)
        return self.classifier(self.flatten(self.pool(x)))  # (N, 10)


# ---- data ------------------------------------------------------------------------------------------------------


def digit_images(seed: int, *, as_signals: bool = False) -> Data:
    """1,078 images for training, 360 to choose, 359 to test, cut anew for every seed; a row is a time step, or not."""
    data = digits()
    x = data.images.float() / 255 - 0.3  # (N, 1, 8, 8); 0.3 is about the mean
    x = x[:, 0].transpose(1, 2) if as_signals else x  # (N, 8 columns, 8 rows)
    rest, test = parts(list(range(len(data))), data.targets, 0.2, seed)
    train, validation = parts(rest, data.targets, 0.25, seed)
    return Data(*(TensorDataset(x[part], data.targets[part]) for part in (train, validation, test)))


@cache
def spoken_signals(place: Path, seed: int = 0) -> Data:
    """(24 bands, 32 frames of 32 ms): 1,200 recordings for training, 300 to choose, 300 to test, for every seed."""
    return _changed(spoken_digits(place), lambda x: F.avg_pool1d(x, 2))  # 65 frames -> 32


@cache
def spoken_images(place: Path, seed: int = 0) -> Data:
    """(1, 32 frames, 12 bands), of the same recordings."""
    return _changed(spoken_digits(place), lambda x: F.avg_pool2d(x[:, None].transpose(2, 3), 2))


def _changed(sets: Any, change: Callable[[Tensor], Tensor]) -> Data:
    made = Data(*(TensorDataset(change(part.tensors[0]), part.tensors[1]) for part in sets))
    return made._replace(train=Subset(made.train, range(0, len(sets[0]), _EVERY)))
