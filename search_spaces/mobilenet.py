"""The search space of ProxylessNAS (arXiv 1812.00332, section 4): a MobileNetV2 whose blocks are to be chosen.

stem -> a fixed block -> searchable blocks in stages -> 1x1 feature mix -> global pool -> linear

``proxylessnas`` has the sizes of the paper, for ImageNet; ``mobilenet_small`` is for images of 8x8 to 32x32.
To search another network, change a size in ``Sizes`` or copy this file. Images are (N, C, H, W).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from oneshot import LayerChoice
from oneshot.errors import ConfigurationError

__all__ = [
    "Classifier",
    "ConvBNReLU6",
    "FeatureMix",
    "InvertedResidual",
    "MobileNet",
    "Sizes",
    "Stem",
    "make_divisible",
    "mobilenet_small",
    "mobilenet_space",
    "proxylessnas",
    "searchable_block",
]

Norm = Callable[[int], nn.Module]
"""Number of channels -> normalisation layer, such as ``nn.BatchNorm2d``."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a space; the defaults are those of the paper. Widths are numbers of channels.

    ``stages``: (width, number of blocks, stride of the first block) each. ``kernels`` x ``expansions``: what
    the blocks of the stages choose from. ConfigurationError for an even kernel: it would not keep the size.
    """

    stem: int = 32
    stem_stride: int = 2
    first: int = 16
    stages: tuple[tuple[int, int, int], ...] = (
        (24, 4, 2),
        (40, 4, 2),
        (80, 4, 2),
        (96, 4, 1),
        (192, 4, 2),
        (320, 1, 1),
    )
    last: int = 1280
    kernels: tuple[int, ...] = (3, 5, 7)
    expansions: tuple[int, ...] = (3, 6)
    n_classes: int = 1000
    in_channels: int = 3
    dropout: float = 0.0
    bn_momentum: float = 0.1
    bn_eps: float = 1e-3

    def __post_init__(self) -> None:
        even = [kernel for kernel in self.kernels if kernel % 2 == 0]
        if even:
            raise ConfigurationError(
                f"Sizes(kernels={self.kernels}): {even} are even, allowed are odd sizes (1, 3, 5, ...): "
                "padded by half an even kernel, the candidates of a block would return different sizes"
            )

    def norm(self, width: int) -> nn.BatchNorm2d:
        return nn.BatchNorm2d(width, eps=self.bn_eps, momentum=self.bn_momentum)


def proxylessnas(
    n_classes: int = 1000, width_mult: float = 1.0, *, in_channels: int = 3, dropout: float = 0.0
) -> MobileNet:
    """The space of the paper for 224x224 images: 21 searchable blocks, 6^6 * 7^15 = 2.2e17 architectures.

    ``width_mult`` scales every width, rounded by ``make_divisible``; the last one never falls below 1280.
    ConfigurationError if it is not above 0.

    >>> from oneshot import weight_parameters
    >>> sum(p.numel() for p in weight_parameters(proxylessnas()))
    16034168
    """
    if not (width_mult > 0 and math.isfinite(width_mult)):
        raise ConfigurationError(f"proxylessnas(width_mult={width_mult!r}): a finite number above 0 is needed")

    def scaled(width: int) -> int:
        return make_divisible(width * width_mult, 8)

    paper = Sizes(n_classes=n_classes, in_channels=in_channels, dropout=dropout)
    sizes = replace(
        paper,
        stem=scaled(paper.stem),
        first=scaled(paper.first),
        stages=tuple((scaled(width), n_blocks, stride) for width, n_blocks, stride in paper.stages),
        last=max(paper.last, scaled(paper.last)),
    )
    return mobilenet_space(sizes)


def mobilenet_small(
    n_classes: int = 10,
    in_channels: int = 1,
    *,
    stem_stride: int = 2,
    stages: tuple[tuple[int, int, int], ...] = ((24, 2, 2), (32, 3, 2)),
    kernels: tuple[int, ...] = (3, 5),
    expansions: tuple[int, ...] = (3, 6),
    dropout: float = 0.0,
) -> MobileNet:
    """A small space for 8x8, 28x28 or 32x32 images: 5 searchable blocks, 4^2 * 5^3 = 2000 architectures.

    ``stem_stride=1`` works on four times as many pixels; ``stages`` as in ``Sizes``. With a stem stride of 2
    the sizes of the feature maps are 28 -> 14 -> 7 -> 4, or 32 -> 16 -> 8 -> 4, or 8 -> 4 -> 2 -> 1.

    >>> import torch
    >>> mobilenet_small()(torch.rand(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    sizes = Sizes(
        stem=16,
        stem_stride=stem_stride,
        first=16,
        stages=stages,
        last=128,
        kernels=kernels,
        expansions=expansions,
        n_classes=n_classes,
        in_channels=in_channels,
        dropout=dropout,
    )
    return mobilenet_space(sizes)


def mobilenet_space(sizes: Sizes) -> MobileNet:
    """The network of these sizes, every block of its stages to be chosen. Labels: 'block1', 'block2', ...

    The comments are the shapes of the paper, without the batch.
    """
    norm = sizes.norm
    stem = Stem(sizes.in_channels, sizes.stem, sizes.stem_stride, norm=norm)  # 3x224x224 -> 32x112x112
    blocks: list[nn.Module] = [InvertedResidual(sizes.stem, sizes.first, 3, 1, 1, norm=norm)]  # -> 16x112x112
    width = sizes.first
    for stage_width, n_blocks, first_stride in sizes.stages:  # -> 24x56x56 -> 40x28x28 -> ... -> 320x7x7
        for i in range(n_blocks):
            stride = first_stride if i == 0 else 1
            blocks.append(searchable_block(sizes, width, stage_width, stride, label=f"block{len(blocks)}"))
            width = stage_width
    mix = FeatureMix(width, sizes.last, norm=norm)  # -> 1280x7x7
    classifier = Classifier(sizes.last, sizes.n_classes, sizes.dropout)  # -> 1000
    return MobileNet(stem, blocks, mix, classifier)


def searchable_block(sizes: Sizes, in_width: int, out_width: int, stride: int, *, label: str) -> LayerChoice:
    """One of the blocks 'k3e3' (kernel 3, expansion 3), 'k3e6', ...; or 'skip', if that keeps the shape.

    The paper has its shortcut around the choice and offers a Zero m = 0: y = x + sum_k g_k m_k(x). Here the
    shortcut is inside the candidates and the skip is the identity: y = sum_k g_k (x + m_k(x)). The gates sum
    to one, so both give the same output and the same gradients; and a block decided to be skipped is nothing
    at all in the fixed network.
    """
    candidates: dict[str, nn.Module] = {
        f"k{kernel}e{expand}": InvertedResidual(in_width, out_width, kernel, expand, stride, norm=sizes.norm)
        for kernel in sizes.kernels
        for expand in sizes.expansions
    }
    if stride == 1 and in_width == out_width:
        candidates["skip"] = nn.Identity()
    return LayerChoice(candidates, label)


class MobileNet(nn.Module):
    """stem, blocks, feature mix, classifier: of a space, or of a network whose blocks are decided.

    >>> stem, block, mix = Stem(3, 8, 2), InvertedResidual(8, 16, 5, 6, 2), FeatureMix(16, 32)
    >>> net = MobileNet(stem, [block, nn.Identity()], mix, Classifier(32, 10))
    >>> sum(p.numel() for p in net.parameters())  # 232 + 2,576 + 576 + 330
    3714
    """

    def __init__(self, stem: nn.Module, blocks: Iterable[nn.Module], mix: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.Sequential(*blocks)
        self.mix = mix
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)  # (N, 3, 224, 224) -> (N, 32, 112, 112)
        x = self.blocks(x)  # (N, 320, 7, 7)
        x = self.mix(x)  # (N, 1280, 7, 7)
        return self.classifier(x)  # (N, 1000)


class Stem(nn.Module):
    """The 3x3 convolution that reads the image.

    ``latency_key``: its row in a latency table of ProxylessNAS; so for all layers that such tables price whole.
    Shapes are (N, C, H, W), the keys write HxWxC.

    >>> Stem(3, 32, 2).latency_key((1, 3, 224, 224), (1, 32, 112, 112))
    'Conv-input:224x224x3-output:112x112x32'
    """

    def __init__(self, in_width: int, out_width: int, stride: int, *, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        self.layer = ConvBNReLU6(in_width, out_width, 3, stride, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def latency_key(self, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> str:
        return f"Conv-input:{_hwc(input_shape)}-output:{_hwc(output_shape)}"


class InvertedResidual(nn.Module):
    """MBConv (MobileNetV2, arXiv 1801.04381, figure 3d): y = m(x), or x + m(x) if that keeps the shape.

    m: 1x1 convolution to ``expand`` * in_width channels (none if ``expand`` is 1), depthwise convolution, both
    with BatchNorm and ReLU6; 1x1 convolution to ``out_width`` with BatchNorm only.

    >>> block = InvertedResidual(24, 40, kernel=5, expand=6, stride=2)
    >>> sum(p.numel() for p in block.parameters())  # 24 * 144 + 144 * 25 + 144 * 40 + 2 * (144 + 144 + 40)
    13472
    >>> block.latency_key((1, 24, 56, 56), (1, 40, 28, 28))
    'expanded_conv-input:56x56x24-output:28x28x40-expand:6-kernel:5-stride:2-idskip:0'
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        kernel: int,
        expand: int,
        stride: int,
        *,
        norm: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        hidden = in_width * expand
        self.shortcut = stride == 1 and in_width == out_width
        self.expand = ConvBNReLU6(in_width, hidden, 1, norm=norm) if expand != 1 else nn.Identity()
        self.depthwise = ConvBNReLU6(hidden, hidden, kernel, stride, groups=hidden, norm=norm)
        self.project = nn.Sequential(nn.Conv2d(hidden, out_width, 1, bias=False), norm(out_width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(x)  # (N, expand * C, H, W)
        y = self.depthwise(y)  # (N, expand * C, H / stride, W / stride)
        y = self.project(y)  # (N, C_out, H / stride, W / stride)
        return x + y if self.shortcut else y

    def latency_key(self, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> str:
        # Read off the layer and not off __init__: once channels are cut out of it, it is another row, or none.
        conv = self.depthwise.conv
        return (
            f"expanded_conv-input:{_hwc(input_shape)}-output:{_hwc(output_shape)}"
            f"-expand:{conv.out_channels / input_shape[1]:g}-kernel:{conv.kernel_size[0]}"
            f"-stride:{conv.stride[0]}-idskip:{int(self.shortcut)}"
        )


class FeatureMix(nn.Module):
    """The 1x1 convolution before the pool.

    >>> FeatureMix(320, 1280).latency_key((1, 320, 7, 7), (1, 1280, 7, 7))
    'Conv_1-input:7x7x320-output:7x7x1280'
    """

    def __init__(self, in_width: int, out_width: int, *, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        self.layer = ConvBNReLU6(in_width, out_width, 1, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def latency_key(self, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> str:
        return f"Conv_1-input:{_hwc(input_shape)}-output:{_hwc(output_shape)}"


class Classifier(nn.Module):
    """Global average pool, dropout, linear: (N, C, H, W) -> (N, n_classes).

    >>> Classifier(1280, 1000).latency_key((1, 1280, 7, 7), (1, 1000))
    'Logits-input:7x7x1280-output:1000'
    """

    def __init__(self, in_width: int, n_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(in_width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.flatten(self.pool(x))  # (N, C)
        return self.linear(self.dropout(x))  # (N, n_classes)

    def latency_key(self, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> str:
        return f"Logits-input:{_hwc(input_shape)}-output:{output_shape[1]}"


class ConvBNReLU6(nn.Module):
    """Convolution without bias, BatchNorm, ReLU6. The size of the image is divided by ``stride``, rounded up."""

    def __init__(
        self,
        in_width: int,
        out_width: int,
        kernel: int,
        stride: int = 1,
        *,
        groups: int = 1,
        norm: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_width, out_width, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = norm(out_width)
        self.act = nn.ReLU6(inplace=True)  # on the output of the BatchNorm, which nobody else reads

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


def make_divisible(width: float, divisor: int = 8) -> int:
    """The multiple of ``divisor`` next to ``width`` > 0 (the larger of two), and at least 90 % of it.

    >>> make_divisible(44.8), make_divisible(11), make_divisible(1)  # 8 would be less than 0.9 * 11
    (48, 16, 8)
    """
    nearest = math.floor(width / divisor + 0.5) * divisor
    return nearest if nearest >= 0.9 * width else nearest + divisor


def _hwc(shape: tuple[int, ...]) -> str:
    _, channels, height, width = shape
    return f"{height}x{width}x{channels}"
