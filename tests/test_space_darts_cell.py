"""The space of DARTS against published parameters and MACs, hand counts, and its operations written out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
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
    GumbelSoftmax,
    LayerChoice,
    OnePath,
    ProxylessTrainer,
    Softmax,
    UniformPath,
    count_macs,
    count_params,
    decisions,
    draw,
    fixed,
    fixed_arch,
    load_fixed,
    set_sampler,
    weight_parameters,
)
from oneshot.errors import ArchMismatchError, ConfigurationError
from oneshot.export import arch_of, fingerprint, verified_fixed, write_arch
from search_spaces.darts_cell import (
    DARTS_V2,
    EVALUATION,
    OPERATIONS,
    DARTSNet,
    DARTSSizes,
    FactorizedReduction,
    Genotype,
    Node,
    PartialEdge,
    choices_of_genotype,
    darts,
    genotype_of_choices,
    operation,
)

# As published by P-DARTS (arXiv 1904.12760) and PC-DARTS (arXiv 1907.05737)
P_DARTS = Genotype(
    normal=[
        *[("skip_connect", 0), ("dil_conv_3x3", 1), ("skip_connect", 0), ("sep_conv_3x3", 1)],
        *[("sep_conv_3x3", 1), ("sep_conv_3x3", 3), ("sep_conv_3x3", 0), ("dil_conv_5x5", 4)],
    ],
    normal_concat=range(2, 6),
    reduce=[
        *[("avg_pool_3x3", 0), ("sep_conv_5x5", 1), ("sep_conv_3x3", 0), ("dil_conv_5x5", 2)],
        *[("max_pool_3x3", 0), ("dil_conv_3x3", 1), ("dil_conv_3x3", 1), ("dil_conv_5x5", 3)],
    ],
    reduce_concat=range(2, 6),
)
PC_DARTS = Genotype(
    normal=[
        *[("sep_conv_3x3", 1), ("skip_connect", 0), ("sep_conv_3x3", 0), ("dil_conv_3x3", 1)],
        *[("sep_conv_5x5", 0), ("sep_conv_3x3", 1), ("avg_pool_3x3", 0), ("dil_conv_3x3", 1)],
    ],
    normal_concat=[2, 3, 4, 5],
    reduce=[
        *[("sep_conv_5x5", 1), ("max_pool_3x3", 0), ("sep_conv_5x5", 1), ("sep_conv_5x5", 2)],
        *[("sep_conv_3x3", 0), ("sep_conv_3x3", 3), ("sep_conv_3x3", 1), ("sep_conv_3x3", 2)],
    ],
    reduce_concat=[2, 3, 4, 5],
)
# Genotype -> parameters of the network of the papers without its auxiliary classifier, MACs
PUBLISHED = {"DARTS": (DARTS_V2, 3_349_342, 528e6), "P-DARTS": (P_DARTS, 3_433_798, 532e6)}


def weights_of(name: str, width: int, stride: int, parts: int = 1) -> int:
    """Weights of an operation, without normalisations, on ``width / parts`` channels."""
    c = width // parts
    if name.startswith(("sep_conv", "dil_conv")):
        taps = int(name[-1]) ** 2
        return (2 if name.startswith("sep") else 1) * (taps * c + c * c)
    return c * c if name == "skip_connect" and stride == 2 else 0  # two convolutions to half of the channels


def norms_of(name: str, width: int, stride: int) -> int:
    """Channels that are normalised with a scale and an offset, outside of a search."""
    if name.startswith(("sep_conv", "dil_conv")):
        return (2 if name.startswith("sep") else 1) * width
    return width if name == "skip_connect" and stride == 2 else 0


def hand_count(
    genotype: Genotype,
    width: int,
    n_cells: int,
    n_classes: int = 10,
    *,
    affine: bool = True,
    parts: int = 1,
    side: int = 32,
) -> tuple[int, int]:
    """Parameters without the auxiliary classifier, and MACs for an image of 3 x side x side."""
    c, two_before, before = width, 3 * width, 3 * width
    n_nodes, area = len(genotype.normal) // 2, side * side
    stem = 9 * 3 * before
    params, macs = stem + 2 * before, stem * area
    for k in range(n_cells):
        kind = int(k in (n_cells // 3, 2 * n_cells // 3))
        c *= 2 if kind else 1
        params += (two_before + before) * c + (2 * 2 * c if affine else 0)
        macs += (two_before + before) * c * area  # what comes from before the last reduction is halved here
        area //= 4 if kind else 1
        for name, i in genotype.reduce if kind else genotype.normal:
            stride = 2 if kind and i < 2 else 1
            params += weights_of(name, c, stride, parts) + (2 * norms_of(name, c, stride) if affine else 0)
            macs += weights_of(name, c, stride, parts) * area
        two_before, before = before, n_nodes * c
    return params + before * n_classes + n_classes, macs + before * n_classes


def tiny(**changes: Any) -> DARTSNet:
    torch.manual_seed(0)
    sizes = {"width": 2, "n_cells": 3, "n_classes": 4, "in_channels": 1, "n_nodes": 2, **changes}
    return darts(DARTSSizes(**sizes))


def random_genotype(n_nodes: int, seed: int) -> Genotype:
    generator = torch.Generator().manual_seed(seed)

    def cell() -> list[tuple[str, int]]:
        edges: list[tuple[str, int]] = []
        for node in range(2, 2 + n_nodes):
            for i in sorted(torch.randperm(node, generator=generator)[:2].tolist()):
                edges.append((OPERATIONS[int(torch.randint(8, (), generator=generator))], i))
        return edges

    return Genotype(cell(), range(2, 2 + n_nodes), cell(), range(2, 2 + n_nodes))


# --- published numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_params_and_macs_are_the_published_ones(name: str) -> None:
    genotype, params, published_macs = PUBLISHED[name]
    by_hand, macs = hand_count(genotype, 36, 20)
    assert (by_hand, round(macs, -6)) == (params, published_macs)
    arch = arch_of(tiny(n_nodes=4), choices_of_genotype(genotype))
    with fixed_arch(arch):
        net = darts(EVALUATION)
    auxiliary = 576 * 128 + 2 * 128 + 4 * 128 * 768 + 2 * 768 + 768 * 10 + 10
    assert auxiliary == 3_910_224 - 3_433_798  # both published for P-DARTS
    assert sum(p.numel() for p in net.parameters()) == count_params(net).of({}) == params + auxiliary
    assert count_macs(net, (torch.rand(1, 3, 32, 32),)).of({}) == macs  # of the network that is used in the end


def test_the_cells_of_pc_darts() -> None:
    assert round(hand_count(PC_DARTS, 36, 20)[0] / 1e6, 1) == 3.6  # table 1 of PC-DARTS
    assert in_order(PC_DARTS.reduce) == genotype_of_choices(choices_of_genotype(PC_DARTS)).reduce


def test_the_network_of_the_search() -> None:
    """1,930,618 parameters, as the authors' programme reports them: every operation on every edge."""
    space = darts()
    assert sum(p.numel() for p in weight_parameters(space)) == 1_930_618
    found = decisions(space)
    assert len(found) == 2 * (4 + 14)
    assert [len(found[f"reduce/node{node}/inputs"].options) for node in range(2, 6)] == [1, 3, 6, 10]
    assert found["normal/node5/inputs"].options[:3] == ((0, 1), (0, 2), (0, 3))
    assert all(d.options == OPERATIONS for label, d in found.items() if "/op" in label)
    assert [len(found[f"{kind}/node3/op2"].members) for kind in ("normal", "reduce")] == [6, 2]
    every = [(name, i) for node in range(2, 6) for i in range(node) for name in OPERATIONS]
    one_node = Genotype(every, (), every, ())
    outer, total = 16, 0
    for k in range(8):
        outer *= 2 if k in (2, 5) else 1
        total += sum(weights_of(n, outer, 2 if k in (2, 5) and i < 2 else 1) for n, i in one_node.normal)
    fixed_part, _ = hand_count(Genotype([("none", 0)] * 8, (), [("none", 0)] * 8, ()), 16, 8, affine=False)
    assert total + fixed_part == 1_930_618


