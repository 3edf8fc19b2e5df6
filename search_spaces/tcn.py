"""Temporal convolutional networks (TCNs): plain networks on (N, channels, time), whose kernels can be searched.

``small_tcn``: residual blocks and a mean over time, for windows of a motion sensor (after Bai, Kolter and Koltun 2018,
arXiv 1803.01271).
``temponet``: after TEMPONet (Zanghieri et al. 2020, IEEE TBioCAS 14(2)), the seed of Pruning In Time (Risso et al.
2021, arXiv 2203.14768): heart rate from a wrist sensor.
``tc_resnet8``, ``tc_resnet14``: TC-ResNet (Choi et al. 2019, arXiv 1904.03814): spoken keywords.

A kernel of 2^n + 1 taps can be thinned to every dilation up to 2^(n-1) with its reach unchanged: a seed has such
kernels and no dilation, ``temponet(dilated=True)`` is what was once thinned by hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor, nn

from oneshot.errors import ConfigurationError

__all__ = [
    "SmallTCN",
    "SmallTCNSizes",
    "TCResNet",
    "TCResNetSizes",
    "TempoNet",
    "TempoSizes",
    "TempoStage",
    "causal_conv",
    "small_tcn",
    "tc_resnet8",
    "tc_resnet14",
    "temponet",
]


def causal_conv(in_width: int, out_width: int, kernel: int, *, dilation: int = 1, stride: int = 1) -> nn.Sequential:
    """Zeros on the left and a convolution: out[t] sees in[stride * t - i * dilation], i = 0 .. kernel - 1, and no
    later sample. The length T becomes ceil(T / stride).

    No bias: a normalisation has to follow.

    >>> import torch
    >>> causal_conv(4, 8, 5, dilation=2, stride=2)(torch.rand(1, 4, 9)).shape
    torch.Size([1, 8, 5])
    """
    pad = nn.ConstantPad1d(((kernel - 1) * dilation, 0), 0.0)
    return nn.Sequential(pad, nn.Conv1d(in_width, out_width, kernel, stride, dilation=dilation, bias=False))


# --- small TCN --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SmallTCNSizes:
    """``blocks``: (width, kernel) each; every block halves the length. ``dilation`` is that of all kernels."""

    in_channels: int = 6
    blocks: tuple[tuple[int, int], ...] = ((16, 9), (32, 9), (32, 9))
    dilation: int = 1
    n_classes: int = 7
    dropout: float = 0.2


def small_tcn(sizes: SmallTCNSizes | None = None) -> SmallTCN:
    """A TCN for windows of 128 samples of 6 axes: three residual blocks, 36,679 parameters.

    >>> sum(p.numel() for p in small_tcn().parameters())
    36679
    """
    return SmallTCN(SmallTCNSizes() if sizes is None else sizes)


class SmallTCN(nn.Module):
    """Residual blocks of two causal convolutions, the mean over time, a linear layer. Shapes for 128 samples.

    Any length of at least 2^blocks samples will do.
    """

    def __init__(self, sizes: SmallTCNSizes) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        width = sizes.in_channels
        for out_width, kernel in sizes.blocks:  # 6x128 -> 16x64 -> 32x32 -> 32x16
            blocks += [CausalBlock(width, out_width, kernel, sizes.dilation), nn.AvgPool1d(2)]
            width = out_width
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(sizes.dropout)
        self.classifier = nn.Linear(width, sizes.n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)  # (N, 6, 128) -> (N, 32, 16)
        x = self.flatten(self.pool(x))  # (N, 32)
        return self.classifier(self.dropout(x))  # (N, 7)


class CausalBlock(nn.Module):
    """y = relu(c2(relu(c1(x))) + s(x)): causal convolutions c1 and c2, s the identity or 1x1 if the width changes."""

    def __init__(self, in_width: int, out_width: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = causal_conv(in_width, out_width, kernel, dilation=dilation)
        self.norm1 = nn.BatchNorm1d(out_width)
        self.conv2 = causal_conv(out_width, out_width, kernel, dilation=dilation)
        self.norm2 = nn.BatchNorm1d(out_width)
        self.shortcut = conv_bn(in_width, out_width, 1) if in_width != out_width else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))  # (N, C_out, T)
        y = self.norm2(self.conv2(y))  # (N, C_out, T)
        return self.relu(y + self.shortcut(x))


# --- TEMPONet ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TempoStage:
    """Two convolutions of ``width``, ``kernel`` and ``dilation``; one of ``out_width``, 5 taps and ``stride``; a mean
    of neighbours. The length T becomes floor(ceil(T / stride) / 2).
    """

    width: int
    kernel: int
    out_width: int
    stride: int
    dilation: int = 1

    def length(self, length: int) -> int:
        return math.ceil(length / self.stride) // 2


@dataclass(frozen=True)
class TempoSizes:
    """``length``: samples of an input. ``hidden``: widths of the linear layers before the last.

    ConfigurationError if the stages leave nothing of the length.
    """

    in_channels: int = 4
    length: int = 256
    stages: tuple[TempoStage, ...] = (
        TempoStage(32, kernel=5, out_width=64, stride=1),
        TempoStage(64, kernel=9, out_width=128, stride=2),
        TempoStage(128, kernel=17, out_width=128, stride=4),
    )
    hidden: tuple[int, ...] = (256, 128)
    n_outputs: int = 1
    dropout: float = 0.5

    def __post_init__(self) -> None:
        if self.last_length < 1:
            raise ConfigurationError(
                f"TempoSizes(length={self.length}): the {len(self.stages)} stages leave no sample of it; give more "
                "samples, fewer stages or smaller strides"
            )

    @property
    def last_length(self) -> int:
        """Samples after the last stage: 256 -> 128 -> 32 -> 4."""
        length = self.length
        for stage in self.stages:
            length = stage.length(length)
        return length


def temponet(sizes: TempoSizes | None = None, *, dilated: bool = False) -> TempoNet:
    """The seed of the search: kernels of 5, 9 and 17 taps without dilation.

    ``dilated``: the network drawn by hand, with the same reach: every first and second convolution of a stage has 3
    taps with dilation (kernel - 1) / 2. ConfigurationError for a stage where that is no integer, or that is dilated.

    >>> sum(p.numel() for p in temponet().parameters()), sum(p.numel() for p in temponet(dilated=True).parameters())
    (935937, 425729)
    """
    sizes = TempoSizes() if sizes is None else sizes
    if dilated:
        sizes = replace(sizes, stages=tuple(_three_taps(stage) for stage in sizes.stages))
    return TempoNet(sizes)


def _three_taps(stage: TempoStage) -> TempoStage:
    if stage.kernel < 3 or stage.kernel % 2 == 0 or stage.dilation != 1:
        raise ConfigurationError(
            f"temponet(dilated=True): {stage} has no network of 3 taps with the same reach; allowed are odd kernels "
            "of at least 3 taps with dilation 1"
        )
    return replace(stage, kernel=3, dilation=(stage.kernel - 1) // 2)


class TempoNet(nn.Module):
    """Stages, then linear layers on all that is left. Shapes for 4 channels of 256 samples, 8 s at 32 Hz."""

    def __init__(self, sizes: TempoSizes) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        width = sizes.in_channels
        for stage in sizes.stages:  # 4x256 -> 64x128 -> 128x32 -> 128x4
            stages += [
                causal_conv_bn_relu(width, stage.width, stage.kernel, stage.dilation),
                causal_conv_bn_relu(stage.width, stage.width, stage.kernel, stage.dilation),
                nn.Sequential(
                    causal_conv(stage.width, stage.out_width, 5, stride=stage.stride),
                    nn.AvgPool1d(2),
                    nn.BatchNorm1d(stage.out_width),
                    nn.ReLU(),
                ),
            ]
            width = stage.out_width
        self.stages = nn.Sequential(*stages)
        self.flatten = nn.Flatten()
        width *= sizes.last_length
        hidden: list[nn.Module] = []
        for out_width in sizes.hidden:  # 512 -> 256 -> 128
            hidden += [
                nn.Linear(width, out_width, bias=False),
                nn.BatchNorm1d(out_width),
                nn.ReLU(),
                nn.Dropout(sizes.dropout),
            ]
            width = out_width
        self.hidden = nn.Sequential(*hidden)
        self.output = nn.Linear(width, sizes.n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(x)  # (N, 4, 256) -> (N, 128, 4)
        x = self.hidden(self.flatten(x))  # (N, 512) -> (N, 128)
        return self.output(x)  # (N, 1)


def causal_conv_bn_relu(in_width: int, out_width: int, kernel: int, dilation: int) -> nn.Sequential:
    conv = causal_conv(in_width, out_width, kernel, dilation=dilation)
    return nn.Sequential(*conv, nn.BatchNorm1d(out_width), nn.ReLU())


# --- TC-ResNet --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TCResNetSizes:
    """The sizes of a TC-ResNet; the defaults are those of TC-ResNet8.

    ``stages``: (width, number of blocks, stride of the first block, kernel) each. ``in_channels``: the frequencies of
    a frame, which are the channels here. ConfigurationError for an even kernel: it would not keep the length.
    """

    in_channels: int = 40
    stem: int = 16
    stages: tuple[tuple[int, int, int, int], ...] = ((24, 1, 2, 9), (32, 1, 2, 9), (48, 1, 2, 9))
    n_classes: int = 12
    dropout: float = 0.5

    def __post_init__(self) -> None:
        even = [kernel for *_, kernel in self.stages if kernel % 2 == 0]
        if even:
            raise ConfigurationError(
                f"TCResNetSizes(stages={self.stages}): the kernels {even} are even, allowed are odd sizes "
                "(1, 3, 5, ...): padded by half an even kernel, a block would change the length"
            )


def tc_resnet8(n_classes: int = 12, width_mult: float = 1.0, *, kernel: int = 9) -> TCResNet:
    """TC-ResNet8: three residual blocks. 65,180 parameters and 656 running statistics, "66K" in the paper.

    ``width_mult`` scales every width, 1.5 in the paper's "TC-ResNet8-1.5". ConfigurationError for an even kernel.

    >>> sum(p.numel() for p in tc_resnet8().parameters())
    65180
    """
    return TCResNet(_tc_resnet_sizes(n_classes, width_mult, kernel, blocks_per_stage=1))


def tc_resnet14(n_classes: int = 12, width_mult: float = 1.0, *, kernel: int = 9) -> TCResNet:
    """TC-ResNet14: six residual blocks. 135,868 parameters and 1,072 running statistics, "137K" in the paper.

    >>> sum(p.numel() for p in tc_resnet14().parameters())
    135868
    """
    return TCResNet(_tc_resnet_sizes(n_classes, width_mult, kernel, blocks_per_stage=2))


def _tc_resnet_sizes(n_classes: int, width_mult: float, kernel: int, blocks_per_stage: int) -> TCResNetSizes:
    if not (math.isfinite(width_mult) and width_mult * 16 >= 1):
        raise ConfigurationError(
            f"TC-ResNet(width_mult={width_mult!r}): a finite number is needed that leaves one of 16 channels"
        )
    stem, *widths = (int(width * width_mult) for width in (16, 24, 32, 48))
    stages = tuple((width, blocks_per_stage, 2, kernel) for width in widths)
    return TCResNetSizes(stem=stem, stages=stages, n_classes=n_classes)


class TCResNet(nn.Module):
    """stem, residual blocks, mean over time, linear layer. Shapes for 98 frames of 40 frequencies: 1 s of speech."""

    def __init__(self, sizes: TCResNetSizes) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(sizes.in_channels, sizes.stem, 3), nn.ReLU())  # 40x98 -> 16x98
        blocks: list[nn.Module] = []
        width = sizes.stem
        for out_width, n_blocks, first_stride, kernel in sizes.stages:  # -> 24x49 -> 32x25 -> 48x13
            for i in range(n_blocks):
                blocks.append(TCBlock(width, out_width, kernel, first_stride if i == 0 else 1))
                width = out_width
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(sizes.dropout)
        self.classifier = nn.Linear(width, sizes.n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))  # (N, 40, 98) -> (N, 48, 13)
        x = self.flatten(self.pool(x))  # (N, 48)
        return self.classifier(self.dropout(x))  # (N, 12)


class TCBlock(nn.Module):
    """y = relu(c2(relu(c1(x))) + s(x)): c1 has the stride; s is the identity, or relu of 1x1 if the shape changes."""

    def __init__(self, in_width: int, out_width: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(*conv_bn(in_width, out_width, kernel, stride), nn.ReLU())
        self.conv2 = conv_bn(out_width, out_width, kernel)
        keeps = stride == 1 and in_width == out_width
        self.shortcut = nn.Identity() if keeps else nn.Sequential(*conv_bn(in_width, out_width, 1, stride), nn.ReLU())
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))  # (N, C_out, ceil(T / stride))
        return self.relu(y + self.shortcut(x))


def conv_bn(in_width: int, out_width: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv1d(in_width, out_width, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm1d(out_width))
