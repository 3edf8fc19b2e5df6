"""Small networks, one per way in which dimensions of parameters hang together, with the coupled groups by hand.

A *unit* is a set of indices that can only be cut together; a *group* is the list of like units. The rules by hand:

- inputs and outputs of the network are never cut; a dimension that meets one of them is frozen;
- additions, products and depthwise convolutions tie dimensions index by index;
- a grouped convolution and GroupNorm have whole groups as units, attention has whole heads;
- ``chunk(n)`` ties index j of every piece; after a flatten one unit has several columns of the Linear;
- LayerNorm, softmax and sums over a dimension freeze it, and so do slices, unknown operators, LSTM and embedding rows;
- one unit alone is not a group.

Networks whose answer is open to debate have ``groups=None``: they only have to survive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Group(NamedTuple):
    """``members``: 'name.weight[dim]' of convolutions and Linears only; norms and biases follow them."""

    units: int
    members: frozenset[str]


@dataclass(frozen=True)
class Entry:
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    groups: tuple[Group, ...] | None = None


def tied(units: int, rows: str = "", columns: str = "") -> Group:
    """``rows`` are dimension 0 of the weights of these layers, ``columns`` dimension 1.

    >>> sorted(tied(8, rows="stem", columns="fc").members)
    ['fc.weight[1]', 'stem.weight[0]']
    """
    first = {f"{name}.weight[0]" for name in rows.split()}
    return Group(units, frozenset(first | {f"{name}.weight[1]" for name in columns.split()}))


def normal(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    """Inputs of these shapes, without the batch of 2."""
    return lambda: tuple(torch.randn(2, *shape) for shape in shapes)


def tokens(vocabulary: int, length: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randint(vocabulary, (2, length)),)


def _fan_in(layer: nn.Module, weight: Tensor) -> float:
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        taps = weight[0, 0].numel() / torch.Size(layer.stride).numel()  # an output pixel sees only these
        return weight.shape[0] / layer.groups * taps
    return weight[0].numel()


def _fill(layer: nn.Module, name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    uniform = torch.rand(value.shape, generator=generator, dtype=torch.float64)
    if name == "running_var":
        return 0.5 + 1.5 * uniform
    if isinstance(layer, nn.PReLU):
        return 0.1 + 0.3 * uniform
    if isinstance(layer, nn.Embedding):
        return noise
    if name == "running_mean" or "bias" in name or (value.dim() > 2 and not name.startswith("weight")):
        return 0.3 * noise  # the last: position embeddings and class tokens
    if value.dim() == 1:
        return 0.5 + uniform
    gain = 1.5 if isinstance(layer, nn.modules.conv._ConvNd) else 1.0
    return noise * (gain / _fan_in(layer, value)) ** 0.5


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Random weights and BatchNorm statistics, in place: no layer is an identity and activations stay of order 1.

    The numbers are drawn in float64, so a network and its ``.double()`` get the same ones up to rounding.

    >>> a, b = (randomize(nn.BatchNorm1d(50), seed=0) for _ in range(2))
    >>> torch.equal(a.running_var, b.running_var), 0.5 <= float(a.running_var.min()), float(a.running_var.max()) <= 2
    (True, True, True)
    """
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for layer in model.modules():
        own = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
        for name, value in own.items():
            if value.is_floating_point() and id(value) not in done:
                done.add(id(value))
                value.copy_(_fill(layer, name, value, generator))
    return model


ZOO: dict[str, Entry] = {}


def leaky(x: Tensor) -> Tensor:
    """In most networks instead of ReLU, which leaves units dead on two small images: cutting those proves nothing."""
    return F.leaky_relu(x, 0.1)


# ---------------------------------------------------------------------------------------------- chains of convolutions


class ConvBN(nn.Module):
    """Convolution that keeps the size, BatchNorm and (perhaps) an activation."""

    def __init__(self, cin: int, cout: int, k: int = 3, s: int = 1, groups: int = 1, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, k, s, k // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(cout)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return leaky(x) if self.act else x


def plain_cnn() -> nn.Sequential:
    """VGG: 3x3 convolutions, pooling, two Linears."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10), nn.LeakyReLU(0.1), nn.Linear(10, 5)),
    )


# A chain: the rows of a layer are the columns of the next; rows of the last are the output.
ZOO["plain_cnn"] = Entry(plain_cnn, normal((3, 8, 8)), (tied(8, "0", "4"), tied(12, "4", "10"), tied(10, "10", "12")))


class FlattenMaps(nn.Module):
    """LeNet on wide images: the maps are 2x4 when they are flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 3)
        self.fc1, self.fc2 = nn.Linear(8 * 2 * 4, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.tanh(self.conv1(x)), 2)  # (B, 6, 6, 10)
        x = F.max_pool2d(torch.tanh(self.conv2(x)), 2)  # (B, 8, 2, 4)
        return self.fc2(torch.tanh(self.fc1(torch.flatten(x, 1))))


# Channel c of conv2 is columns 8c ... 8c + 7 of fc1: still one unit.
ZOO["flatten_maps"] = Entry(
    FlattenMaps, normal((1, 14, 22)), (tied(6, "conv1", "conv2"), tied(8, "conv2", "fc1"), tied(12, "fc1", "fc2"))
)


