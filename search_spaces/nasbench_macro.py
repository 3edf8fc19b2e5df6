"""The search space of NAS-Bench-Macro (arXiv 2103.11922, section 4): eight layers of three candidates, for CIFAR-10.

stem -> eight searchable layers in stages of 2, 3 and 3 -> 1x1 feature mix -> global pool -> linear

The benchmark trained all 3^8 = 6,561 networks three times each and published their accuracies, parameters and MACs
by a code of eight digits, one per layer: 0 identity, 1 inverted residual with expansion 3 and kernel 3, 2 the same
with expansion 6 and kernel 5. The parameters and MACs counted here are those of the table, all of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from oneshot import LayerChoice
from oneshot.errors import ArchMismatchError

__all__ = ["InvertedResidual", "MacroNet", "choices_of_code", "code_of_choices", "nasbench_macro"]

STAGES = (2, 3, 3)  # layers; the first of each doubles the channels and halves the image
N_LAYERS = sum(STAGES)
N_CANDIDATES = 3


def nasbench_macro(n_classes: int = 10, width: int = 32) -> MacroNet:
    """The space on 32x32 images of 3 channels. Labels: 'layer1' to 'layer8'; candidates 'id', 'mb3k3', 'mb6k5'.

    >>> from oneshot import decisions
    >>> len(decisions(nasbench_macro())), decisions(nasbench_macro())["layer1"].options
    (8, ('id', 'mb3k3', 'mb6k5'))
    """
    return MacroNet(n_classes, width)


def choices_of_code(code: str) -> dict[str, int]:
    """Label -> option of a code of the benchmark; ArchMismatchError if it is not eight digits from 0 to 2.

    >>> choices_of_code("20120012")["layer3"]
    1
    """
    if len(code) != N_LAYERS or set(code) - set("012"):
        raise ArchMismatchError(f"code {code!r}: a code of NAS-Bench-Macro is {N_LAYERS} digits from 0 to 2")
    return {f"layer{i}": int(digit) for i, digit in enumerate(code, start=1)}


def code_of_choices(choices: Mapping[str, int]) -> str:
    """The code of the benchmark for label -> option; ArchMismatchError if these are not its eight layers.

    >>> code_of_choices(choices_of_code("20120012"))
    '20120012'
    """
    labels = [f"layer{i}" for i in range(1, N_LAYERS + 1)]
    if set(choices) != set(labels) or not all(choices[label] in range(N_CANDIDATES) for label in labels):
        raise ArchMismatchError(f"choices {dict(choices)}: 0, 1 or 2 is needed for each of {labels}")
    return "".join(str(choices[label]) for label in labels)


class MacroNet(nn.Module):
    """stem, layers, feature mix, classifier. Shapes in the comments are without the batch, for a width of 32."""

    def __init__(self, n_classes: int, width: int) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, width, 3)  # 3x32x32 -> 32x32x32
        layers: list[nn.Module] = []
        for n_layers in STAGES:  # -> 64x16x16 -> 128x8x8 -> 256x4x4
            for i in range(n_layers):
                stride, out_width = (2, 2 * width) if i == 0 else (1, width)
                layers.append(searchable_layer(width, out_width, stride, label=f"layer{len(layers) + 1}"))
                width = out_width
        self.layers = nn.Sequential(*layers)
        self.mix = conv_bn_relu(width, 1280, 1)  # -> 1280x4x4
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(1280, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)  # (N, 3, 32, 32) -> (N, 32, 32, 32)
        x = self.layers(x)  # (N, 256, 4, 4)
        x = self.flatten(self.pool(self.mix(x)))  # (N, 1280)
        return self.classifier(x)  # (N, 10)


def searchable_layer(in_width: int, out_width: int, stride: int, *, label: str) -> LayerChoice:
    """Identity, or one of two inverted residuals. Where the shape changes, the identity is a 1x1 convolution."""
    keeps = stride == 1 and in_width == out_width
    candidates = {
        "id": nn.Identity() if keeps else conv_bn(in_width, out_width, 1, stride),
        "mb3k3": InvertedResidual(in_width, out_width, kernel=3, expand=3, stride=stride),
        "mb6k5": InvertedResidual(in_width, out_width, kernel=5, expand=6, stride=stride),
    }
    return LayerChoice(candidates, label)


class InvertedResidual(nn.Module):
    """MBConv (MobileNetV2, arXiv 1801.04381) with ReLU: y = m(x), or x + m(x) if that keeps the shape.

    >>> block = InvertedResidual(32, 64, kernel=3, expand=3, stride=2)
    >>> sum(p.numel() for p in block.parameters())  # 32 * 96 + 96 * 9 + 96 * 64 + 2 * (96 + 96 + 64)
    10592
    """

    def __init__(self, in_width: int, out_width: int, kernel: int, expand: int, stride: int) -> None:
        super().__init__()
        hidden = in_width * expand
        self.shortcut = stride == 1 and in_width == out_width
        self.expand = conv_bn_relu(in_width, hidden, 1)
        self.depthwise = conv_bn_relu(hidden, hidden, kernel, stride, groups=hidden)
        self.project = conv_bn(hidden, out_width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(x)  # (N, expand * C, H, W)
        y = self.depthwise(y)  # (N, expand * C, H / stride, W / stride)
        y = self.project(y)  # (N, C_out, H / stride, W / stride)
        return x + y if self.shortcut else y


def conv_bn(in_width: int, out_width: int, kernel: int, stride: int = 1, *, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_width, out_width, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_width))


def conv_bn_relu(in_width: int, out_width: int, kernel: int, stride: int = 1, *, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(*conv_bn(in_width, out_width, kernel, stride, groups=groups), nn.ReLU(inplace=True))
