"""The cells of DARTS (Liu, Simonyan and Yang 2019, arXiv 1806.09055, section 3.1) for CIFAR, and those of PC-DARTS.

stem -> cells, of which those at one and two thirds of the depth halve the image and double the channels -> global
pool -> linear

A cell has two inputs, the outputs of the two cells before it, and nodes 2, 3, 4, 5. Each node is the sum of what two of
the states before it bring, each over an edge with one of eight operations; the output is all nodes, concatenated.
``InputChoice`` chooses the two edges of a node and ``LayerChoice`` the operation of every edge. All normal cells share
their decisions, and so do all reduction cells: 2 * (4 + 14) decisions.

In a search with all operations mixed (``Softmax``), the weights of the pairs of edges make the edge normalisation of
PC-DARTS (Xu et al. 2020, arXiv 1907.05737, section 3.3): edge i is weighted with the probability that it is chosen.
``partial_channels=K`` is the other half of that paper: operations work on one in K channels.
An arch does not depend on K: searched with K = 4, it is built with K = 1.

A cost counts all edges, chosen or not; ``choices_of_genotype(genotype_of_choices(choices))`` takes 'none' on those that
are not, and costs what the network needs. Built under ``fixed_arch``, a network has the chosen edges only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oneshot import InputChoice, LayerChoice
from oneshot.errors import ArchMismatchError, ConfigurationError

__all__ = [
    "DARTS_V2",
    "EVALUATION",
    "OPERATIONS",
    "Cell",
    "DARTSNet",
    "DARTSSizes",
    "Genotype",
    "choices_of_genotype",
    "darts",
    "genotype_of_choices",
]

OPERATIONS = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
KINDS = ("normal", "reduce")
STEM_MULTIPLIER = 3


@dataclass(frozen=True)
class DARTSSizes:
    """``width``: channels of a node in the first cells. ``n_nodes``: of a cell, besides its two inputs.

    ``partial_channels``: operations work on one in so many channels, the others pass by. ``searching``: as the paper
    searches, normalisations in cells have no scales, and there is one after each pooling; else they have scales, and
    there is none after poolings. ``auxiliary``: a second classifier at two thirds of the depth, for images of 32x32.

    ConfigurationError for fewer than 3 cells, another number below 1, and a width that the partial channels do not
    divide.
    """

    width: int = 16
    n_cells: int = 8
    n_classes: int = 10
    in_channels: int = 3
    n_nodes: int = 4
    partial_channels: int = 1
    searching: bool = True
    auxiliary: bool = False

    def __post_init__(self) -> None:
        if min(self.width, self.n_cells, self.n_classes, self.in_channels, self.n_nodes, self.partial_channels) < 1:
            raise ConfigurationError(f"{self}: numbers of at least 1 are needed")
        if self.n_cells < 3:
            raise ConfigurationError(
                f"DARTSSizes(n_cells={self.n_cells}): at least 3 are needed, of which two are reduction cells"
            )
        if self.width % self.partial_channels:
            raise ConfigurationError(
                f"DARTSSizes(width={self.width}, partial_channels={self.partial_channels}): the width must be a "
                f"multiple of {self.partial_channels}"
            )


EVALUATION = DARTSSizes(width=36, n_cells=20, searching=False, auxiliary=True)
"""The network in which the paper trains the cells that were found.