def test_images() -> None:
    net = darts(DARTSSizes(width=4)).eval()
    set_sampler(net, OnePath(0))
    shapes: list[tuple[int, ...]] = []
    for cell in net.cells:
        cell.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape[1:])))
    assert net(torch.rand(2, 3, 33, 30)).shape == (2, 10)
    assert shapes == [(16, 33, 30)] * 2 + [(32, 17, 15)] * 3 + [(64, 9, 8)] * 3


def test_the_auxiliary_classifier_is_for_training() -> None:
    net = tiny(auxiliary=True, searching=False)
    images = torch.rand(2, 1, 32, 32)
    logits, auxiliary = net.train()(images)
    assert logits.shape == auxiliary.shape == (2, 4)
    assert net.eval()(images).shape == (2, 4)
    auxiliary.sum().backward()
    # behind the cell at two thirds, which is the last of three: all but the classifier learns from it
    assert all(p.grad is None for p in net.classifier.parameters())
    assert next(net.stem.parameters()).grad is not None


# --- costs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2])
def test_expected_params_are_those_of_the_enumeration(parts: int) -> None:
    """One node per cell, so that both edges are always chosen: 8^4 networks, each counted by hand."""
    space = tiny(n_nodes=1, partial_channels=parts, in_channels=3)
    params = count_params(space)
    generator = torch.Generator().manual_seed(0)
    labels = [f"{kind}/node2/op{i}" for kind in ("normal", "reduce") for i in (0, 1)]
    p = {label: torch.rand(8, generator=generator, dtype=torch.float64).softmax(0) for label in labels}
    inputs = [f"{kind}/node2/inputs" for kind in ("normal", "reduce")]
    certain = dict.fromkeys(inputs, torch.ones(1, dtype=torch.float64))
    rows, expected = [p[label].tolist() for label in labels], 0.0
    for options in product(range(8), repeat=4):
        a, b, c, d = (OPERATIONS[k] for k in options)
        genotype = Genotype([(a, 0), (b, 1)], [2], [(c, 0), (d, 1)], [2])
        by_hand, _ = hand_count(genotype, 2, 3, 4, affine=False, parts=parts)
        assert params.of(choices_of_genotype(genotype)) == by_hand
        expected += math.prod(row[k] for row, k in zip(rows, options, strict=True)) * by_hand
    assert float(params.expected({**p, **certain})) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("searching", [True, False])
