"""Depthwise separable networks of MLPerf Tiny (Banbury et al. 2021, arXiv 2106.07597): plain, and there to be narrowed.

stem -> blocks of a depthwise 3x3 and a 1x1 convolution -> mean over the image -> linear

``dscnn``: DS-CNN for spoken keywords (Zhang, Suda, Lai and Chandra 2017, arXiv 1711.07128), 49 frames of 10 MFCCs.
``mobilenet_v1``: MobileNetV1 (Howard et al. 2017, arXiv 1704.04861) for persons in 96x96 images, a quarter as wide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from oneshot.errors import ConfigurationError

__all__ = ["SeparableNet", "SeparableSizes", "dscnn", "mobilenet_v1", "separable_block"]

# (width, stride) of the blocks of MobileNetV1; its stem has 32 channels
MOBILENET_V1 = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))


@dataclass(frozen=True)
class SeparableSizes:
    """``blocks``: (width, stride) each. ``stem_kernel``, ``stem_stride``, ``stem_padding``: (height, width).

    ``dropout``: after the stem, and before the mean over the image.
    """

    stem: int
    blocks: tuple[tuple[int, int], ...]
    n_classes: int
    in_channels: int
    stem_kernel: tuple[int, int] = (3, 3)
    stem_stride: tuple[int, int] = (2, 2)
    stem_padding: tuple[int, int] = (1, 1)
    dropout: tuple[float, float] = (0.0, 0.0)


def dscnn(n_classes: int = 12, width: int = 64) -> SeparableNet:
    """Four blocks for 1x49x10: time is the height, the MFCCs are the width.

    The 24,908 parameters of MLPerf Tiny are these and the 1,152 running statistics of the normalisations.

    >>> sum(p.numel() for p in dscnn().parameters())
    23756
    """
    sizes = SeparableSizes(
        stem=width,
        blocks=((width, 1),) * 4,
        n_classes=n_classes,
        in_channels=1,
        stem_kernel=(10, 4),
        stem_padding=(5, 1),  # TensorFlow pads 4 and 5 frames; 49 become 25 either way
        dropout=(0.2, 0.4),
    )
    return SeparableNet(sizes)


def mobilenet_v1(n_classes: int = 2, width_mult: float = 0.25) -> SeparableNet:
    """Thirteen blocks for 3x96x96; ``width_mult`` scales every width. ConfigurationError if a width falls below 1.

    The 221,794 parameters of MLPerf Tiny are these and the 5,472 running statistics of the normalisations.

    >>> sum(p.numel() for p in mobilenet_v1().parameters())
    216322
    """
    if not (math.isfinite(width_mult) and width_mult * 32 >= 1):
        raise ConfigurationError(
            f"mobilenet_v1(width_mult={width_mult!r}): a finite number is needed that leaves one of 32 channels"
        )
    blocks = tuple((int(width * width_mult), stride) for width, stride in MOBILENET_V1)
    return SeparableNet(SeparableSizes(int(32 * width_mult), blocks, n_classes, in_channels=3))


class SeparableNet(nn.Module):
    """Shapes in the comments are those of DS-CNN; for MobileNetV1-0.25: 8x48x48 after the stem, 256x3x3 at the end."""

    def __init__(self, sizes: SeparableSizes) -> None:
        super().__init__()
        self.stem = nn.Sequential(  # 1x49x10 -> 64x25x5
            nn.Conv2d(sizes.in_channels, sizes.stem, sizes.stem_kernel, sizes.stem_stride, sizes.stem_padding),
            nn.BatchNorm2d(sizes.stem),
            nn.ReLU(),
            nn.Dropout(sizes.dropout[0]),
        )
        blocks: list[nn.Module] = []
        width = sizes.stem
        for out_width, stride in sizes.blocks:  # -> 64x25x5
            blocks.append(separable_block(width, out_width, stride))
            width = out_width
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(sizes.dropout[1])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(width, sizes.n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))  # (N, 1, 49, 10) -> (N, 64, 25, 5)
        x = self.flatten(self.pool(self.dropout(x)))  # (N, 64)
        return self.classifier(x)  # (N, 12)


def separable_block(in_width: int, out_width: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution of each channel by itself, with the stride, then 1x1 over the channels; biases as published.

    >>> block = separable_block(8, 16)
    >>> sum(p.numel() for p in block.parameters())  # 8 * 9 + 8 + 2 * 8 + 8 * 16 + 16 + 2 * 16
    272
    """
    return nn.Sequential(
        nn.Conv2d(in_width, in_width, 3, stride, 1, groups=in_width),
        nn.BatchNorm2d(in_width),
        nn.ReLU(),
        nn.Conv2d(in_width, out_width, 1),
        nn.BatchNorm2d(out_width),
        nn.ReLU(),
    )