With ``DARTS_V2`` it has 3,349,342 parameters (3.3 M in table 1) besides the 476,426 of its auxiliary classifier.
"""


def darts(sizes: DARTSSizes | None = None) -> DARTSNet:
    """The space; ``sizes``: None are those of the paper's search.

    Labels of a normal cell: 'normal/node2/inputs' for the two edges of a node, whose options are the pairs of the
    states before it, and 'normal/node2/op0' for the operation on the edge from state 0. Candidates: ``OPERATIONS``.

    >>> from oneshot import weight_parameters
    >>> sum(p.numel() for p in weight_parameters(darts()))  # as the authors' programme reports them
    1930618
    """
    return DARTSNet(DARTSSizes() if sizes is None else sizes)


# --- genotypes --------------------------------------------------------------------------------------------------


class Genotype(NamedTuple):
    """Cells as DARTS writes them: (operation, state it comes from), two for each node in order; and what is output."""

    normal: Sequence[tuple[str, int]]
    normal_concat: Sequence[int]
    reduce: Sequence[tuple[str, int]]
    reduce_concat: Sequence[int]


DARTS_V2 = Genotype(
    normal=[
        *[("sep_conv_3x3", 0), ("sep_conv_3x3", 1)],
        *[("sep_conv_3x3", 0), ("sep_conv_3x3", 1)],
        *[("sep_conv_3x3", 1), ("skip_connect", 0)],
        *[("skip_connect", 0), ("dil_conv_3x3", 2)],
    ],
    normal_concat=range(2, 6),
    reduce=[
        *[("max_pool_3x3", 0), ("max_pool_3x3", 1)],
        *[("skip_connect", 2), ("max_pool_3x3", 1)],
        *[("max_pool_3x3", 0), ("skip_connect", 2)],
        *[("skip_connect", 2), ("max_pool_3x3", 1)],
    ],
    reduce_concat=range(2, 6),
)
"""The cells that the paper found on CIFAR-10 with second-order gradients (figures 4 and 5)."""


def choices_of_genotype(genotype: Genotype) -> dict[str, int]:
    """Label -> option of a genotype, with 'none' on edges that are not chosen; ArchMismatchError if it is damaged.

    >>> choices = choices_of_genotype(DARTS_V2)
    >>> choices["normal/node5/inputs"]  # of (0, 1), (0, 2), (0, 3), ...
    1
    >>> [OPERATIONS[choices[f"normal/node5/op{i}"]] for i in range(5)]
    ['skip_connect', 'none', 'dil_conv_3x3', 'none', 'none']
    """
    choices: dict[str, int] = {}
    for kind in KINDS:
        edges, concat = (genotype.normal, genotype.normal_concat) if kind == "normal" else genotype[2:]
        if len(edges) != len(genotype.normal) or len(edges) < 2 or len(edges) % 2:
            raise _damaged(kind, f"{len(edges)} edges; two for each node are needed, in as many nodes in both cells")
        n_nodes = len(edges) // 2
        if list(concat) != list(range(2, 2 + n_nodes)):
            raise _damaged(kind, f"the output is {list(concat)}; needed are all nodes, {list(range(2, 2 + n_nodes))}")
        for node in range(2, 2 + n_nodes):
            choices.update(_choices_of_node(kind, node, edges[2 * node - 4 : 2 * node - 2]))
    return choices


def _choices_of_node(kind: str, node: int, edges: Sequence[tuple[str, int]]) -> dict[str, int]:
    inputs = tuple(sorted(i for _, i in edges))
    if inputs not in pairs(node):
        raise _damaged(kind, f"node {node} comes from {[i for _, i in edges]}; two of {list(range(node))} are needed")
    operations = dict.fromkeys(range(node), "none")
    for name, i in edges:
        if name not in OPERATIONS:
            raise _damaged(kind, f"operation {name!r} of node {node}; allowed are {list(OPERATIONS)}")
        operations[i] = name
    choices = {f"{kind}/node{node}/op{i}": OPERATIONS.index(name) for i, name in operations.items()}
    return {f"{kind}/node{node}/inputs": pairs(node).index(inputs), **choices}


def genotype_of_choices(choices: Mapping[str, int]) -> Genotype:
    """The genotype of label -> option, edges of a node in order; ArchMismatchError if these are not all decisions.

    >>> genotype_of_choices(choices_of_genotype(DARTS_V2)).normal[4:6]
    [('skip_connect', 0), ('sep_conv_3x3', 1)]
    """
    n_nodes = sum(label.startswith("normal/") and label.endswith("/inputs") for label in choices)
    sizes = {label: n for kind in KINDS for node in range(2, 2 + n_nodes) for label, n in _decisions(kind, node)}
    if not n_nodes or set(choices) != set(sizes) or not all(choices[x] in range(n) for x, n in sizes.items()):
        raise ArchMismatchError(
            f"choices {dict(choices)}: an option is needed for each decision of the cells, which are, for "
            f"{n_nodes or 4} nodes, label -> number of options, {sizes or 'those of darts()'}"
        )
    normal, reduction = ([edge for node in range(2, 2 + n_nodes) for edge in _edges(choices, k, node)] for k in KINDS)
    return Genotype(normal, range(2, 2 + n_nodes), reduction, range(2, 2 + n_nodes))


def _decisions(kind: str, node: int) -> list[tuple[str, int]]:
    operations = [(f"{kind}/node{node}/op{i}", len(OPERATIONS)) for i in range(node)]
    return [(f"{kind}/node{node}/inputs", len(pairs(node))), *operations]


def _edges(choices: Mapping[str, int], kind: str, node: int) -> list[tuple[str, int]]:
    chosen = pairs(node)[choices[f"{kind}/node{node}/inputs"]]
    return [(OPERATIONS[choices[f"{kind}/node{node}/op{i}"]], i) for i in chosen]


def pairs(node: int) -> list[tuple[int, int]]:
    """The pairs of the states before a node, in the order of the options of an ``InputChoice``.

    >>> pairs(3)
    [(0, 1), (0, 2), (1, 2)]
    """
    return list(combinations(range(node), 2))


def _damaged(kind: str, reason: str) -> ArchMismatchError:
    return ArchMismatchError(f"genotype, {kind} cell: {reason}")


# --- network ----------------------------------------------------------------------------------------------------


class DARTSNet(nn.Module):
    """stem, cells, classifier. Shapes in the comments are those of the paper's search on 32x32, C = 16.

    With an auxiliary classifier the output in training mode is (logits, logits of the auxiliary classifier).
    """

    def __init__(self, sizes: DARTSSizes) -> None:
        super().__init__()
        width = STEM_MULTIPLIER * sizes.width
        conv = nn.Conv2d(sizes.in_channels, width, 3, padding=1, bias=False)
        self.stem = nn.Sequential(conv, nn.BatchNorm2d(width))  # 3x32x32 -> 48x32x32
        self.two_thirds = 2 * sizes.n_cells // 3
        self.cells = nn.ModuleList()
        widths, node_width, halved = (width, width), sizes.width, False
        for k in range(sizes.n_cells):  # -> 64x32x32 -> 128x16x16 -> 256x8x8
            reduction = k in (sizes.n_cells // 3, self.two_thirds)
            node_width *= 2 if reduction else 1
            self.cells.append(Cell(widths, node_width, sizes, reduction=reduction, halved=halved))
            widths, halved = (widths[1], sizes.n_nodes * node_width), reduction
            if k == self.two_thirds and sizes.auxiliary:
                self.auxiliary = auxiliary_classifier(widths[1], sizes.n_classes)
        self.has_auxiliary = sizes.auxiliary
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(widths[1], sizes.n_classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        before = state = self.stem(x)
        auxiliary = None
        for k, cell in enumerate(self.cells):
            before, state = state, cell(before, state)
            if k == self.two_thirds and self.has_auxiliary and self.training:
                auxiliary = self.auxiliary(state)
        logits: Tensor = self.classifier(self.flatten(self.pool(state)))  # (N, 256) -> (N, 10)
        return logits if auxiliary is None else (logits, auxiliary)


class Cell(nn.Module):
    """Node j = 2, 3, ...: y_j = sum_{i chosen} o_ij(y_i), with y_0 and y_1 the outputs of the two cells before, brought
    to ``width`` channels. The output: all nodes, concatenated, (N, n_nodes * width, H, W), or half of H and W.

    ``widths``: of both inputs. ``reduction``: edges from the inputs have stride 2. ``halved``: the cell before was one,
    and the input 0 is still twice as large as the input 1.
    """

    def __init__(
        self, widths: tuple[int, int], width: int, sizes: DARTSSizes, *, reduction: bool, halved: bool
    ) -> None:
        super().__init__()
        affine = not sizes.searching
        self.input0 = (
            FactorizedReduction(widths[0], width, affine) if halved else relu_conv_bn(widths[0], width, affine)
        )
        self.input1 = relu_conv_bn(widths[1], width, affine)
        self.nodes = nn.ModuleList(
            Node(node, width, sizes, reduction=reduction) for node in range(2, 2 + sizes.n_nodes)
        )

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        states = [self.input0(before), self.input1(last)]
        for node in self.nodes:
            states.append(node(states))
        return torch.cat(states[2:], dim=1)


class Node(nn.Module):
    """The sum of what two of the edges from all states before it bring; edges that a step does not draw do not run."""

    def __init__(self, node: int, width: int, sizes: DARTSSizes, *, reduction: bool) -> None:
        super().__init__()
        label = f"{KINDS[reduction]}/node{node}"
        inputs = InputChoice(n_candidates=node, n_chosen=2, reduction="sum", label=f"{label}/inputs")
        self.inputs: nn.Module = inputs
        self.edges = nn.ModuleList()
        for i in range(node):
            stride = 2 if reduction and i < 2 else 1
            edge = searchable_edge(width, stride, sizes, label=f"{label}/op{i}")
            # Under fixed_arch it is known which edges nothing reads: built, so that their decisions are, and dropped.
            self.edges.append(edge if inputs.decided is None or i in read_by(inputs) else nn.Identity())

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        # In a network that ``fixed`` made, no choice is left here.
        read = read_by(self.inputs) if isinstance(self.inputs, InputChoice) else range(len(states))
        brought = [
            edge(state) if i in read else state for i, (edge, state) in enumerate(zip(self.edges, states, strict=True))
        ]
        total: Tensor = self.inputs(brought)  # (N, C, H, W)
        return total


def read_by(choice: InputChoice) -> set[int]:
    """The inputs that a choice reads in this forward.

    >>> choice = InputChoice(n_candidates=3, n_chosen=2)
    >>> read_by(choice)  # all options are mixed
    {0, 1, 2}
    """
    options = choice.gate().run if choice.decided is None else (choice.decided,)
    return {i for option in options for i in choice.options[option]}


def searchable_edge(width: int, stride: int, sizes: DARTSSizes, *, label: str) -> nn.Module:
    """One of the eight operations, on all channels or on one in ``partial_channels``."""
    worked_on = width // sizes.partial_channels
    candidates = {name: operation(name, worked_on, stride, sizes.searching) for name in OPERATIONS}
    choice = LayerChoice(candidates, label)
    return choice if sizes.partial_channels == 1 else PartialEdge(choice, sizes.partial_channels, stride)


class PartialEdge(nn.Module):
    """y = shuffle(cat(o(x[:, :C / K]), x[:, C / K:])): the other channels pass by, maximum of 2x2 with stride 2.

    The shuffle takes a channel from each K-th in turn, so that the next edge works on others (PC-DARTS, section 3.2).

    >>> edge = PartialEdge(nn.ReLU(), parts=2, stride=1)
    >>> edge(torch.tensor([-1.0, 2.0, -3.0, 4.0]).reshape(1, 4, 1, 1)).flatten()
    tensor([ 0., -3.,  2.,  4.])
    """

    def __init__(self, operation: nn.Module, parts: int, stride: int) -> None:
        super().__init__()
        self.operation, self.parts = operation, parts
        self.bypass = nn.Identity() if stride == 1 else nn.MaxPool2d(2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        worked_on = x.shape[1] // self.parts
        y = torch.cat([self.operation(x[:, :worked_on]), self.bypass(x[:, worked_on:])], dim=1)
        return y.unflatten(1, (self.parts, worked_on)).transpose(1, 2).flatten(1, 2)  # (N, C, H / stride, W / stride)


def operation(name: str, width: int, stride: int, searching: bool) -> nn.Module:
    """An operation of the paper; kernel and kind are in its name."""
    affine = not searching
    if name == "none":
        return Zero(stride)
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else FactorizedReduction(width, width, affine)
    if name == "max_pool_3x3":
        return Pooling(nn.MaxPool2d(3, stride, 1), width, normalised=searching)
    if name == "avg_pool_3x3":
        return Pooling(nn.AvgPool2d(3, stride, 1, count_include_pad=False), width, normalised=searching)
    kernel = int(name[-1])
    if name.startswith("dil_conv"):
        return relu_separable_bn(width, kernel, stride, affine, dilation=2)
    return nn.Sequential(
        *relu_separable_bn(width, kernel, stride, affine), *relu_separable_bn(width, kernel, 1, affine)
    )


class Zero(nn.Module):
    """Brings nothing: zeros of the shape of x, or of every second row and column."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