def test_a_genotype_costs_what_its_network_has(searching: bool) -> None:
    genotype, image = random_genotype(3, seed=int(searching)), torch.rand(1, 3, 8, 8)
    space = tiny(n_nodes=3, in_channels=3, searching=searching)
    choices = choices_of_genotype(genotype)
    params, macs = hand_count(genotype, 2, 3, 4, affine=not searching, side=8)
    plain = verified_fixed(space, choices, [(image,)])
    assert count_params(space).of(choices) == sum(p.numel() for p in plain.parameters()) == params
    assert count_macs(space, (image,)).of(choices) == count_macs(plain, (image,)).of({}) == macs


# --- operations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_have_one_shape(name: str, stride: int, size: tuple[int, int]) -> None:
    module = operation(name, 4, stride, True)
    y = module(torch.randn(2, 4, *size))
    assert y.shape == (2, 4, -(-size[0] // stride), -(-size[1] // stride))
    assert sum(p.numel() for p in module.parameters()) == weights_of(name, 4, stride)
    scaled = operation(name, 4, stride, False)
    assert sum(p.numel() for p in scaled.parameters()) == weights_of(name, 4, stride) + 2 * norms_of(name, 4, stride)


@pytest.mark.parametrize(
    ("name", "taps"),
    [
        ("none", []),
        ("skip_connect", [0]),
        ("max_pool_3x3", [-1, 0, 1]),
        ("avg_pool_3x3", [-1, 0, 1]),
        ("sep_conv_3x3", [-2, -1, 0, 1, 2]),  # twice 3
        ("sep_conv_5x5", list(range(-4, 5))),
        ("dil_conv_3x3", [-2, 0, 2]),
        ("dil_conv_5x5", [-4, -2, 0, 2, 4]),
    ],
)
def test_what_an_operation_sees(name: str, taps: Sequence[int]) -> None:
    """Rows of the input that move the middle of the output."""
    module = operation(name, 2, 1, False).double().eval()
    for parameter in module.parameters():
        nn.init.ones_(parameter)  # so that no ReLU hides anything
    x = 1 + torch.rand(1, 2, 15, 15, dtype=torch.float64)
    reference = module(x)[0, :, 7, 7]
    seen = []
    for row in range(15):
        changed = x.clone()
        changed[:, :, row] += 10
        if not torch.equal(module(changed)[0, :, 7, 7], reference):
            seen.append(row - 7)
    assert seen == list(taps)


def test_poolings_are_normalised_in_a_search_only() -> None:
    x = torch.randn(4, 3, 6, 6)
    for name, pooled in (
        ("max_pool_3x3", F.max_pool2d(x, 3, 2, 1)),
        ("avg_pool_3x3", F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
    ):
        assert torch.equal(operation(name, 3, 2, False)(x), pooled)
        normalised = F.batch_norm(pooled, None, None, training=True)
        assert torch.allclose(operation(name, 3, 2, True)(x), normalised, atol=1e-6)


def test_a_factorized_reduction_reads_even_and_odd_pixels() -> None:
    module = FactorizedReduction(3, 5, True).eval()
    x = torch.randn(2, 3, 6, 8)
    even = F.conv2d(x.relu()[:, :, ::2, ::2], module.even.weight)
    odd = F.conv2d(x.relu()[:, :, 1::2, 1::2], module.odd.weight)
    expected = torch.cat([even, odd], 1) / math.sqrt(1 + module.norm.eps)
    assert (module.even.weight.shape[0], module.odd.weight.shape[0]) == (2, 3)
    assert torch.allclose(module(x), expected, atol=1e-6)


@pytest.mark.parametrize(("parts", "stride"), [(2, 1), (4, 1), (4, 2)])
def test_a_partial_edge(parts: int, stride: int) -> None:
    """Channel c of the output is channel c % K * (C / K) + c // K of what was worked on and passed by."""
    x = torch.randn(2, 8, 6, 7)
    work = nn.Conv2d(8 // parts, 8 // parts, 1, stride)
    passed = x[:, 8 // parts :] if stride == 1 else F.max_pool2d(x[:, 8 // parts :], 2, ceil_mode=True)
    states = [*work(x[:, : 8 // parts]).unbind(1), *passed.unbind(1)]
    expected = torch.stack([states[c % parts * (8 // parts) + c // parts] for c in range(8)], 1)
    assert torch.equal(PartialEdge(work, parts, stride)(x), expected)


def test_a_node_weights_edges_by_how_likely_they_are_chosen() -> None:
    """The edge normalisation: all of 3 pairs mixed, an edge counts with the probability of the two pairs it is in."""
    torch.manual_seed(0)
    node = Node(3, 4, DARTSSizes(width=4, partial_channels=2), reduction=False).eval()
    label = "normal/node3"
    known = decisions(node)
    logits = torch.tensor([0.3, -1.0, 2.0])
    known[f"{label}/inputs"].alpha.data.copy_(logits)
    for i in range(3):
        known[f"{label}/op{i}"].set_sampler(OnePath(OPERATIONS.index("sep_conv_3x3")))
    states = [torch.randn(2, 4, 5, 5) for _ in range(3)]
    brought = [edge(state) for edge, state in zip(node.edges, states, strict=True)]
    p01, p02, p12 = logits.softmax(0)
    expected = (p01 + p02) * brought[0] + (p01 + p12) * brought[1] + (p02 + p12) * brought[2]
    assert torch.allclose(node(states), expected, atol=1e-5)


# --- genotypes --------------------------------------------------------------------------------------------------


@st.composite
def genotypes(drawn: Any) -> Genotype:
    n_nodes = drawn(st.integers(1, 4))
    cells = []
    for _ in range(2):
        edges = []
        for node in range(2, 2 + n_nodes):
            inputs = drawn(st.lists(st.integers(0, node - 1), min_size=2, max_size=2, unique=True))
            edges += [(drawn(st.sampled_from(OPERATIONS)), i) for i in inputs]
        cells.append(edges)
    concat = range(2, 2 + n_nodes)
    return Genotype(cells[0], concat, cells[1], concat)


def in_order(edges: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """The edges of each node by the state they come from."""
    return [edge for k in range(0, len(edges), 2) for edge in sorted(edges[k : k + 2], key=lambda edge: edge[1])]


@given(genotypes())
def test_genotypes_there_and_back(genotype: Genotype) -> None:
    choices = choices_of_genotype(genotype)
    back = genotype_of_choices(choices)
    assert back.normal == in_order(genotype.normal)
    assert back.reduce == in_order(genotype.reduce)
    assert (list(back.normal_concat), list(back.reduce_concat)) == (list(genotype.normal_concat),) * 2
    assert choices_of_genotype(back) == choices
    chosen = sum(label.endswith("/inputs") for label in choices)
    assert sum(option > 0 for label, option in choices.items() if "/op" in label) <= 2 * chosen


@given(st.integers(0, 2**31), st.integers(1, 4))
def test_choices_there_and_back(seed: int, n_nodes: int) -> None:
    """What is chosen stays; edges that are not chosen become 'none', once and for all."""
    known = {
        label: n
        for kind in ("normal", "reduce")
        for node in range(2, 2 + n_nodes)
        for label, n in [
            (f"{kind}/node{node}/inputs", node * (node - 1) // 2),
            *[(f"{kind}/node{node}/op{i}", 8) for i in range(node)],
        ]
    }
    generator = torch.Generator().manual_seed(seed)
    choices = {label: int(torch.randint(n, (), generator=generator)) for label, n in known.items()}
    genotype = genotype_of_choices(choices)
    back = choices_of_genotype(genotype)
    assert set(back) == set(choices)
    for label, option in back.items():
        assert option in (choices[label], 0)
        assert option == choices[label] or "/op" in label
    assert genotype_of_choices(back) == genotype


def test_the_decisions_are_those_of_the_space() -> None:
    assert set(choices_of_genotype(DARTS_V2)) == set(decisions(tiny(n_nodes=4)))
    small = random_genotype(2, 0)
    assert set(choices_of_genotype(small)) == set(decisions(tiny()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"normal": []}, "normal cell: 0 edges; two for each node"),
        ({"normal": DARTS_V2.normal[:7]}, "normal cell: 7 edges"),
        ({"reduce": DARTS_V2.reduce[:6]}, "reduce cell: 6 edges.* in as many nodes in both cells"),
        ({"reduce_concat": [2, 3, 5]}, r"reduce cell: the output is \[2, 3, 5\]; needed are all nodes, \[2, 3, 4, 5\]"),
        ({"normal": [("none", 0), ("none", 0), *DARTS_V2.normal[2:]]}, r"node 2 comes from \[0, 0\]"),
        ({"normal": [("none", 0), ("none", 2), *DARTS_V2.normal[2:]]}, r"node 2 comes from \[0, 2\]; two of \[0, 1\]"),
        ({"normal": [("conv", 0), ("none", 1), *DARTS_V2.normal[2:]]}, "operation 'conv' of node 2; allowed are"),
    ],
)
def test_a_damaged_genotype(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ArchMismatchError, match=words):
        choices_of_genotype(DARTS_V2._replace(**change))


@pytest.mark.parametrize(
    "change",
    [{"normal/node2/op0": 8}, {"normal/node2/op0": "none"}, {"normal/node6/op0": 0}, {"normal/node5/inputs": 10}],
)
def test_choices_of_another_space(change: dict[str, Any]) -> None:
    with pytest.raises(ArchMismatchError, match="an option is needed for each decision"):
        genotype_of_choices({**choices_of_genotype(DARTS_V2), **change})
    with pytest.raises(ArchMismatchError, match=r"for 4 nodes, .*those of darts"):
        genotype_of_choices({})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 0}, "width=0, .*numbers of at least 1"),
        ({"n_cells": 2}, r"DARTSSizes\(n_cells=2\): at least 3"),
        ({"width": 6, "partial_channels": 4}, r"width=6, partial_channels=4\): the width must be a multiple of 4"),
    ],
)
def test_sizes_that_cannot_work(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        DARTSSizes(**change)


# --- search -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("sampler", [Softmax(), GumbelSoftmax(hard=True), BinaryGates(2), UniformPath()])
def test_it_trains_with_every_sampler(sampler: Any, parts: int) -> None:
    net = tiny(partial_channels=parts)
    set_sampler(net, sampler)
    draw(net, torch.Generator().manual_seed(0))
    output = net(torch.rand(3, 1, 8, 8))
    output.square().sum().backward()
    assert output.shape == (3, 4)
    if not isinstance(sampler, UniformPath):
        everything = not isinstance(sampler, BinaryGates)  # which learn of what they draw
        learning = [d for label, d in decisions(net).items() if everything or label.endswith("/inputs")]
        assert all(d.alpha.grad is not None for d in learning if len(d.options) > 1)


def test_edges_that_are_not_drawn_do_not_run() -> None:
    node = Node(4, 2, DARTSSizes(width=2), reduction=False)
    decisions(node)["normal/node4/inputs"].set_sampler(OnePath(4))  # of (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)
    ran = []
    for i, edge in enumerate(node.edges):
        edge.register_forward_hook(lambda *_, i=i: ran.append(i))
    before = {name: value.clone() for name, value in node.state_dict().items()}
    node([torch.rand(2, 2, 4, 4) for _ in range(4)]).sum().backward()
    assert ran == [1, 3]
    moved = {name[:7] for name, value in node.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"edges.1", "edges.3"}
    assert {name[:7] for name, p in node.named_parameters() if p.grad is not None and "edges" in name} == moved


def search(net: nn.Module, x: Tensor) -> ProxylessTrainer:
    trainer = ProxylessTrainer(
        net,
        loss=nn.CrossEntropyLoss(),
        metrics=None,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.05),
        num_epochs=2,
        dataset=TensorDataset(x, torch.arange(len(x)) % 4),
        batch_size=8,
        workers=0,
        device="cpu",
        arch_every=2,
        skip_first_epoch=False,
        arc_learning_rate=0.1,
        cost="macs",
        dummy_input=(1, *x.shape[1:]),
        ref_latency=10_000,
        grad_reg_loss_params={"lambda": 0.5},
        progress=False,
    )
    trainer.train()
    return trainer


def test_what_a_partial_search_finds_is_built_with_all_channels(tmp_path: Path) -> None:
    partial, x = tiny(width=4, partial_channels=4), torch.rand(40, 1, 8, 8)
    arch = search(partial, x).export()
    found = decisions(partial)
    choices = {label: d.index_of(arch[label]) for label, d in found.items()}
    whole = tiny(width=8, n_cells=4, searching=False)
    assert fingerprint(partial) == fingerprint(whole)
    assert set(choices) == set(decisions(whole))
    path = tmp_path / "arch.json"
    write_arch(path, partial, choices, costs={}, created_by={})
    with fixed_arch(path):
        built = tiny(width=8, n_cells=4, searching=False)
    # What nothing reads is not there: the network has the parameters of its genotype.
    genotype = genotype_of_choices(choices)
    pruned = fixed(whole, arch_of(whole, choices_of_genotype(genotype)))
    assert sum(p.numel() for p in built.parameters()) == sum(p.numel() for p in pruned.parameters())
    assert sum(p.numel() for p in fixed(built).parameters()) == sum(p.numel() for p in pruned.parameters())
    assert not any(isinstance(m, LayerChoice) and m.decided is None for m in built.modules())
    assert fixed(built).eval()(x[:2]).shape == built.eval()(x[:2]).shape == (2, 4)
    assert torch.equal(fixed(built).eval()(x[:2]), built.eval()(x[:2]))
    loaded = load_fixed(lambda: tiny(width=8, n_cells=4, searching=False), path)
    assert loaded(x[:2]).shape == (2, 4)


def test_edges_that_are_not_chosen_do_not_matter() -> None:
    """The network built under fixed_arch computes what the searched one does, with the weights of the chosen edges."""
    space = tiny(n_nodes=3).eval()
    generator = torch.Generator().manual_seed(1)
    choices = {x: int(torch.randint(len(d.options), (), generator=generator)) for x, d in decisions(space).items()}
    plain = fixed(space, arch_of(space, choices))
    with fixed_arch(arch_of(space, choices)):
        built = tiny(n_nodes=3).eval()
    net = fixed(built)
    assert set(net.state_dict()) < set(plain.state_dict())
    net.load_state_dict({name: value for name, value in plain.state_dict().items() if name in net.state_dict()})
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(net(x), plain(x))
    pruned = fixed(space, arch_of(space, choices_of_genotype(genotype_of_choices(choices))))
    assert torch.equal(pruned(x), plain(x))
    assert {n for n, _ in pruned.named_parameters()} == {n for n, _ in net.named_parameters()}
