"""Branch spaces around three networks of MLPerf Tiny (Banbury et al. 2021, arXiv 2106.07597): layers to be chosen.

Each searchable layer is one of up to four branches: a convolution of 3x3 or of 5x5, a depthwise separable one of 3x3,
or, where the network also works without the layer, the identity. These are the spaces that PLiNIO tests its SuperNet
with (Jahier Pagliari et al. 2023, arXiv 2307.09488), up to the normalisations, which its counts leave out.

``resnet8_supernet``: 7 layers of ResNet-8, 3^4 * 4^3 networks for 3x32x32 (CIFAR-10).
``dscnn_supernet``: 4 layers of DS-CNN, 4^4 networks for 1x49x10 (spoken keywords).
``mobilenet_v1_supernet``: 13 layers of MobileNetV1-0.25, 3^5 * 4^8 networks for 3x96x96 (persons in images).
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from oneshot import LayerChoice
from oneshot.errors import ConfigurationError

__all__ = [
    "DSCNNSupernet",
    "MobileNetV1Supernet",
    "ResNet8Supernet",
    "ResidualBlock",
    "dscnn_supernet",
    "mobilenet_v1_supernet",
    "resnet8_supernet",
]

# (width, stride) of the layers of MobileNetV1; its stem has 32 channels
MOBILENET_V1 = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))


def resnet8_supernet(n_classes: int = 10, width: int = 16, in_channels: int = 3) -> ResNet8Supernet:
    """ResNet-8 with its stem and both convolutions of its three blocks searchable; widths w, 2w, 4w.

    Labels: 'stem', 'block1/conv1' to 'block3/conv2'; candidates 'conv3', 'conv5', 'separable' and, for each second
    convolution of a block, 'identity'. ConfigurationError for a number below 1.

    >>> from oneshot import decisions
    >>> [len(decision.options) for decision in decisions(resnet8_supernet()).values()]
    [3, 3, 4, 3, 4, 3, 4]
    """
    _check("resnet8_supernet", n_classes=n_classes, width=width, in_channels=in_channels)
    return ResNet8Supernet(n_classes, width, in_channels)


def dscnn_supernet(n_classes: int = 12, width: int = 64, in_channels: int = 1) -> DSCNNSupernet:
    """DS-CNN in which a choice stands before each of four 1x1 convolutions; time is the height, MFCCs are the width.

    Labels: 'block1' to 'block4'; candidates 'conv3', 'conv5', 'separable', 'identity'. ConfigurationError for a
    number below 1.

    >>> from oneshot import decisions
    >>> [len(decision.options) for decision in decisions(dscnn_supernet()).values()]
    [4, 4, 4, 4]
    """
    _check("dscnn_supernet", n_classes=n_classes, width=width, in_channels=in_channels)
    return DSCNNSupernet(n_classes, width, in_channels)


def mobilenet_v1_supernet(n_classes: int = 2, width_mult: float = 0.25, in_channels: int = 3) -> MobileNetV1Supernet:
    """MobileNetV1 with all layers behind the stem searchable; ``width_mult`` scales every width.

    Labels: 'layer1' to 'layer13'; candidates 'conv3', 'conv5', 'separable' and, where the shape stays, 'identity'.
    ConfigurationError for a number below 1, or if a width falls below 1.

    >>> from oneshot import decisions
    >>> [len(decision.options) for decision in decisions(mobilenet_v1_supernet()).values()]
    [3, 3, 4, 3, 4, 3, 4, 4, 4, 4, 4, 3, 4]
    """
    _check("mobilenet_v1_supernet", n_classes=n_classes, in_channels=in_channels)
    if not (math.isfinite(width_mult) and width_mult * 32 >= 1):
        raise ConfigurationError(
            f"mobilenet_v1_supernet(width_mult={width_mult!r}): a finite number is needed that leaves one of 32 "
            "channels"
        )
    return MobileNetV1Supernet(n_classes, width_mult, in_channels)


class ResNet8Supernet(nn.Module):
    """stem, three residual blocks, classifier."""

    def __init__(self, n_classes: int, width: int, in_channels: int) -> None:
        super().__init__()
        stem = {
            "conv3": conv_bn_relu(in_channels, width, 3),
            "conv5": conv_bn_relu(in_channels, width, 5),
            "separable": separable(in_channels, width),
        }
        self.stem = LayerChoice(stem, "stem")  # 3x32x32 -> 16x32x32
        self.blocks = nn.Sequential(  # -> 16x32x32 -> 32x16x16 -> 64x8x8
            ResidualBlock(width, width, 1, label="block1"),
            ResidualBlock(width, 2 * width, 2, label="block2"),
            ResidualBlock(2 * width, 4 * width, 2, label="block3"),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(4 * width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))  # (N, 3, 32, 32) -> (N, 64, 8, 8)
        x = self.flatten(self.pool(x))  # (N, 64)
        return self.classifier(x)  # (N, 10)


class ResidualBlock(nn.Module):
    """y = relu(c2(c1(x)) + s(x)): c1 and c2 are chosen; s is a 1x1 convolution where the shape changes.

    c1 has the stride and ends in a ReLU; c2 does not, and may be the identity.
    """

    def __init__(self, in_width: int, out_width: int, stride: int, *, label: str) -> None:
        super().__init__()
        first = {
            "conv3": conv_bn_relu(in_width, out_width, 3, stride),
            "conv5": conv_bn_relu(in_width, out_width, 5, stride),
            "separable": separable(in_width, out_width, stride),
        }
        second = {
            "conv3": conv_bn(out_width, out_width, 3),
            "conv5": conv_bn(out_width, out_width, 5),
            "separable": separable(out_width, out_width)[:-1],
            "identity": nn.Identity(),
        }
        self.conv1 = LayerChoice(first, f"{label}/conv1")
        self.conv2 = LayerChoice(second, f"{label}/conv2")
        keeps = stride == 1 and in_width == out_width
        self.shortcut = nn.Identity() if keeps else conv_bn(in_width, out_width, 1, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))  # (N, C_out, H / stride, W / stride)
        return self.relu(y + self.shortcut(x))


class DSCNNSupernet(nn.Module):
    """stem, four choices with a 1x1 convolution behind each, mean over the image, classifier."""

    def __init__(self, n_classes: int, width: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(  # 1x49x10 -> 64x25x5
            nn.Conv2d(in_channels, width, (10, 4), (2, 2), (5, 1)), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.2)
        )
        self.blocks = nn.Sequential(*(searchable_keyword_block(width, label=f"block{i}") for i in range(1, 5)))
        self.dropout = nn.Dropout(0.4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))  # (N, 1, 49, 10) -> (N, 64, 25, 5)
        x = self.flatten(self.pool(self.dropout(x)))  # (N, 64)
        return self.classifier(x)  # (N, 12)


def searchable_keyword_block(width: int, *, label: str) -> nn.Sequential:
    """A choice, normalised as one, and a 1x1 convolution. There is no ReLU inside of the separable convolution."""
    candidates = {
        "conv3": nn.Conv2d(width, width, 3, padding=1),
        "conv5": nn.Conv2d(width, width, 5, padding=2),
        "separable": nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width), nn.Conv2d(width, width, 1)),
        "identity": nn.Identity(),
    }
    return nn.Sequential(
        LayerChoice(candidates, label), nn.BatchNorm2d(width), nn.ReLU(), *conv_bn_relu(width, width, 1)
    )


class MobileNetV1Supernet(nn.Module):
    """stem, thirteen choices, mean over the image, classifier. Shapes in the comments are for a quarter as wide."""

    def __init__(self, n_classes: int, width_mult: float, in_channels: int) -> None:
        super().__init__()
        width = int(32 * width_mult)
        self.stem = conv_bn_relu(in_channels, width, 3, 2, bias=False)  # 3x96x96 -> 8x48x48
        layers: list[nn.Module] = []
        for i, (full_width, stride) in enumerate(MOBILENET_V1, start=1):  # -> 256x3x3
            out_width = int(full_width * width_mult)
            layers.append(searchable_layer(width, out_width, stride, label=f"layer{i}"))
            width = out_width
        self.layers = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.stem(x))  # (N, 3, 96, 96) -> (N, 256, 3, 3)
        x = self.flatten(self.pool(x))  # (N, 256)
        return self.classifier(x)  # (N, 2)


def searchable_layer(in_width: int, out_width: int, stride: int, *, label: str) -> LayerChoice:
    """One of three convolutions without biases; or the identity, where the shape stays."""
    candidates: dict[str, nn.Module] = {
        "conv3": conv_bn_relu(in_width, out_width, 3, stride, bias=False),
        "conv5": conv_bn_relu(in_width, out_width, 5, stride, bias=False),
        "separable": separable(in_width, out_width, stride, bias=False),
    }
    if stride == 1 and in_width == out_width:
        candidates["identity"] = nn.Identity()
    return LayerChoice(candidates, label)


def separable(in_width: int, out_width: int, stride: int = 1, *, bias: bool = True) -> nn.Sequential:
    """A 3x3 convolution of each channel by itself, with the stride, then 1x1 over the channels.

    >>> sum(p.numel() for p in separable(8, 16).parameters())  # 8 * 9 + 8 + 2 * 8 + 8 * 16 + 16 + 2 * 16
    272
    """
    depthwise = conv_bn_relu(in_width, in_width, 3, stride, groups=in_width, bias=bias)
    return nn.Sequential(*depthwise, *conv_bn_relu(in_width, out_width, 1, bias=bias))


def conv_bn(
    in_width: int, out_width: int, kernel: int, stride: int = 1, *, groups: int = 1, bias: bool = True
) -> nn.Sequential:
    conv = nn.Conv2d(in_width, out_width, kernel, stride, kernel // 2, groups=groups, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(out_width))


def conv_bn_relu(
    in_width: int, out_width: int, kernel: int, stride: int = 1, *, groups: int = 1, bias: bool = True
) -> nn.Sequential:
    return nn.Sequential(*conv_bn(in_width, out_width, kernel, stride, groups=groups, bias=bias), nn.ReLU())


def _check(name: str, **numbers: int) -> None:
    if min(numbers.values()) < 1:
        given = ", ".join(f"{key}={number}" for key, number in numbers.items())
        raise ConfigurationError(f"{name}({given}): numbers of at least 1 are needed")
