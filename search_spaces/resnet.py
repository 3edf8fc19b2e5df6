"""Residual networks (He, Zhang, Ren and Sun 2015, arXiv 1512.03385): plain networks on (N, 3, H, W) to be narrowed.

stem -> stages of basic blocks, the first of each with a stride -> global pool -> linear

``resnet8``: image classification of MLPerf Tiny (Banbury et al. 2021, arXiv 2106.07597), for CIFAR-10.
``resnet20``: the paper's section 4.2, for CIFAR-10. ``resnet18``: its table 1, for ImageNet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from oneshot.errors import ConfigurationError

__all__ = ["BasicBlock", "ResNet", "ResNetSizes", "Shortcut", "resnet8", "resnet18", "resnet20"]

Shortcut = Literal["pad", "conv", "conv_bn"]
"""Where a block changes the shape: "pad", zeros for the new channels (option A of the paper); "conv_bn", a normalised
1x1 convolution (option B); "conv", one with a bias instead."""


@dataclass(frozen=True)
class ResNetSizes:
    """``stages``: (width, number of blocks, stride of the first block) each. ``bias``: of the 3x3 convolutions.

    ``small_images``: a stem of 3x3 that keeps the size, for 32x32; else 7x7 and a maximum, which quarter it.
    ConfigurationError for another shortcut.
    """

    stages: tuple[tuple[int, int, int], ...]
    stem: int
    n_classes: int
    in_channels: int = 3
    small_images: bool = True
    shortcut: Shortcut = "conv_bn"
    bias: bool = False

    def __post_init__(self) -> None:
        if self.shortcut not in ("pad", "conv", "conv_bn"):
            raise ConfigurationError(
                f"ResNetSizes(shortcut={self.shortcut!r}): allowed are 'pad', 'conv' and 'conv_bn'"
            )


def resnet8(n_classes: int = 10) -> ResNet:
    """Three blocks of 16, 32 and 64 channels for 32x32, with biases and shortcuts as MLPerf Tiny has them.

    Its published 78,666 parameters are these and the 480 running statistics of the normalisations.

    >>> sum(p.numel() for p in resnet8().parameters())
    78186
    """
    stages = ((16, 1, 1), (32, 1, 2), (64, 1, 2))
    return ResNet(ResNetSizes(stages, stem=16, n_classes=n_classes, shortcut="conv", bias=True))


def resnet20(n_classes: int = 10, *, shortcut: Shortcut = "pad") -> ResNet:
    """Nine blocks of 16, 32 and 64 channels for 32x32: 0.27 M parameters in table 6 of the paper.

    ConfigurationError for another shortcut than "pad" (as there), "conv_bn" and "conv".

    >>> sum(p.numel() for p in resnet20().parameters())
    269722
    """
    return ResNet(ResNetSizes(((16, 3, 1), (32, 3, 2), (64, 3, 2)), stem=16, n_classes=n_classes, shortcut=shortcut))


def resnet18(n_classes: int = 1000) -> ResNet:
    """Eight blocks of 64 to 512 channels for 224x224.

    >>> sum(p.numel() for p in resnet18().parameters())
    11689512
    """
    stages = ((64, 2, 1), (128, 2, 2), (256, 2, 2), (512, 2, 2))
    return ResNet(ResNetSizes(stages, stem=64, n_classes=n_classes, small_images=False))


class ResNet(nn.Module):
    """Shapes in the comments are those of ResNet-20; for ResNet-18: 64x56x56 after the stem, 512x7x7 at the end."""

    def __init__(self, sizes: ResNetSizes) -> None:
        super().__init__()
        if sizes.small_images:
            self.stem = conv_bn_relu(sizes.in_channels, sizes.stem, 3, bias=sizes.bias)  # 3x32x32 -> 16x32x32
        else:
            conv = conv_bn_relu(sizes.in_channels, sizes.stem, 7, 2, bias=sizes.bias)
            self.stem = nn.Sequential(*conv, nn.MaxPool2d(3, 2, 1))
        blocks: list[nn.Module] = []
        width = sizes.stem
        for out_width, n_blocks, first_stride in sizes.stages:  # -> 16x32x32 -> 32x16x16 -> 64x8x8
            for i in range(n_blocks):
                stride = first_stride if i == 0 else 1
                blocks.append(BasicBlock(width, out_width, stride, sizes.shortcut, bias=sizes.bias))
                width = out_width
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(width, sizes.n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))  # (N, 3, 32, 32) -> (N, 64, 8, 8)
        x = self.flatten(self.pool(x))  # (N, 64)
        return self.classifier(x)  # (N, 10)


class BasicBlock(nn.Module):
    """y = relu(c2(relu(c1(x))) + s(x)): two 3x3 convolutions, c1 with the stride; s as ``Shortcut``, or the identity.

    >>> block = BasicBlock(16, 32, 2, "conv_bn")
    >>> sum(p.numel() for p in block.parameters())  # 9 * 16 * 32 + 9 * 32 * 32 + 16 * 32 + 3 * 64
    14528
    """

    def __init__(self, in_width: int, out_width: int, stride: int, shortcut: Shortcut, *, bias: bool = False) -> None:
        super().__init__()
        self.conv1 = conv_bn_relu(in_width, out_width, 3, stride, bias=bias)
        self.conv2 = conv_bn(out_width, out_width, 3, bias=bias)
        keeps = stride == 1 and in_width == out_width
        self.shortcut = nn.Identity() if keeps else _shortcut(in_width, out_width, stride, shortcut)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))  # (N, C_out, H / stride, W / stride)
        return self.relu(y + self.shortcut(x))


def _shortcut(in_width: int, out_width: int, stride: int, kind: Shortcut) -> nn.Module:
    if kind == "pad":
        return PadShortcut(in_width, out_width, stride)
    if kind == "conv":
        return nn.Conv2d(in_width, out_width, 1, stride)
    return conv_bn(in_width, out_width, 1, stride)


class PadShortcut(nn.Module):
    """Every stride-th pixel, and zeros for the new channels: half of them before the old ones, half after.

    ConfigurationError if there are fewer channels than before.

    >>> import torch
    >>> PadShortcut(1, 3, 2)(torch.ones(1, 1, 4, 4)).sum((0, 2, 3))
    tensor([0., 4., 0.])
    """

    def __init__(self, in_width: int, out_width: int, stride: int) -> None:
        super().__init__()
        if out_width < in_width:
            raise ConfigurationError(
                f"PadShortcut({in_width}, {out_width}): zeros only add channels; take shortcut='conv_bn' for a stage "
                "that is narrower than the one before"
            )
        self.before = (out_width - in_width) // 2
        self.after = out_width - in_width - self.before
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]  # (N, C, H / stride, W / stride)
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))  # (N, C_out, H / stride, W / stride)


def conv_bn(in_width: int, out_width: int, kernel: int, stride: int = 1, *, bias: bool = False) -> nn.Sequential:
    conv = nn.Conv2d(in_width, out_width, kernel, stride, kernel // 2, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(out_width))


def conv_bn_relu(in_width: int, out_width: int, kernel: int, stride: int = 1, *, bias: bool = False) -> nn.Sequential:
    return nn.Sequential(*conv_bn(in_width, out_width, kernel, stride, bias=bias), nn.ReLU())