class Pooling(nn.Module):
    """A pooling, normalised in a search so that it is not weaker or stronger than the convolutions beside it."""

    def __init__(self, pool: nn.Module, width: int, *, normalised: bool) -> None:
        super().__init__()
        self.pool = pool
        self.norm = nn.BatchNorm2d(width, affine=False) if normalised else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.pool(x))


class FactorizedReduction(nn.Module):
    """Half of the size without a loss of pixels: 1x1 convolutions of (even, even) and of (odd, odd) ones, concatenated.

    >>> sum(p.numel() for p in FactorizedReduction(8, 6, affine=True).parameters())  # 2 * 8 * 3 + 2 * 6
    60
    """

    def __init__(self, in_width: int, out_width: int, affine: bool) -> None:
        super().__init__()
        self.even = nn.Conv2d(in_width, out_width // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(in_width, out_width - out_width // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(out_width, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        # Moved by one pixel: of an odd height or width both halves are then as large.
        moved = F.pad(x[:, :, 1:, 1:], (0, 1, 0, 1))
        return self.norm(torch.cat([self.even(x), self.odd(moved)], dim=1))  # (N, C_out, H / 2, W / 2)


def relu_separable_bn(width: int, kernel: int, stride: int, affine: bool, *, dilation: int = 1) -> nn.Sequential:
    """relu, a convolution of each channel by itself, 1x1 over the channels, normalisation.

    >>> sum(p.numel() for p in relu_separable_bn(8, 3, 1, affine=True).parameters())  # 9 * 8 + 8 * 8 + 2 * 8
    152
    """
    padding = dilation * (kernel // 2)
    depthwise = nn.Conv2d(width, width, kernel, stride, padding, dilation, groups=width, bias=False)
    pointwise = nn.Conv2d(width, width, 1, bias=False)
    return nn.Sequential(nn.ReLU(), depthwise, pointwise, nn.BatchNorm2d(width, affine=affine))


def relu_conv_bn(in_width: int, out_width: int, affine: bool) -> nn.Sequential:
    conv = nn.Conv2d(in_width, out_width, 1, bias=False)
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(out_width, affine=affine))


def auxiliary_classifier(width: int, n_classes: int) -> nn.Sequential:
    """On (N, width, 8, 8): a mean to 2x2, two convolutions and a Linear.

    >>> sum(p.numel() for p in auxiliary_classifier(576, 10).parameters())
    476426
    """
    return nn.Sequential(
        nn.ReLU(),
        nn.AvgPool2d(5, stride=3, count_include_pad=False),  # 8x8 -> 2x2
        nn.Conv2d(width, 128, 1, bias=False),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.Conv2d(128, 768, 2, bias=False),  # -> 768x1x1
        nn.BatchNorm2d(768),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(768, n_classes),
    )