class DSCNN(nn.Module):
    """Depthwise separable network for keyword spotting, spectrogram of 10 coefficients x 16 frames."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, (4, 10), stride=2, padding=(1, 5))
        self.norm = nn.BatchNorm2d(8)
        self.dw1, self.pw1 = ConvBN(8, 8, groups=8), ConvBN(8, 12, 1)
        self.dw2, self.pw2 = ConvBN(12, 12, groups=12), ConvBN(12, 16, 1)
        self.fc = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = leaky(self.norm(self.stem(x)))
        x = self.pw2(self.dw2(self.pw1(self.dw1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


# A depthwise convolution has its producer's channels; its weight has no input dimension to cut (size 1).
ZOO["ds_cnn"] = Entry(
    DSCNN,
    normal((1, 16, 10)),
    (
        tied(8, "stem dw1.conv", "pw1.conv"),
        tied(12, "pw1.conv dw2.conv", "pw2.conv"),
        tied(16, "pw2.conv", "fc"),
    ),
)


class Conv3dNet(nn.Module):
    """C3D: clips of 4 frames."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6)
        self.conv2, self.norm2 = nn.Conv3d(6, 8, 3, padding=1), nn.BatchNorm3d(8)
        self.fc = nn.Linear(8 * 1 * 2 * 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(leaky(self.norm1(self.conv1(x))), 2)
        x = F.max_pool3d(leaky(self.norm2(self.conv2(x))), 2)
        return self.fc(x.flatten(1))


ZOO["conv3d"] = Entry(Conv3dNet, normal((2, 4, 8, 8)), (tied(6, "conv1", "conv2"), tied(8, "conv2", "fc")))


# ------------------------------------------------------------------------------------------------------------ residuals


class BasicBlock(nn.Module):
    def __init__(self, cin: int, mid: int, cout: int, s: int = 1) -> None:
        super().__init__()
        self.one, self.two = ConvBN(cin, mid, 3, s), ConvBN(mid, cout, act=False)
        self.down = ConvBN(cin, cout, 1, s, act=False) if cin != cout or s != 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return leaky(self.two(self.one(x)) + self.down(x))


class ResNet(nn.Module):
    def __init__(self, *blocks: nn.Module, width: int) -> None:
        super().__init__()
        self.stem, self.blocks = ConvBN(3, 8), nn.Sequential(*blocks)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


# The stream of 8 ties its producers (stem and second convolutions) with its readers; block interiors are free.
ZOO["resnet_identity"] = Entry(
    lambda: ResNet(BasicBlock(8, 6, 8), BasicBlock(8, 10, 8), width=8),
    normal((3, 8, 8)),
    (
        tied(8, "stem.conv blocks.0.two.conv blocks.1.two.conv", "blocks.0.one.conv blocks.1.one.conv fc"),
        tied(6, "blocks.0.one.conv", "blocks.0.two.conv"),
        tied(10, "blocks.1.one.conv", "blocks.1.two.conv"),
    ),
)
# The projection ends the stream of 8 and starts one of 12.
ZOO["resnet_projection"] = Entry(
    lambda: ResNet(BasicBlock(8, 6, 8), BasicBlock(8, 10, 12, 2), width=12),
    normal((3, 8, 8)),
    (
        tied(8, "stem.conv blocks.0.two.conv", "blocks.0.one.conv blocks.1.one.conv blocks.1.down.conv"),
        tied(6, "blocks.0.one.conv", "blocks.0.two.conv"),
        tied(10, "blocks.1.one.conv", "blocks.1.two.conv"),
        tied(12, "blocks.1.two.conv blocks.1.down.conv", "fc"),
    ),
)


class OptionABlock(nn.Module):
    """Shortcut without parameters: every second pixel, the new channels are zeros around the old ones."""

    def __init__(self, cin: int, mid: int, cout: int) -> None:
        super().__init__()
        self.one, self.two = ConvBN(cin, mid, 3, 2), ConvBN(mid, cout, act=False)
        self.extra = (cout - cin) // 2

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))
        return leaky(self.two(self.one(x)) + shortcut)


# Channels 4 ... 11 of the 16 are the 8 of the stream; channels 0-3 and 12-15 meet the zeros and are frozen.
ZOO["resnet_option_a"] = Entry(
    lambda: ResNet(BasicBlock(8, 6, 8), OptionABlock(8, 10, 16), width=16),
    normal((3, 8, 8)),
    (
        tied(8, "stem.conv blocks.0.two.conv blocks.1.two.conv", "blocks.0.one.conv blocks.1.one.conv fc"),
        tied(6, "blocks.0.one.conv", "blocks.0.two.conv"),
        tied(10, "blocks.1.one.conv", "blocks.1.two.conv"),
    ),
)


