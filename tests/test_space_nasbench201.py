"""The space of NAS-Bench-201 against its published parameters and FLOPs, hand counts, and enumeration."""

from __future__ import annotations

import math
import re
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from oneshot import (
    BinaryGates,
    CostModel,
    EveryPath,
    GumbelSoftmax,
    ProxylessTrainer,
    Softmax,
    UniformPath,
    arch_parameters,
    count,
    count_macs,
    count_params,
    decisions,
    draw,
    fixed,
    fixed_arch,
    set_sampler,
)
from oneshot.cost import OPS
from oneshot.errors import ArchMismatchError, ConfigurationError
from oneshot.export import arch_of, verified_fixed
from search_spaces.nasbench201 import (
    EDGES,
    OPERATIONS,
    Cell,
    NASBench201,
    ResidualBlock,
    cell_of_choices,
    choices_of_cell,
    nasbench201,
)

CONV3 = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|nor_conv_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|"
NONE = "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|"
RESNET = "|nor_conv_3x3~0|+|nor_conv_3x3~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_3x3~1|skip_connect~2|"
FIRST = "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|nor_conv_1x1~0|skip_connect~1|skip_connect~2|"
OTHER = "|skip_connect~0|+|none~0|nor_conv_3x3~1|+|avg_pool_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|"

# Architecture -> parameters, FLOPs in millions, for CIFAR-10, as the benchmark has them: its largest and smallest
# numbers (which are those of CONV3 and NONE), its architecture 0 and another one. RESNET has as many convolutions.
PUBLISHED = {
    CONV3: (1_531_546, 220.11969),
    NONE: (73_306, 7.78305),
    FIRST: (129_306, 15.64737),
    OTHER: (802_426, 113.95137),
    RESNET: (802_426, 113.95137),
}

OP = "(?:none|skip_connect|nor_conv_1x1|nor_conv_3x3|avg_pool_3x3)"
PATTERN = re.compile(rf"\|{OP}~0\|\+\|{OP}~0\|{OP}~1\|\+\|{OP}~0\|{OP}~1\|{OP}~2\|")


def hand_count(cell: str) -> tuple[int, int]:
    """Parameters and MACs; widths 16, 32, 64 at 32x32, 16x16, 8x8, five cells of each."""
    stem, head = 9 * 3 * 16 + 2 * 16, 2 * 64 + 64 * 10 + 10
    widths, pixels = (16, 32, 64), (32**2, 16**2, 8**2)
    params, macs = stem + head, 9 * 3 * 16 * pixels[0] + 64 * 10
    for before, width, area in zip(widths, widths[1:], pixels[1:], strict=False):
        weights = 9 * before * width + 9 * width**2 + before * width
        params += weights + 2 * 2 * width  # two normalisations
        macs += weights * area
    for width, area in zip(widths, pixels, strict=True):
        for name, taps in (("nor_conv_1x1", 1), ("nor_conv_3x3", 9)):
            params += 5 * cell.count(name) * (taps * width**2 + 2 * width)
            macs += 5 * cell.count(name) * taps * width**2 * area
    return params, macs


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.rand(1, 3, 32, 32)


@pytest.fixture(scope="module")
def space() -> nn.Module:
    return nasbench201()


@pytest.fixture(scope="module")
def costs(space: nn.Module, image: Tensor) -> tuple[CostModel, CostModel, CostModel]:
    return count_params(space), count_macs(space, (image,)), count(space, (image,), OPS)


def tiny(**changes: Any) -> NASBench201:
    torch.manual_seed(0)
    return nasbench201(**{"n_classes": 4, "width": 2, "n_cells": 1, **changes})


def test_the_space(space: nn.Module, image: Tensor) -> None:
    found = decisions(space)
    assert list(found) == ["edge0-1", "edge0-2", "edge1-2", "edge0-3", "edge1-3", "edge2-3"]
    assert all(
        d.options == ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3") for d in found.values()
    )
    assert math.prod(len(d.options) for d in found.values()) == 15_625
    assert [len(d.members) for d in found.values()] == [15] * 6  # all cells share them
    assert len(arch_parameters(space)) == 6
    assert space.eval()(image).shape == (1, 10)


@pytest.mark.parametrize("cell", PUBLISHED)
def test_params_and_flops_are_the_published_ones(
    cell: str, space: nn.Module, image: Tensor, costs: tuple[CostModel, CostModel, CostModel]
) -> None:
    params, flops = PUBLISHED[cell]
    choices = choices_of_cell(cell)
    assert hand_count(cell) == (params, round(flops * 1e6) - 10)  # the 10 are the biases of the classifier
    assert [cost.of(choices) for cost in costs] == [params, round(flops * 1e6) - 10, round(flops * 1e6)]
    net = fixed(space, arch_of(space, choices))
    assert sum(p.numel() for p in net.parameters()) == params
    assert count(net, (image,), OPS).of({}) == round(flops * 1e6)


