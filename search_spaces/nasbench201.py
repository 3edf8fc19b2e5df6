"""The search space of NAS-Bench-201 (Dong and Yang 2020, arXiv 2001.00326, section 2.1), for CIFAR.

stem -> 5 cells of 16 channels -> residual block -> 5 cells of 32 -> residual block -> 5 cells of 64 -> norm, relu
-> global pool -> linear

A cell has 4 nodes, of which the first is its input and the last its output. Every pair of nodes is an edge with one of
five operations, and node j is the sum of what its edges bring: y_j = sum_{i<j} o_ij(y_i). All cells are the same one:
six decisions, 5^6 = 15,625 networks.

The parameters of the benchmark are those of ``count_params``. Its "FLOPs" are multiply-accumulates, and one addition
for each bias, of which the network has those of the classifier only: ``count`` with the spec ``OPS``. Of the network
with nor_conv_3x3 on all edges, the largest, these are 1,531,546 parameters, 220,119,680 MACs and 220,119,690 "FLOPs".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from oneshot import LayerChoice
from oneshot.errors import ArchMismatchError, ConfigurationError

__all__ = ["OPERATIONS", "Cell", "NASBench201", "ResidualBlock", "cell_of_choices", "choices_of_cell", "nasbench201"]

N_NODES = 4
N_STAGES = 3
OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = tuple((i, j) for j in range(1, N_NODES) for i in range(j))  # 0-1, 0-2, 1-2, 0-3, 1-3, 2-3


def nasbench201(n_classes: int = 10, width: int = 16, n_cells: int = 5, in_channels: int = 3) -> NASBench201:
    """The space for images of any size; ``width``: of the first stage, doubled twice; ``n_cells``: of each stage.

    Labels: 'edge0-1', 'edge0-2', 'edge1-2', 'edge0-3', 'edge1-3', 'edge2-3'; candidates: ``OPERATIONS``.
    ConfigurationError for a number below 1.

    >>> from oneshot import count_params
    >>> space = nasbench201()
    >>> largest = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|nor_conv_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|"
    >>> count_params(space).of(choices_of_cell(largest))
    1531546.0
    """
    if min(n_classes, width, n_cells, in_channels) < 1:
        raise ConfigurationError(
            f"nasbench201({n_classes=}, {width=}, {n_cells=}, {in_channels=}): numbers of at least 1 are needed"
        )
    return NASBench201(n_classes, width, n_cells, in_channels)


def choices_of_cell(cell: str) -> dict[str, int]:
    """Label -> option of an architecture as the benchmark writes it; ArchMismatchError if it is not one.

    Written are the nodes from the second on, joined by '+'; of each, the operations on its edges from node 0 on.

    >>> choices_of_cell("|nor_conv_3x3~0|+|none~0|skip_connect~1|+|none~0|none~1|avg_pool_3x3~2|")
    {'edge0-1': 3, 'edge0-2': 0, 'edge1-2': 1, 'edge0-3': 0, 'edge1-3': 0, 'edge2-3': 4}
    """
    nodes = cell.split("+")
    if len(nodes) != N_NODES - 1:
        raise _damaged(cell, f"it has {len(nodes)} nodes")
    choices: dict[str, int] = {}
    for j, node in enumerate(nodes, start=1):
        before, *edges, after = node.split("|") if node.count("|") > 1 else (node, "")
        if before or after or len(edges) != j:
            raise _damaged(cell, f"node {j} is {node!r}, needed are {j} edges between '|'")
        for i, edge in enumerate(edges):
            operation, _, source = edge.partition("~")
            if operation not in OPERATIONS or source != str(i):
                raise _damaged(cell, f"edge {edge!r} of node {j} is none of {[f'{name}~{i}' for name in OPERATIONS]}")
            choices[label_of_edge(i, j)] = OPERATIONS.index(operation)
    return choices


def cell_of_choices(choices: Mapping[str, int]) -> str:
    """What the benchmark calls label -> option; ArchMismatchError if these are not its six edges.

    >>> cell_of_choices({"edge0-1": 3, "edge0-2": 0, "edge1-2": 1, "edge0-3": 0, "edge1-3": 0, "edge2-3": 4})
    '|nor_conv_3x3~0|+|none~0|skip_connect~1|+|none~0|none~1|avg_pool_3x3~2|'
    """
    labels = [label_of_edge(i, j) for i, j in EDGES]
    options = range(len(OPERATIONS))
    if set(choices) != set(labels) or not all(choices[label] in options for label in labels):
        raise ArchMismatchError(
            f"choices {dict(choices)}: a number from 0 to {len(OPERATIONS) - 1} is needed for each of {labels}"
        )
    nodes = []
    for j in range(1, N_NODES):
        edges = [f"{OPERATIONS[choices[label_of_edge(i, j)]]}~{i}" for i in range(j)]
        nodes.append(f"|{'|'.join(edges)}|")
    return "+".join(nodes)


def label_of_edge(i: int, j: int) -> str:
    return f"edge{i}-{j}"


class NASBench201(nn.Module):
    """stem, cells with residual blocks between the stages, classifier. Shapes in the comments are for 32x32."""

    def __init__(self, n_classes: int, width: int, n_cells: int, in_channels: int) -> None:
        super().__init__()
        conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.stem = nn.Sequential(conv, nn.BatchNorm2d(width))  # 3x32x32 -> 16x32x32
        layers: list[nn.Module] = []
        for stage in range(N_STAGES):  # -> 16x32x32 -> 32x16x16 -> 64x8x8
            if stage:
                layers.append(ResidualBlock(width, 2 * width))
                width *= 2
            layers.extend(Cell(width) for _ in range(n_cells))
        self.layers = nn.Sequential(*layers)
        self.norm = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.stem(x))  # (N, 3, 32, 32) -> (N, 64, 8, 8)
        x = self.flatten(self.pool(self.norm(x)))  # (N, 64)
        return self.classifier(x)  # (N, 10)


class Cell(nn.Module):
    """y_0 = x, y_j = sum_{i<j} o_ij(y_i) for j = 1, 2, 3; the output is y_3, of the shape of x.

    >>> cell = Cell(16)
    >>> sum(p.numel() for name, p in cell.named_parameters() if "nor_conv_3x3" in name)  # 6 * (9 * 16^2 + 2 * 16)
    14016
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        edges = {label_of_edge(i, j): searchable_edge(width, label=label_of_edge(i, j)) for i, j in EDGES}
        self.edges = nn.ModuleDict(edges)

    def forward(self, x: Tensor) -> Tensor:
        nodes = [x]
        for j in range(1, N_NODES):
            brought = [self.edges[label_of_edge(i, j)](nodes[i]) for i in range(j)]
            nodes.append(sum(brought[1:], brought[0]))  # (N, C, H, W)
        return nodes[-1]


