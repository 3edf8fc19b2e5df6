"""MobileNetV2, MobileNetV3-Large and ResNet-18 after their papers' tables, for 224x224 images and 1000 classes."""

from __future__ import annotations

from torch import Tensor, nn


def conv_bn(cin: int, cout: int, k: int, s: int = 1, g: int = 1, act: type[nn.Module] | None = None) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(cin, cout, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(cout)]
    return nn.Sequential(*layers, *([] if act is None else [act()]))


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.down, self.up = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.hardsigmoid(self.up(self.down(self.pool(x)).relu())) * x


class Bottleneck(nn.Module):
    """1x1 to ``mid`` channels, depthwise, perhaps squeeze-excite, 1x1 to ``cout``; added to x if that fits."""

    def __init__(self, cin: int, mid: int, cout: int, k: int, s: int, act: type[nn.Module], se: int = 0) -> None:
        super().__init__()
        self.shortcut = s == 1 and cin == cout
        self.expand = conv_bn(cin, mid, 1, act=act) if mid != cin else nn.Identity()
        self.depthwise = conv_bn(mid, mid, k, s, mid, act)
        self.se = SqueezeExcite(mid, se) if se else nn.Identity()
        self.project = conv_bn(mid, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.se(self.depthwise(self.expand(x))))
        return x + y if self.shortcut else y


def mobilenet_v2() -> nn.Sequential:
    """arXiv 1801.04381, table 2. 3,504,872 parameters."""
    blocks, cin = [], 32
    for t, c, n, s in [
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]:
        for i in range(n):
            blocks.append(Bottleneck(cin, t * cin, c, 3, s if i == 0 else 1, nn.ReLU6))
            cin = c
    stem, last = conv_bn(3, 32, 3, 2, act=nn.ReLU6), conv_bn(320, 1280, 1, act=nn.ReLU6)
    return nn.Sequential(stem, *blocks, last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000))


def mobilenet_v3() -> nn.Sequential:
    """arXiv 1905.02244, table 1 (large). 5,483,032 parameters."""
    r, h = nn.ReLU, nn.Hardswish
    table: list[tuple[int, int, int, int, type[nn.Module], int]] = [
        (3, 16, 16, 1, r, 0), (3, 64, 24, 2, r, 0), (3, 72, 24, 1, r, 0),
        (5, 72, 40, 2, r, 24), (5, 120, 40, 1, r, 32), (5, 120, 40, 1, r, 32),
        (3, 240, 80, 2, h, 0), (3, 200, 80, 1, h, 0), (3, 184, 80, 1, h, 0), (3, 184, 80, 1, h, 0),
        (3, 480, 112, 1, h, 120), (3, 672, 112, 1, h, 168),
        (5, 672, 160, 2, h, 168), (5, 960, 160, 1, h, 240), (5, 960, 160, 1, h, 240),
    ]  # fmt: skip
    blocks, cin = [], 16
    for k, mid, cout, s, act, se in table:
        blocks.append(Bottleneck(cin, mid, cout, k, s, act, se))
        cin = cout
    head = [nn.Linear(960, 1280), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(1280, 1000)]
    stem, last = conv_bn(3, 16, 3, 2, act=h), conv_bn(160, 960, 1, act=h)
    return nn.Sequential(stem, *blocks, last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


class BasicBlock(nn.Module):
    def __init__(self, cin: int, cout: int, s: int) -> None:
        super().__init__()
        self.one, self.two = conv_bn(cin, cout, 3, s, act=nn.ReLU), conv_bn(cout, cout, 3)
        self.down = conv_bn(cin, cout, 1, s) if s != 1 or cin != cout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.two(self.one(x)) + self.down(x))


def resnet18() -> nn.Sequential:
    """arXiv 1512.03385, table 1. 11,689,512 parameters."""
    blocks, cin = [], 64
    for cout, s in [(64, 1), (128, 2), (256, 2), (512, 2)]:
        blocks += [BasicBlock(cin, cout, s), BasicBlock(cout, cout, 1)]
        cin = cout
    stem = [conv_bn(3, 64, 7, 2, act=nn.ReLU), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))