def test_the_largest_network(costs: tuple[CostModel, CostModel, CostModel]) -> None:
    params, macs, flops = (cost.of(choices_of_cell(CONV3)) for cost in costs)
    assert (params, macs, flops) == (1_531_546, 220_119_680, 220_119_690)
    assert round(flops / 1e6, 2) == 220.12


def test_the_published_numbers_of_100_classes() -> None:
    """The ends of the benchmark for CIFAR-100."""
    space = nasbench201(n_classes=100)
    params, flops = count_params(space), count(space, (torch.rand(1, 3, 32, 32),), OPS)
    assert (params.of(choices_of_cell(NONE)), flops.of(choices_of_cell(NONE))) == (79_156, 7_788_900)
    assert (params.of(choices_of_cell(CONV3)), flops.of(choices_of_cell(CONV3))) == (1_537_396, 220_125_540)


def test_costs_of_all_networks_and_their_expectation(costs: tuple[CostModel, CostModel, CostModel]) -> None:
    params, macs, _ = costs
    generator = torch.Generator().manual_seed(0)
    labels = [f"edge{i}-{j}" for i, j in EDGES]
    p = {label: torch.rand(5, generator=generator, dtype=torch.float64).softmax(0) for label in labels}
    rows = [p[label].tolist() for label in labels]
    expected = [0.0, 0.0]
    for options in product(range(5), repeat=6):
        choices = dict(zip(labels, options, strict=True))
        by_hand = hand_count("".join(OPERATIONS[k] for k in options))
        assert (params.of(choices), macs.of(choices)) == by_hand
        chance = math.prod(row[k] for row, k in zip(rows, options, strict=True))
        expected = [total + chance * value for total, value in zip(expected, by_hand, strict=True)]
    assert [float(cost.expected(p)) for cost in (params, macs)] == pytest.approx(expected, rel=1e-12)


# --- the network ------------------------------------------------------------------------------------------------


def test_a_cell_is_the_sum_of_its_edges() -> None:
    """Skips on all edges: y1 = x, y2 = 2 x, y3 = 4 x. Nothing on the edge from node 2: y3 = 2 x."""
    x = torch.randn(2, 3, 5, 6)
    skips = "|skip_connect~0|+|skip_connect~0|skip_connect~1|+|skip_connect~0|skip_connect~1|skip_connect~2|"
    for cell, factor in ((skips, 4), (skips.replace("skip_connect~2", "none~2"), 2), (NONE, 0)):
        net = Cell(3)
        plain = fixed(net, arch_of(net, choices_of_cell(cell)))
        assert torch.allclose(plain(x), factor * x)


def test_the_operations() -> None:
    x = torch.randn(2, 3, 5, 6)
    first: Any = Cell(3).eval().edges["edge0-1"]
    assert torch.equal(first["none"](x), torch.zeros_like(x))
    assert torch.equal(first["skip_connect"](x), x)
    ones = torch.ones(3, 1, 3, 3)  # a mean of the pixels that are there
    mean = F.conv2d(x, ones, padding=1, groups=3) / F.conv2d(torch.ones_like(x), ones, padding=1, groups=3)
    assert torch.allclose(first["avg_pool_3x3"](x), mean, atol=1e-6)
    for name, padding in (("nor_conv_1x1", 0), ("nor_conv_3x3", 1)):
        conv, eps = first[name][1], first[name][2].eps
        assert torch.allclose(first[name](x), F.conv2d(x.relu(), conv.weight, padding=padding) / math.sqrt(1 + eps))