class PreActBlock(nn.Module):
    """Norm and ReLU before the convolution; a projection reads the activated input."""

    def __init__(self, cin: int, mid: int, cout: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(cin), nn.Conv2d(cin, mid, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(mid), nn.Conv2d(mid, cout, 3, padding=1, bias=False)
        self.down = nn.Conv2d(cin, cout, 1, bias=False) if cin != cout else None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(x))
        shortcut = x if self.down is None else self.down(y)
        return self.conv2(torch.relu(self.norm2(self.conv1(y)))) + shortcut


class PreActResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.block1, self.block2 = PreActBlock(8, 6, 8), PreActBlock(8, 10, 12)
        self.norm, self.fc = nn.BatchNorm2d(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(self.stem(x)))
        return self.fc(torch.relu(self.norm(x)).mean((2, 3)))


# As with post-activation: the norms sit elsewhere, the ties are those of the additions.
ZOO["resnet_preact"] = Entry(
    PreActResNet,
    normal((3, 8, 8)),
    (
        tied(8, "stem block1.conv2", "block1.conv1 block2.conv1 block2.down"),
        tied(6, "block1.conv1", "block1.conv2"),
        tied(10, "block2.conv1", "block2.conv2"),
        tied(12, "block2.conv2 block2.down", "fc"),
    ),
)


class ResNeXtBlock(nn.Module):
    def __init__(self, width: int, mid: int, groups: int) -> None:
        super().__init__()
        self.reduce, self.grouped = ConvBN(width, mid, 1), ConvBN(mid, mid, groups=groups)
        self.expand = ConvBN(mid, width, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return leaky(self.expand(self.grouped(self.reduce(x))) + x)


# Units are the 4 groups of 3 channels: 3 rows of reduce, 3 rows of grouped, 3 columns of expand.
# The input dimension inside a group (grouped.conv.weight[1], size 3) is the same for all groups and stays.
ZOO["resnext"] = Entry(
    lambda: ResNet(ResNeXtBlock(8, 12, 4), width=8),
    normal((3, 8, 8)),
    (
        tied(8, "stem.conv blocks.0.expand.conv", "blocks.0.reduce.conv fc"),
        tied(4, "blocks.0.reduce.conv blocks.0.grouped.conv", "blocks.0.expand.conv"),
    ),
)


class InvertedResidual(nn.Module):
    def __init__(self, cin: int, cout: int, expand: int, s: int = 1) -> None:
        super().__init__()
        mid = cin * expand
        self.expand = ConvBN(cin, mid, 1) if expand != 1 else nn.Identity()
        self.depthwise, self.project = ConvBN(mid, mid, 3, s, groups=mid), ConvBN(mid, cout, 1, act=False)
        self.shortcut = s == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.shortcut else y


# Block 0 does not expand, so its depthwise convolution carries the stem's channels. Block 1 has no shortcut
# (8 to 10 channels, stride 2), block 2 has one: it ties the stream of 10.
ZOO["mobilenet_v2"] = Entry(
    lambda: ResNet(InvertedResidual(8, 6, 1), InvertedResidual(6, 10, 3, 2), InvertedResidual(10, 10, 2), width=10),
    normal((3, 8, 8)),
    (
        tied(8, "stem.conv blocks.0.depthwise.conv", "blocks.0.project.conv"),
        tied(6, "blocks.0.project.conv", "blocks.1.expand.conv"),
        tied(18, "blocks.1.expand.conv blocks.1.depthwise.conv", "blocks.1.project.conv"),
        tied(10, "blocks.1.project.conv blocks.2.project.conv", "blocks.2.expand.conv fc"),
        tied(20, "blocks.2.expand.conv blocks.2.depthwise.conv", "blocks.2.project.conv"),
    ),
)


class SELinear(nn.Module):
    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, squeezed), nn.Linear(squeezed, width)

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.shape
        scale = F.adaptive_avg_pool2d(x, 1).view(b, c)
        return x * torch.sigmoid(self.up(leaky(self.down(scale)))).view(b, c, 1, 1)


class SEBasicBlock(nn.Module):
    def __init__(self, width: int, mid: int, squeezed: int) -> None:
        super().__init__()
        self.one, self.two = ConvBN(width, mid), ConvBN(mid, width, act=False)
        self.se = SELinear(width, squeezed)

    def forward(self, x: Tensor) -> Tensor:
        return leaky(self.se(self.two(self.one(x))) + x)


# The product ties rows of se.up with the stream; se.down reads the stream.
ZOO["se_linear"] = Entry(
    lambda: ResNet(SEBasicBlock(8, 6, 4), width=8),
    normal((3, 8, 8)),
    (
        tied(8, "stem.conv blocks.0.two.conv blocks.0.se.up", "blocks.0.one.conv blocks.0.se.down fc"),
        tied(6, "blocks.0.one.conv", "blocks.0.two.conv"),
        tied(4, "blocks.0.se.down", "blocks.0.se.up"),
    ),
)


class SEConv(nn.Module):
    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.down, self.up = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.hardsigmoid(self.up(F.silu(self.down(self.pool(x))))) * x


class MBConv(nn.Module):
    """EfficientNet's block: inverted residual with squeeze-excite after the depthwise convolution."""

    def __init__(self, width: int, mid: int, squeezed: int) -> None:
        super().__init__()
        self.expand, self.depthwise = ConvBN(width, mid, 1), ConvBN(mid, mid, groups=mid)
        self.se, self.project = SEConv(mid, squeezed), ConvBN(mid, width, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.se(self.depthwise(self.expand(x)))) + x


ZOO["se_conv"] = Entry(
    lambda: ResNet(MBConv(8, 16, 4), width=8),
    normal((3, 8, 8)),
    (
        tied(8, "stem.conv blocks.0.project.conv", "blocks.0.expand.conv fc"),
        tied(
            16,
            "blocks.0.expand.conv blocks.0.depthwise.conv blocks.0.se.up",
            "blocks.0.se.down blocks.0.project.conv",
        ),
        tied(4, "blocks.0.se.down", "blocks.0.se.up"),
    ),
)


# ------------------------------------------------------------------------------------------------------ concatenations


class DenseLayer(nn.Module):
    def __init__(self, cin: int, mid: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(cin), nn.Conv2d(cin, mid, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(mid), nn.Conv2d(mid, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(leaky(self.norm2(self.conv1(leaky(self.norm1(x))))))
        return torch.cat([x, y], 1)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.layer1, self.layer2 = DenseLayer(8, 7, 4), DenseLayer(12, 6, 4)
        self.norm, self.transition = nn.BatchNorm2d(16), nn.Conv2d(16, 10, 1, bias=False)
        self.layer3 = DenseLayer(10, 5, 4)
        self.norm_last, self.fc = nn.BatchNorm2d(14), nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.stem(x)))
        x = F.avg_pool2d(self.transition(leaky(self.norm(x))), 2)
        return self.fc(leaky(self.norm_last(self.layer3(x))).mean((2, 3)))


# Each addition to the concatenation is a group of its own, with its share of the columns of every later reader.
ZOO["densenet"] = Entry(
    DenseNet,
    normal((3, 8, 8)),
    (
        tied(8, "stem", "layer1.conv1 layer2.conv1 transition"),
        tied(7, "layer1.conv1", "layer1.conv2"),
        tied(4, "layer1.conv2", "layer2.conv1 transition"),
        tied(6, "layer2.conv1", "layer2.conv2"),
        tied(4, "layer2.conv2", "transition"),
        tied(10, "transition", "layer3.conv1 fc"),
        tied(5, "layer3.conv1", "layer3.conv2"),
        tied(4, "layer3.conv2", "fc"),
    ),
)


class NestedConcat(nn.Module):
    """Inception: one of the branches is itself a concatenation (1x3 beside 3x1)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.point = ConvBN(3, 8), ConvBN(8, 6, 1)
        self.wide, self.tall = nn.Conv2d(8, 4, (1, 3), padding=(0, 1)), nn.Conv2d(8, 5, (3, 1), padding=(1, 0))
        self.fuse, self.fc = ConvBN(6 + 4 + 5 + 8, 10, 1), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        fork = torch.cat((self.wide(x), self.tall(x)), dim=1)
        pooled = F.avg_pool2d(x, 3, 1, 1)
        x = torch.cat([self.point(x), leaky(fork), pooled], dim=1)
        return self.fc(self.fuse(x).mean((2, 3)))


# The pooled branch has the stem's channels, so the stem also owns 8 columns of fuse.
ZOO["nested_concat"] = Entry(
    NestedConcat,
    normal((3, 8, 8)),
    (
        tied(8, "stem.conv", "point.conv wide tall fuse.conv"),
        tied(6, "point.conv", "fuse.conv"),
        tied(4, "wide", "fuse.conv"),
        tied(5, "tall", "fuse.conv"),
        tied(10, "fuse.conv", "fc"),
    ),
)


class YoloBottleneck(nn.Module):
    def __init__(self, width: int, mid: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = ConvBN(width, mid), ConvBN(mid, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


class C2f(nn.Module):
    """Two halves of one convolution; the second runs through bottlenecks; everything is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.cv1 = ConvBN(3, 8), ConvBN(8, 12, 1)
        self.m = nn.ModuleList([YoloBottleneck(6, 5), YoloBottleneck(6, 4)])
        self.cv2, self.fc = ConvBN(24, 10, 1), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(self.stem(x)).chunk(2, 1))
        for block in self.m:
            y.append(block(y[-1]))
        return self.fc(self.cv2(torch.cat(y, 1)).mean((2, 3)))


# The chunk makes rows j and j + 6 of cv1 one unit; the additions tie the bottlenecks' outputs to it, so a unit has
# 2 rows of cv1 and 4 columns of cv2.
ZOO["c2f"] = Entry(
    C2f,
    normal((3, 8, 8)),
    (
        tied(8, "stem.conv", "cv1.conv"),
        tied(6, "cv1.conv m.0.cv2.conv m.1.cv2.conv", "m.0.cv1.conv m.1.cv1.conv cv2.conv"),
        tied(5, "m.0.cv1.conv", "m.0.cv2.conv"),
        tied(4, "m.1.cv1.conv", "m.1.cv2.conv"),
        tied(10, "cv2.conv", "fc"),
    ),
)


class ShuffleUnit(nn.Module):
    """ShuffleNetV2: stride 1 transforms one half of the channels, stride 2 both branches; then a channel shuffle."""

    def __init__(self, cin: int, cout: int, s: int) -> None:
        super().__init__()
        half, self.s = cout // 2, s
        self.left = nn.Sequential()
        if s == 2:
            self.left = nn.Sequential(ConvBN(cin, cin, 3, s, groups=cin, act=False), ConvBN(cin, half, 1))
        cin = cin if s == 2 else half
        self.right = nn.Sequential(
            ConvBN(cin, half, 1), ConvBN(half, half, 3, s, groups=half, act=False), ConvBN(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1) if self.s == 1 else (x, x)
        y = torch.cat((self.left(a), self.right(b)), 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


# No hand count: how far the shuffles of a stage merge its units depends on how they are read.
ZOO["shufflenet_v2"] = Entry(
    lambda: ResNet(ShuffleUnit(8, 16, 2), ShuffleUnit(16, 16, 1), ShuffleUnit(16, 16, 1), width=16),
    normal((3, 8, 8)),
)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc1 = nn.Sequential(ConvBN(1, 6), ConvBN(6, 8))
        self.enc2 = nn.Sequential(ConvBN(8, 10), ConvBN(10, 12))
        self.up = nn.ConvTranspose2d(12, 7, 2, stride=2)
        self.dec = nn.Sequential(ConvBN(7 + 8, 9), ConvBN(9, 11))
        self.out = nn.Conv2d(11, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.enc1(x)
        coarse = self.enc2(F.max_pool2d(fine, 2))
        return self.out(self.dec(torch.cat([self.up(coarse), fine], 1)))


# A transposed convolution stores (in, out, ...): its rows are read, its columns are written.
ZOO["unet"] = Entry(
    UNet,
    normal((1, 8, 8)),
    (
        tied(6, "enc1.0.conv", "enc1.1.conv"),
        tied(8, "enc1.1.conv", "enc2.0.conv dec.0.conv"),
        tied(10, "enc2.0.conv", "enc2.1.conv"),
        tied(12, "enc2.1.conv up"),
        tied(7, "", "up dec.0.conv"),
        tied(9, "dec.0.conv", "dec.1.conv"),
        tied(11, "dec.1.conv", "out"),
    ),
)


# ---------------------------------------------------------------------------------------------- control flow, sharing


class Recurrent(nn.Module):
    """One block (its convolution and its norm) called three times, as in recursive super-resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again, self.fc = ConvBN(3, 8), ConvBN(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.again(x)
        return self.fc(x.mean((2, 3)))


# The second call reads what the first wrote: rows and columns of the shared convolution are the same channels.
ZOO["shared_block"] = Entry(Recurrent, normal((3, 8, 8)), (tied(8, "stem.conv again.conv", "again.conv fc"),))


class Siamese(nn.Module):
    """One encoder for two images, compared by |a - b|."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(ConvBN(1, 6), nn.MaxPool2d(2), ConvBN(6, 8))
        self.fc = nn.Linear(8 * 4 * 4, 1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        a, b = (self.encoder(x).flatten(1) for x in (first, second))
        return self.fc((a - b).abs())


# Both calls write the same 8 channels; a channel is 16 columns of fc.
ZOO["siamese"] = Entry(
    Siamese,
    normal((1, 8, 8), (1, 8, 8)),
    (tied(6, "encoder.0.conv", "encoder.2.conv"), tied(8, "encoder.2.conv", "fc")),
)


class IfShape(nn.Module):
    """Odd images are padded before they are halved, and large ones are halved twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = ConvBN(3, 6), ConvBN(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 2 == 1:
            x = F.pad(x, (0, 1, 0, 1))
        x = F.avg_pool2d(self.conv1(x), 2)
        if x.shape[-1] > 6:
            x = F.avg_pool2d(x, 2)
        return self.fc(self.conv2(x).mean((2, 3)))


ZOO["if_shape"] = Entry(
    IfShape, normal((3, 13, 13)), (tied(6, "conv1.conv", "conv2.conv"), tied(8, "conv2.conv", "fc"))
)


class IfData(nn.Module):
    """Images that were not scaled to order 1 are recognised by their values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = ConvBN(3, 6), ConvBN(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() > 16:
            x = x / 255
        return self.fc(self.conv2(self.conv1(x)).mean((2, 3)))


ZOO["if_data"] = Entry(IfData, normal((3, 8, 8)), (tied(6, "conv1.conv", "conv2.conv"), tied(8, "conv2.conv", "fc")))


class AuxiliaryHead(nn.Module):
    """GoogLeNet: a second classifier half-way, in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = ConvBN(3, 8), ConvBN(8, 12, s=2), nn.Linear(12, 5)
        self.aux_conv, self.aux_fc = ConvBN(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        middle = self.conv1(x)
        out = self.fc(self.conv2(middle).mean((2, 3)))
        if self.training:
            return out, self.aux_fc(self.aux_conv(middle).mean((2, 3)))
        return out


# No hand count: it differs between the two modes (columns of aux_conv belong to conv1's group in training).
ZOO["auxiliary_head"] = Entry(AuxiliaryHead, normal((3, 8, 8)))


# --------------------------------------------------------------------------------------------------------- transformers


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class FusedAttention(nn.Module):
    """q, k, v from one Linear, reshaped by the number of heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


class SeparateAttention(nn.Module):
    """q, k, v from three Linears, softmax written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, -1, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1))


class TorchAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x, need_weights=False)[0]


class EncoderBlock(nn.Module):
    def __init__(self, width: int, attention: nn.Module, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), attention
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """8x8 images in 4x4 patches: 4 tokens and the class token, width 12."""

    def __init__(self, attention: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.cls, self.position = nn.Parameter(torch.zeros(1, 1, 12)), nn.Parameter(torch.zeros(1, 5, 12))
        self.blocks = nn.Sequential(*(EncoderBlock(12, attention(12, 3), hidden) for hidden in (20, 24)))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


# LayerNorm freezes the width. Rows of qkv are (3, 3 heads, 4): a unit is one head of q, of k and of v.
ZOO["vit_fused_qkv"] = Entry(
    lambda: ViT(FusedAttention),
    normal((3, 8, 8)),
    (
        tied(3, "blocks.0.attn.qkv", "blocks.0.attn.proj"),
        tied(20, "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"),
        tied(3, "blocks.1.attn.qkv", "blocks.1.attn.proj"),
        tied(24, "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"),
    ),
)
# The product q.k ties q's and k's rows, the weighted sum ties v's heads to them.
ZOO["vit_separate_qkv"] = Entry(
    lambda: ViT(SeparateAttention),
    normal((3, 8, 8)),
    (
        tied(3, "blocks.0.attn.q blocks.0.attn.k blocks.0.attn.v", "blocks.0.attn.proj"),
        tied(20, "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"),
        tied(3, "blocks.1.attn.q blocks.1.attn.k blocks.1.attn.v", "blocks.1.attn.proj"),
        tied(24, "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"),
    ),
)
# No hand count: nn.MultiheadAttention checks its own sizes, so its heads cannot simply be cut.
ZOO["multihead_attention"] = Entry(lambda: ViT(TorchAttention), normal((3, 8, 8)))


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.pwconv1, self.pwconv2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (B, C, H, W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convnext() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 4, 4), ChannelNorm(8), ConvNeXtBlock(8, 20)),
        *(ChannelNorm(8), nn.Conv2d(8, 12, 2, 2), ConvNeXtBlock(12, 24)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 5)),
    )


# LayerNorm freezes both streams (8 and 12) and with them the depthwise convolutions; only the hidden widths are left.
ZOO["convnext"] = Entry(
    convnext, normal((3, 16, 16)), (tied(20, "2.pwconv1", "2.pwconv2"), tied(24, "5.pwconv1", "5.pwconv2"))
)


class MixerBlock(nn.Module):
    def __init__(self, n: int, width: int, hidden_tokens: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.token = nn.LayerNorm(width), Mlp(n, hidden_tokens)
        self.norm2, self.channel = nn.LayerNorm(width), Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel(self.norm2(x))


class MlpMixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 10, 4, 4)
        self.blocks = nn.Sequential(MixerBlock(9, 10, 7, 20), MixerBlock(9, 10, 6, 16))
        self.norm, self.head = nn.LayerNorm(10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


# The width is frozen by LayerNorm, the 9 tokens come from the image; the hidden widths of both kinds of Mlp are left.
ZOO["mlp_mixer"] = Entry(
    MlpMixer,
    normal((3, 12, 12)),
    (
        tied(7, "blocks.0.token.fc1", "blocks.0.token.fc2"),
        tied(20, "blocks.0.channel.fc1", "blocks.0.channel.fc2"),
        tied(6, "blocks.1.token.fc1", "blocks.1.token.fc2"),
        tied(16, "blocks.1.channel.fc1", "blocks.1.channel.fc2"),
    ),
)


# ------------------------------------------------------------------------------------------------ norms and activations


class NormResNet(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module], mid: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8)
        self.conv1, self.norm1 = nn.Conv2d(8, mid, 3, padding=1, bias=False), norm(mid)
        self.conv2, self.norm2 = nn.Conv2d(mid, 8, 3, padding=1, bias=False), norm(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return self.fc(torch.relu(x + y).mean((2, 3)))


# Units are the norm groups: 4 of 2 channels in the stream, 4 of 3 channels inside.
ZOO["group_norm"] = Entry(
    lambda: NormResNet(lambda width: nn.GroupNorm(4, width), 12),
    normal((3, 8, 8)),
    (tied(4, "stem conv2", "conv1 fc"), tied(4, "conv1", "conv2")),
)
# Each channel is normalised by itself: nothing is tied.
ZOO["instance_norm"] = Entry(
    lambda: NormResNet(lambda width: nn.InstanceNorm2d(width, affine=True), 12),
    normal((3, 8, 8)),
    (tied(8, "stem conv2", "conv1 fc"), tied(12, "conv1", "conv2")),
)


class PReLUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.act1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU(8)
        self.conv2, self.act2 = nn.Conv2d(8, 10, 3), nn.PReLU()
        self.fc = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


# The slopes of act1 follow the 8 channels; the one slope of act2 ties nothing.
ZOO["prelu"] = Entry(PReLUNet, normal((3, 8, 8)), (tied(8, "conv1", "conv2"), tied(10, "conv2", "fc")))


class BNAfterPool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return self.fc(self.norm2(leaky(self.conv2(x)).mean((2, 3))))


ZOO["bn_after_pool"] = Entry(BNAfterPool, normal((3, 8, 8)), (tied(6, "conv1", "conv2"), tied(8, "conv2", "fc")))


class BNAfterReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(torch.relu(self.conv1(x)))
        return self.fc(self.norm2(torch.relu(self.conv2(x))).mean((2, 3)))


ZOO["bn_after_relu"] = Entry(BNAfterReLU, normal((3, 8, 8)), (tied(6, "conv1", "conv2"), tied(8, "conv2", "fc")))


class BNAfterConcat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 3, padding=1)
        self.norm, self.conv, self.fc = nn.BatchNorm2d(10), nn.Conv2d(10, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(torch.cat([self.left(x), self.right(x)], 1)))
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


# The norm's first 4 channels go with left, the other 6 with right.
ZOO["bn_after_concat"] = Entry(
    BNAfterConcat, normal((3, 8, 8)), (tied(4, "left", "conv"), tied(6, "right", "conv"), tied(8, "conv", "fc"))
)


class SigmoidConstant(nn.Module):
    """No norm, and neither activation maps 0 to 0: sigmoid(0) = 0.5, then + 0.25."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.conv1(x)) + 0.25
        return self.fc(torch.cos(self.conv2(x)).mean((2, 3)))


# Numbers tie nothing. (A cut channel is a channel gone, not a channel at 0.)
ZOO["sigmoid_constant"] = Entry(SigmoidConstant, normal((3, 8, 8)), (tied(6, "conv1", "conv2"), tied(8, "conv2", "fc")))


class PadOnes(nn.Module):
    """Borders of 1 instead of 0."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(F.pad(x, (1, 1, 1, 1), value=1.0)))
        x = leaky(self.conv2(F.pad(x, (1, 1, 1, 1), value=1.0)))
        return self.fc(x.mean((2, 3)))


# The border has the channels of what it surrounds.
ZOO["pad_ones"] = Entry(PadOnes, normal((3, 8, 8)), (tied(6, "conv1", "conv2"), tied(8, "conv2", "fc")))


class StyleTransfer(nn.Module):
    """Reflection padding, a residual block, up again by nearest neighbour; an image comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ReflectionPad2d(1)
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8)
        self.conv1, self.conv2 = nn.Conv2d(8, 6, 3), nn.Conv2d(6, 8, 3)
        self.up, self.out = nn.Conv2d(8, 7, 3), nn.Conv2d(7, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(self.pad(x))))
        x = x + self.conv2(self.pad(torch.relu(self.conv1(self.pad(x)))))
        x = leaky(self.up(self.pad(F.interpolate(x, scale_factor=2.0, mode="nearest"))))
        return torch.tanh(self.out(self.pad(x)))


ZOO["reflection_pad"] = Entry(
    StyleTransfer,
    normal((3, 8, 8)),
    (tied(8, "stem conv2", "conv1 up"), tied(6, "conv1", "conv2"), tied(7, "up", "out")),
)


# ---------------------------------------------------------------------------------------------------- temporal networks


class CausalConv(nn.Module):
    """Dilated Conv1d in one of four paddings; the first three keep the length, 'valid' shortens it."""

    def __init__(self, cin: int, cout: int, k: int, dilation: int, padding: str) -> None:
        super().__init__()
        left = (k - 1) * dilation
        self.pad = nn.ConstantPad1d((left, 0), 0.0) if padding == "module" else nn.Identity()
        self.left = left if padding == "function" else 0
        self.conv = nn.Conv1d(cin, cout, k, dilation=dilation, padding="same" if padding == "same" else 0)
        self.norm = nn.BatchNorm1d(cout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pad(x)
        if self.left > 0:
            x = F.pad(x, (self.left, 0))
        return leaky(self.norm(self.conv(x)))


class TemporalBlock(nn.Module):
    def __init__(self, cin: int, mid: int, cout: int, dilation: int, padding: str) -> None:
        super().__init__()
        self.one = CausalConv(cin, mid, 3, dilation, padding)
        self.two = CausalConv(mid, cout, 3, dilation, padding)
        self.down = nn.Conv1d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.one(x))
        return leaky(y + self.down(x)[:, :, -y.shape[2] :])  # all of it unless 'valid'


class TCN(nn.Module):
    def __init__(self, padding: str) -> None:
        super().__init__()
        self.blocks = nn.Sequential(TemporalBlock(4, 6, 8, 1, padding), TemporalBlock(8, 10, 8, 2, padding))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(x)[:, :, -1])


# Padding and crop are along time: the groups are those of a ResNet (the 1x1 convolution starts the stream of 8).
_TCN_GROUPS = (
    tied(6, "blocks.0.one.conv", "blocks.0.two.conv"),
    tied(8, "blocks.0.two.conv blocks.0.down blocks.1.two.conv", "blocks.1.one.conv fc"),
    tied(10, "blocks.1.one.conv", "blocks.1.two.conv"),
)
ZOO["tcn_same"] = Entry(lambda: TCN("same"), normal((4, 20)), _TCN_GROUPS)
ZOO["tcn_causal_module"] = Entry(lambda: TCN("module"), normal((4, 20)), _TCN_GROUPS)
ZOO["tcn_causal_function"] = Entry(lambda: TCN("function"), normal((4, 20)), _TCN_GROUPS)
ZOO["tcn_valid_crop"] = Entry(lambda: TCN("valid"), normal((4, 20)), _TCN_GROUPS)


class TCResNetBlock(nn.Module):
    """Kernel 9, stride 2; the shortcut has a norm and a ReLU of its own."""

    def __init__(self, cin: int, mid: int, cout: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv1d(cin, mid, 9, 2, 4, bias=False), nn.BatchNorm1d(mid)
        self.conv2, self.norm2 = nn.Conv1d(mid, cout, 9, 1, 4, bias=False), nn.BatchNorm1d(cout)
        self.down, self.norm3 = nn.Conv1d(cin, cout, 1, 2, bias=False), nn.BatchNorm1d(cout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(leaky(self.norm1(self.conv1(x)))))
        return leaky(y + leaky(self.norm3(self.down(x))))


class TCResNet(nn.Module):
    """Keyword spotting: the 10 coefficients of the spectrogram are channels, time is what is convolved."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(10, 6, 3, padding=1, bias=False)
        self.block1, self.block2 = TCResNetBlock(6, 7, 8), TCResNetBlock(8, 9, 12)
        self.pool, self.fc = nn.AdaptiveAvgPool1d(1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.block2(self.block1(self.stem(x)))).squeeze(2))


ZOO["tc_resnet"] = Entry(
    TCResNet,
    normal((10, 20)),
    (
        tied(6, "stem", "block1.conv1 block1.down"),
        tied(7, "block1.conv1", "block1.conv2"),
        tied(8, "block1.conv2 block1.down", "block2.conv1 block2.down"),
        tied(9, "block2.conv1", "block2.conv2"),
        tied(12, "block2.conv2 block2.down", "fc"),
    ),
)


class WaveNetLayer(nn.Module):
    """tanh(filter) * sigmoid(gate), then one 1x1 convolution to the stream and one to the output."""

    def __init__(self, width: int, mid: int, skip: int, dilation: int, last: bool) -> None:
        super().__init__()
        self.pad = nn.ConstantPad1d((dilation, 0), 0.0)
        self.filter, self.gate = (nn.Conv1d(width, mid, 2, dilation=dilation) for _ in range(2))
        self.skip = nn.Conv1d(mid, skip, 1)
        self.res = None if last else nn.Conv1d(mid, width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.pad(x)
        y = torch.tanh(self.filter(y)) * torch.sigmoid(self.gate(y))
        return x if self.res is None else x + self.res(y), self.skip(y)


class WaveNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 8, 1)
        self.layer1, self.layer2 = WaveNetLayer(8, 6, 10, 1, False), WaveNetLayer(8, 5, 10, 2, True)
        self.out1, self.out2 = nn.Conv1d(10, 7, 1), nn.Conv1d(7, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skip1 = self.layer1(self.stem(x))
        _, skip2 = self.layer2(x)
        return self.out2(leaky(self.out1(leaky(skip1 + skip2))))


# The product ties filter and gate of a layer; the sums tie the stream (8) and the skips (10).
ZOO["wavenet"] = Entry(
    WaveNet,
    normal((1, 16)),
    (
        tied(8, "stem layer1.res", "layer1.filter layer1.gate layer2.filter layer2.gate"),
        tied(6, "layer1.filter layer1.gate", "layer1.res layer1.skip"),
        tied(5, "layer2.filter layer2.gate", "layer2.skip"),
        tied(10, "layer1.skip layer2.skip", "out1"),
        tied(7, "out1", "out2"),
    ),
)


class ConvLSTM(nn.Module):
    """CRNN: convolutions over time, an LSTM, and a small classifier on its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6)
        self.conv2 = nn.Conv1d(6, 8, 3, padding=1)
        self.lstm = nn.LSTM(8, 7, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(7, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = leaky(self.conv2(leaky(self.norm1(self.conv1(x)))))
        states, _ = self.lstm(x.transpose(1, 2))
        return self.fc2(F.gelu(self.fc1(states[:, -1])))


# The LSTM freezes what it reads (rows of conv2) and writes (columns of fc1).
ZOO["conv_lstm"] = Entry(ConvLSTM, normal((4, 12)), (tied(6, "conv1", "conv2"), tied(9, "fc1", "fc2")))


class TimeLinear(nn.Module):
    """Linears on (B, T, features); the mean over time comes late."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = leaky(self.fc2(leaky(self.fc1(x))))  # (B, T, 6)
        return self.fc3(x).mean(dim=1)


ZOO["time_linear"] = Entry(TimeLinear, normal((10, 5)), (tied(8, "fc1", "fc2"), tied(6, "fc2", "fc3")))


class EmbeddingClassifier(nn.Module):
    """fastText: mean of the words' vectors, two Linears."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.fc1, self.fc2 = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(self.words(x).mean(1))))


# No hand count: whether the 8 columns of the embedding are frozen with its rows is the analysis' choice.
ZOO["embedding"] = Entry(EmbeddingClassifier, tokens(20, 7))


class TextConv(nn.Module):
    """TextCNN: embedding, LayerNorm, convolutions of widths 2 and 3, maximum over time, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(20, 8), nn.LayerNorm(8)
        self.conv2, self.conv3 = nn.Conv1d(8, 6, 2), nn.Conv1d(8, 5, 3)
        self.fc = nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.words(x)).transpose(1, 2)
        pooled = [torch.tanh(conv(x)).amax(2) for conv in (self.conv2, self.conv3)]
        return self.fc(torch.cat(pooled, 1))


# LayerNorm freezes the embedding's columns; the two convolutions share the columns of fc.
ZOO["text_conv"] = Entry(TextConv, tokens(20, 9), (tied(6, "conv2", "fc"), tied(5, "conv3", "fc")))


# ------------------------------------------------------------------------------------------------------ gates, products


class GatedChunk(nn.Module):
    """Gated linear unit by hand: one convolution makes value and gate."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 12, 3, padding=1), nn.BatchNorm1d(12)
        self.out, self.fc = nn.Conv1d(6, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.norm(self.conv(x)).chunk(2, dim=1)
        return self.fc(torch.relu(self.out(value * torch.sigmoid(gate))).mean(2))


# Rows j and j + 6 of conv are value and gate of one channel.
ZOO["glu_chunk"] = Entry(GatedChunk, normal((4, 12)), (tied(6, "conv", "out"), tied(8, "out", "fc")))


class GatedFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out, self.fc = nn.Conv1d(4, 12, 3), nn.Conv1d(6, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.out(F.glu(self.conv(x), dim=1))).mean(2))


# No hand count: F.glu is one operator, known (then as glu_chunk) or not (then conv's rows are frozen).
ZOO["glu_function"] = Entry(GatedFunction, normal((4, 12)))


class SwiGLU(nn.Module):
    """Feed-forward part of a language model: two Linears multiplied, RMS norm before, residual around."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.gate, self.up, self.down = nn.Linear(8, 10, bias=False), nn.Linear(8, 10, bias=False), nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


# Input and output are the stream of 8; the product ties gate and up.
ZOO["swiglu"] = Entry(SwiGLU, normal((5, 8)), (tied(10, "gate up", "down"),))


class Product(nn.Module):
    """Two branches multiplied, as in attention gates and bilinear models."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = ConvBN(3, 6), ConvBN(6, 8, 1), nn.Conv2d(6, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc((self.left(x) * self.right(x)).mean((2, 3)))


ZOO["product"] = Entry(
    Product, normal((3, 8, 8)), (tied(6, "stem.conv", "left.conv right"), tied(8, "left.conv right", "fc"))
)


class StackSum(nn.Module):
    """Two branches stacked on a new dimension and summed over it."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, padding=1)
        self.norm, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([self.left(x), self.right(x)]).sum(0)
        return self.fc(torch.relu(self.norm(x)).mean((2, 3)))


# The new dimension has no weights behind it; summing over it is an addition of the two branches.
ZOO["stack_sum"] = Entry(StackSum, normal((3, 8, 8)), (tied(8, "left right", "fc"),))


# ------------------------------------------------------------------------------------------- several inputs and outputs


class TwoInputs(nn.Module):
    """An image and 4 measurements beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.side = ConvBN(3, 8), nn.Linear(4, 6)
        self.fc1, self.fc2 = nn.Linear(14, 10), nn.Linear(10, 3)

    def forward(self, image: Tensor, numbers: Tensor) -> Tensor:
        x = torch.cat([self.conv(image).mean((2, 3)), torch.tanh(self.side(numbers))], 1)
        return self.fc2(F.gelu(self.fc1(x)))


ZOO["two_inputs"] = Entry(
    TwoInputs,
    normal((3, 8, 8), (4,)),
    (tied(8, "conv.conv", "fc1"), tied(6, "side", "fc1"), tied(10, "fc1", "fc2")),
)


class FPN(nn.Module):
    """Feature pyramid: lateral 1x1 convolutions, top-down addition, one head for both levels, a tuple out."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = ConvBN(3, 6), ConvBN(6, 8, 3, 2)
        self.lateral1, self.lateral2 = nn.Conv2d(6, 10, 1), nn.Conv2d(8, 10, 1)
        self.smooth1, self.smooth2 = nn.Conv2d(10, 7, 3, padding=1), nn.Conv2d(10, 7, 3, padding=1)
        self.head = nn.Conv2d(7, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.c1(x)
        coarse = self.c2(fine)
        top = self.lateral2(coarse)
        down = self.lateral1(fine) + F.interpolate(top, scale_factor=2.0, mode="nearest")
        return self.head(torch.relu(self.smooth1(down))), self.head(torch.relu(self.smooth2(top)))


# The addition ties the laterals, the shared head ties the smoothing convolutions.
ZOO["tuple_output_fpn"] = Entry(
    FPN,
    normal((3, 8, 8)),
    (
        tied(6, "c1.conv", "c2.conv lateral1"),
        tied(8, "c2.conv", "lateral2"),
        tied(10, "lateral1 lateral2", "smooth1 smooth2"),
        tied(7, "smooth1 smooth2", "head"),
    ),
)


class DictOutput(nn.Module):
    """Class scores, and the embedding that they are computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvBN(3, 6), ConvBN(6, 8)
        self.embed, self.fc = nn.Linear(8, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        embedding = self.embed(self.conv2(self.conv1(x)).mean((2, 3)))
        return {"scores": self.fc(embedding), "embedding": embedding}


# The embedding is an output: rows of embed (and so columns of fc) are frozen.
ZOO["dict_output"] = Entry(
    DictOutput, normal((3, 8, 8)), (tied(6, "conv1.conv", "conv2.conv"), tied(8, "conv2.conv", "embed"))
)


# --------------------------------------------------------------------------------------------------------- tied weights


class TiedLinears(nn.Module):
    """Two Linears with one weight and a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(torch.tanh(self.first(torch.tanh(self.stem(x))))))
        return self.fc(x)


# second reads what first wrote, through one weight: rows and columns are the same units. The weight has its first name.
ZOO["tied_linears"] = Entry(TiedLinears, normal((5,)), (tied(8, "stem first", "first fc"),))


class TiedAutoencoder(nn.Module):
    """The decoder uses the encoder's weights transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2 = nn.Linear(12, 8), nn.Linear(8, 5)
        self.bias1, self.bias2 = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        code = torch.tanh(self.enc2(torch.tanh(self.enc1(x))))
        x = torch.tanh(F.linear(code, self.enc2.weight.t(), self.bias1))
        return F.linear(x, self.enc1.weight.t(), self.bias2)


# Going back, the 8 units of bias1 are columns of enc2 and rows of enc1: the same ties as on the way in.
ZOO["tied_autoencoder"] = Entry(TiedAutoencoder, normal((12,)), (tied(8, "enc1", "enc2"), tied(5, "enc2")))


# -------------------------------------------------------------------------------------- heads: view, mean, permute, cat


class HeadNet(nn.Module):
    """Two convolutions and a head; subclasses say how the maps (B, 8, 2, 3) become vectors."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = ConvBN(3, 6), ConvBN(6, 8, s=2), nn.Linear(features, 5)

    def maps(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class ViewHead(HeadNet):
    def forward(self, x: Tensor) -> Tensor:
        x = self.maps(x)
        return self.fc(x.view(x.size(0), -1))


class LiteralViewHead(HeadNet):
    """The number of features is written into the code, so the code breaks when channels are cut."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.maps(x).view(-1, 48))


class MeanHead(HeadNet):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.maps(x).mean((2, 3)))


class PermuteFlattenHead(HeadNet):
    """Channels last before the flatten: channel c is columns c, c + 8, c + 16, ... of the Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.maps(x).permute(0, 2, 3, 1).flatten(1))


_HEAD_GROUPS = (tied(6, "conv1.conv", "conv2.conv"), tied(8, "conv2.conv", "fc"))
ZOO["head_view"] = Entry(lambda: ViewHead(48), normal((3, 4, 6)), _HEAD_GROUPS)
# No hand count: the last convolution is tied to 48 columns, yet no cut of it can run.
ZOO["head_view_literal"] = Entry(lambda: LiteralViewHead(48), normal((3, 4, 6)))
ZOO["head_mean"] = Entry(lambda: MeanHead(8), normal((3, 4, 6)), _HEAD_GROUPS)
ZOO["head_permute_flatten"] = Entry(lambda: PermuteFlattenHead(48), normal((3, 4, 6)), _HEAD_GROUPS)


class DenseHead(nn.Module):
    """Detector: boxes per pixel from a convolution, classes per pixel from Linears on channels-last maps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.boxes = ConvBN(3, 8), nn.Conv2d(8, 2 * 4, 1)
        self.fc1, self.fc2 = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv(x)
        boxes = self.boxes(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4)
        return boxes, self.fc2(torch.relu(self.fc1(x.permute(0, 2, 3, 1))))


# Rows of boxes are an output, however they are reshaped.
ZOO["head_permute_dense"] = Entry(
    DenseHead, normal((3, 5, 6)), (tied(8, "conv.conv", "boxes fc1"), tied(6, "fc1", "fc2"))
)


class CatSame(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = ConvBN(3, 6), ConvBN(12, 8), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.conv2(torch.cat([x, x], 1)).mean((2, 3))
        return self.fc(torch.cat([x, -x], 1))


# Channel c is read twice: columns c and c + 6 of conv2 (c and c + 8 of fc).
ZOO["cat_same"] = Entry(CatSame, normal((3, 8, 8)), (tied(6, "conv1.conv", "conv2.conv"), tied(8, "conv2.conv", "fc")))


class CatNegativeDim(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = ConvBN(3, 4, 1), ConvBN(3, 6)
        self.fuse, self.fc = ConvBN(13, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fuse(torch.cat([x, self.left(x), self.right(x)], dim=-3))
        return self.fc(x.mean((-2, -1)))


# dim -3 of (B, C, H, W) is the channels. The first 3 columns of fuse read the input and are frozen.
ZOO["cat_negative_dim"] = Entry(
    CatNegativeDim,
    normal((3, 8, 8)),
    (tied(4, "left.conv", "fuse.conv"), tied(6, "right.conv", "fuse.conv"), tied(8, "fuse.conv", "fc")),
)


class SliceChannels(nn.Module):
    """CSP: the first 8 channels go round the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = ConvBN(3, 12), ConvBN(4, 6)
        self.fuse, self.fc = ConvBN(14, 10, 1), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x[:, :8], self.conv(x[:, 8:])], 1)
        return self.fc(self.fuse(x).mean((2, 3)))


# No hand count for slices and unequal splits.
ZOO["slice_channels"] = Entry(SliceChannels, normal((3, 8, 8)))


class UnequalSplit(nn.Module):
    """FasterNet's partial convolution: 3 of the 12 channels are convolved, the others pass."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.partial = ConvBN(3, 12), nn.Conv2d(3, 3, 3, padding=1)
        self.fc1, self.fc2, self.fc = ConvBN(12, 20, 1), nn.Conv2d(20, 12, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        some, rest = torch.split(x, [3, 9], dim=1)
        y = self.fc2(self.fc1(torch.cat([self.partial(some), rest], 1)))
        return self.fc((x + y).mean((2, 3)))


ZOO["unequal_split"] = Entry(UnequalSplit, normal((3, 8, 8)))


class SuperResolution(nn.Module):
    """ESPCN with a convolution after the pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 6 * 4, 3, padding=1)
        self.shuffle, self.out = nn.PixelShuffle(2), nn.Conv2d(6, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.shuffle(self.conv2(torch.relu(self.conv1(x))))))


# No hand count: the shuffle moves 4 rows of conv2 into the 2x2 pixels of one channel, if it is understood.
ZOO["pixel_shuffle"] = Entry(SuperResolution, normal((1, 6, 6)))


# ---------------------------------------------------------------------------------------------------- channel attention


class ChannelAttention(nn.Module):
    """Channels attend to channels (dual attention network): softmax over C of the C x C products of maps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvBN(3, 6), ConvBN(6, 8)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.fuse, self.fc = ConvBN(8, 10, 1), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x))
        maps = x.flatten(2)
        energy = torch.einsum("bcn,bdn->bcd", maps, maps) / maps.shape[-1]
        mixed = torch.einsum("bcd,bdn->bcn", energy.softmax(-1), maps)
        return self.fc(self.fuse(x + self.gamma * mixed.view_as(x)).mean((2, 3)))


# The softmax freezes the 8 channels that it runs over; before and after are plain chains.
ZOO["channel_attention_einsum"] = Entry(
    ChannelAttention, normal((3, 6, 6)), (tied(6, "conv1.conv", "conv2.conv"), tied(10, "fuse.conv", "fc"))
)


class BilinearPooling(nn.Module):
    """All products of the channels of two branches, averaged over the pixels: 6 x 5 features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = ConvBN(3, 7), ConvBN(7, 6), ConvBN(7, 5)
        self.fc = nn.Linear(30, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a, b = self.left(x).flatten(2), self.right(x).flatten(2)
        gram = torch.matmul(a, b.transpose(1, 2)) / a.shape[-1]
        return self.fc(gram.flatten(1))


# No hand count: a column of fc belongs to a channel of each branch, so the units cross.
ZOO["bilinear_pooling_matmul"] = Entry(BilinearPooling, normal((3, 6, 6)))


class EfficientChannelAttention(nn.Module):
    """The gate of a channel is a convolution over its neighbours among the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvBN(3, 6), ConvBN(6, 8)
        self.gate = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x))
        gate = torch.sigmoid(self.gate(x.mean((2, 3)).unsqueeze(1))).squeeze(1)
        return self.fc((x * gate[:, :, None, None]).mean((2, 3)))


# The order of the 8 channels matters to their convolution, so they are frozen; conv1 is free.
ZOO["channel_attention_conv"] = Entry(
    EfficientChannelAttention, normal((3, 6, 6)), (tied(6, "conv1.conv", "conv2.conv"),)
)