def searchable_edge(width: int, *, label: str) -> LayerChoice:
    candidates = {
        "none": Zero(),
        "skip_connect": nn.Identity(),
        "nor_conv_1x1": relu_conv_bn(width, width, 1),
        "nor_conv_3x3": relu_conv_bn(width, width, 3),
        "avg_pool_3x3": nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
    }
    return LayerChoice(candidates, label)


class Zero(nn.Module):
    """Brings nothing: zeros of the shape of x."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class ResidualBlock(nn.Module):
    """y = c2(c1(x)) + s(x): 3x3 convolutions, c1 with stride 2; s the mean of 2x2 pixels and a 1x1 convolution.

    >>> sum(p.numel() for p in ResidualBlock(16, 32).parameters())  # 9 * 16 * 32 + 9 * 32^2 + 16 * 32 + 2 * 2 * 32
    14464
    """

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.conv1 = relu_conv_bn(in_width, out_width, 3, stride=2)
        self.conv2 = relu_conv_bn(out_width, out_width, 3)
        # An odd last row or column is a mean of fewer pixels, so that both branches end in the same shape.
        pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)
        self.shortcut = nn.Sequential(pool, nn.Conv2d(in_width, out_width, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))  # (N, C_out, H / 2, W / 2)
        return y + self.shortcut(x)


def relu_conv_bn(in_width: int, out_width: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_width, out_width, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(out_width))


def _damaged(cell: str, reason: str) -> ArchMismatchError:
    return ArchMismatchError(
        f"cell {cell!r}: {reason}; an architecture of NAS-Bench-201 is '|op~0|+|op~0|op~1|+|op~0|op~1|op~2|' with op "
        f"one of {list(OPERATIONS)}"
    )