@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_a_residual_block_adds_its_shortcut(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)
    block: Any = ResidualBlock(3, 6).eval()
    nn.init.zeros_(block.conv2[1].weight)
    y = block(x)
    assert y.shape == (2, 6, -(-size[0] // 2), -(-size[1] // 2))
    assert torch.allclose(y, F.conv2d(F.avg_pool2d(x, 2, ceil_mode=True), block.shortcut[1].weight), atol=1e-6)


# --- the strings of the benchmark -------------------------------------------------------------------------------


def test_all_cells_there_and_back() -> None:
    labels = [f"edge{i}-{j}" for i, j in EDGES]
    seen = set()
    for options in product(range(5), repeat=6):
        choices = dict(zip(labels, options, strict=True))
        cell = cell_of_choices(choices)
        assert choices_of_cell(cell) == choices
        seen.add(cell)
    assert len(seen) == 15_625
    for cell in PUBLISHED:
        assert cell_of_choices(choices_of_cell(cell)) == cell


@given(st.lists(st.sampled_from(OPERATIONS), min_size=6, max_size=6))
def test_a_cell_as_the_paper_writes_it(ops: list[str]) -> None:
    a, b, c, d, e, f = ops
    cell = f"|{a}~0|+|{b}~0|{c}~1|+|{d}~0|{e}~1|{f}~2|"
    choices = choices_of_cell(cell)
    assert [OPERATIONS[k] for k in choices.values()] == ops
    assert cell_of_choices(choices) == cell
    assert cell_of_choices(dict(reversed(choices.items()))) == cell


@given(st.sampled_from(list(PUBLISHED)), st.integers(0, 120), st.text("|+~012 nesavgpolr_3x1", max_size=2))
def test_a_changed_string_is_another_cell_or_an_error(cell: str, place: int, inserted: str) -> None:
    changed = cell[:place] + inserted + cell[place + 1 :]
    if PATTERN.fullmatch(changed):
        assert cell_of_choices(choices_of_cell(changed)) == changed
    else:
        with pytest.raises(ArchMismatchError, match=re.escape(repr(changed))):
            choices_of_cell(changed)


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("", "it has 1 nodes"),
        (CONV3 + "+|none~0|", "it has 4 nodes"),
        ("|none~0|+|none~0|none~1|", "it has 2 nodes"),
        (CONV3[1:], r"node 1 is 'nor_conv_3x3~0\|'"),
        (CONV3[:-1], "node 3 is"),
        ("|none~0|+|none~0|+|none~0|none~1|none~2|", "node 2 is .*, needed are 2 edges"),
        (CONV3.replace("3x3~2", "3x3~1"), "edge 'nor_conv_3x3~1' of node 3 is none of"),
        (CONV3.replace("3x3~2", "5x5~2"), "edge 'nor_conv_5x5~2' of node 3 is none of"),
        (CONV3.replace("~2", ""), "edge 'nor_conv_3x3' of node 3 is none of"),
        (CONV3.replace("~2", "~²"), "of node 3 is none of"),
        (" " + CONV3, "node 1 is"),
    ],
)
def test_a_damaged_string(cell: str, words: str) -> None:
    with pytest.raises(ArchMismatchError, match=words):
        choices_of_cell(cell)


@pytest.mark.parametrize("change", [{"edge0-1": 5}, {"edge0-1": -1}, {"edge3-4": 0}, {"edge0-1": "none"}])
def test_choices_of_another_space(change: dict[str, Any]) -> None:
    with pytest.raises(ArchMismatchError, match="a number from 0 to 4 is needed for each of"):
        cell_of_choices({**choices_of_cell(CONV3), **change})


def test_sizes_that_cannot_work() -> None:
    with pytest.raises(ConfigurationError, match="n_cells=0"):
        nasbench201(n_cells=0)


# --- search -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [Softmax(), GumbelSoftmax(hard=True), BinaryGates(2), UniformPath(), EveryPath()])
def test_it_trains_with_every_sampler(sampler: Any) -> None:
    net = tiny()
    set_sampler(net, sampler)
    draw(net, torch.Generator().manual_seed(0))
    output = net(torch.rand(3, 3, 8, 8))
    output.square().sum().backward()
    assert output.shape == (3, 4)
    assert next(net.stem.parameters()).grad is not None


@pytest.mark.parametrize("cell", [NONE, RESNET])
def test_a_fixed_network_is_the_one_that_is_built_fixed(cell: str) -> None:
    net = tiny()
    arch = arch_of(net, choices_of_cell(cell))
    verified_fixed(net, choices_of_cell(cell), [(torch.rand(2, 3, 8, 8),)])
    with fixed_arch(arch):
        built = tiny(n_cells=2)
    wide = fixed(tiny(n_cells=2), arch)
    assert count_params(fixed(built)).of({}) == count_params(wide).of({})
    assert [tuple(p.shape) for p in built.parameters()] == [tuple(p.shape) for p in wide.parameters()]


def test_a_search() -> None:
    net = tiny()
    x = torch.rand(48, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    trainer = ProxylessTrainer(
        net,
        loss=nn.CrossEntropyLoss(),
        metrics=None,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.05),
        num_epochs=2,
        dataset=TensorDataset(x, torch.arange(48) % 4),
        batch_size=8,
        workers=0,
        device="cpu",
        arch_every=2,
        skip_first_epoch=False,
        cost="macs",
        dummy_input=(1, 3, 8, 8),
        ref_latency=10_000,
        grad_reg_loss_params={"lambda": 0.5},
        progress=False,
    )
    trainer.train()
    arch = trainer.export(budget={"params": count_params(net).of(choices_of_cell(NONE))})
    assert "conv" not in cell_of_choices({label: OPERATIONS.index(name) for label, name in arch.items()})
    assert all(alpha.abs().sum() > 0 for alpha in arch_parameters(net))
