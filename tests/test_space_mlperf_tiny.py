"""The branch spaces of MLPerf Tiny against the counts that PLiNIO has for them, and against hand counts of branches.

PLiNIO counts weights and biases of convolutions and Linear, not of normalisations (its ``params``; here
``PARAMS_NO_NORM``), and multiply-accumulates with one addition per output and bias (its ``ops``; here ``OPS``).
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from oneshot import (
    BinaryGates,
    GumbelSoftmax,
    ProxylessTrainer,
    Softmax,
    UniformPath,
    count,
    count_macs,
    count_params,
    decisions,
    draw,
    fixed,
    set_sampler,
)
from oneshot.cost import OPS, PARAMS_NO_NORM
from oneshot.errors import ConfigurationError
from oneshot.export import arch_of, verified_fixed
from search_spaces.dscnn import mobilenet_v1
from search_spaces.mlperf_tiny import dscnn_supernet, mobilenet_v1_supernet, resnet8_supernet
from search_spaces.resnet import resnet8

SPACES: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "resnet8": (resnet8_supernet, (3, 32, 32)),
    "dscnn": (dscnn_supernet, (1, 49, 10)),
    "mobilenet_v1": (mobilenet_v1_supernet, (3, 96, 96)),
}
# MobileNetV1-0.25: width in, width out, side of the output of each layer
MOBILENET = [
    (8, 16, 48),
    (16, 32, 24),
    (32, 32, 24),
    (32, 64, 12),
    (64, 64, 12),
    (64, 128, 6),
    *[(128, 128, 6)] * 5,
    (128, 256, 3),
    (256, 256, 3),
]
# ResNet-8: the same of its stem and the convolutions of its blocks
RESNET = [(3, 16, 32), (16, 16, 32), (16, 16, 32), (16, 32, 16), (32, 32, 16), (32, 64, 8), (64, 64, 8)]

# PLiNIO: branches at equal probabilities, in parameters and operations, and parameters of the whole network. It sums in
# float32, where these numbers of MobileNetV1 come out as 1,847,242.75 and 1,847,972.75: there is one number per 1/8.
PUBLISHED = {
    "resnet8": ("81168.67", "13794986.67", "84474.67"),
    "dscnn": ("144192.00", "18024000.00", "164236.00"),
    "mobilenet_v1": ("1847242.67", "58717248.00", "1847972.67"),
}


def branches(inputs: int, outputs: int, *, bias: int = 1) -> list[int]:
    """Weights and biases of conv3, conv5 and separable; ``bias``: 0 without biases."""
    separable = 9 * inputs + inputs * outputs + bias * (inputs + outputs)
    return [9 * inputs * outputs + bias * outputs, 25 * inputs * outputs + bias * outputs, separable]


def hand_count(name: str) -> tuple[Fraction, Fraction, int]:
    """Expected parameters and operations of the branches at equal probabilities; parameters of all that is fixed.

    All layers of a branch have the side of its output, so operations are parameters times positions.
    """
    if name == "dscnn":
        options = [[*branches(64, 64), 0]] * 4
        positions = [25 * 5] * 4
        fixed_part = (40 * 64 + 64) + 4 * (64 * 64 + 64) + (64 * 12 + 12)
    elif name == "resnet8":
        options = [branches(i, o) + ([0] if n in (2, 4, 6) else []) for n, (i, o, _) in enumerate(RESNET)]
        positions = [side * side for _, _, side in RESNET]
        fixed_part = (16 * 32 + 32) + (32 * 64 + 64) + (64 * 10 + 10)
    else:
        options = [branches(i, o, bias=0) + ([0] if i == o else []) for i, o, _ in MOBILENET]
        positions = [side * side for _, _, side in MOBILENET]
        fixed_part = 9 * 3 * 8 + (256 * 2 + 2)
    means = [Fraction(sum(row), len(row)) for row in options]
    return sum(means, Fraction()), sum((m * p for m, p in zip(means, positions, strict=True)), Fraction()), fixed_part


def uniform(space: nn.Module) -> dict[str, Tensor]:
    return {
        label: torch.full((len(d.options),), 1 / len(d.options), dtype=torch.float64)
        for label, d in decisions(space).items()
    }


@pytest.mark.parametrize("name", SPACES)
def test_expected_costs_are_those_of_plinio(name: str) -> None:
    build, shape = SPACES[name]
    space, args = build(), (torch.rand(1, *shape),)
    params, ops, fixed_part = hand_count(name)
    assert tuple(f"{float(value):.2f}" for value in (params, ops, params + fixed_part)) == PUBLISHED[name]
    p = uniform(space)
    for spec, scope, value in (
        (PARAMS_NO_NORM, "searchable", params),
        (OPS, "searchable", ops),
        (PARAMS_NO_NORM, "all", params + fixed_part),
    ):
        cost = count(space, args, spec, scope)  # type: ignore[arg-type]
        assert float(cost.expected(p)) == pytest.approx(float(value), rel=1e-14)


@pytest.mark.parametrize(("name", "sizes"), [("resnet8", [3, 3, 4, 3, 4, 3, 4]), ("dscnn", [4] * 4)])
def test_the_spaces(name: str, sizes: list[int]) -> None:
    build, shape = SPACES[name]
    space = build()
    assert [len(d.options) for d in decisions(space).values()] == sizes
    assert space.eval()(torch.rand(2, *shape)).shape == (2, 10 if name == "resnet8" else 12)


def test_labels_and_candidates() -> None:
    labels = ["stem", *(f"block{i}/conv{j}" for i in (1, 2, 3) for j in (1, 2))]
    assert list(decisions(resnet8_supernet())) == labels
    assert list(decisions(dscnn_supernet())) == [f"block{i}" for i in range(1, 5)]
    found = decisions(mobilenet_v1_supernet())
    assert list(found) == [f"layer{i}" for i in range(1, 14)]
    skips = [label for label, d in found.items() if d.options == ("conv3", "conv5", "separable", "identity")]
    assert skips == [f"layer{i}" for i in (3, 5, 7, 8, 9, 10, 11, 13)]
    assert all(d.options == ("conv3", "conv5", "separable") for label, d in found.items() if label not in skips)


def test_resnet8_is_among_its_networks() -> None:
    """All of conv3: parameters and MACs of MLPerf Tiny's ResNet-8, but for the normalised shortcuts."""
    space, image = resnet8_supernet(), torch.rand(1, 3, 32, 32)
    choices = dict.fromkeys(decisions(space), 0)
    net = fixed(space, arch_of(space, choices))
    shortcuts = 2 * (32 + 64)
    assert count_params(space).of(choices) == count_params(resnet8()).of({}) + shortcuts
    assert sum(p.numel() for p in net.parameters()) == 78_186 + shortcuts
    assert count_macs(space, (image,)).of(choices) == count_macs(resnet8(), (image,)).of({}) == 12_501_632


def test_mobilenet_is_among_its_networks() -> None:
    """All of separable: MobileNetV1-0.25 without the biases that MLPerf Tiny's has before normalisations."""
    space, image = mobilenet_v1_supernet(), torch.rand(1, 3, 96, 96)
    choices = dict.fromkeys(decisions(space), 2)
    plain = mobilenet_v1()
    biases = sum(m.out_channels for m in plain.modules() if isinstance(m, nn.Conv2d))
    assert biases == 8 + sum(i + o for i, o, _ in MOBILENET) == 2736
    assert count_params(space).of(choices) == count_params(plain).of({}) - biases
    assert count_macs(space, (image,)).of(choices) == count_macs(plain, (image,)).of({})


def test_a_shape_that_only_identities_keep() -> None:
    """The narrowest DS-CNN is its stem and four 1x1 convolutions."""
    space = dscnn_supernet()
    choices = dict.fromkeys(decisions(space), 3)
    norms = 2 * 64 * 9
    assert count_params(space).of(choices) == (40 * 64 + 64) + 4 * (64 * 64 + 64) + (64 * 12 + 12) + norms
    assert count_macs(space, (torch.rand(1, 1, 49, 10),)).of(choices) == 125 * (40 * 64 + 4 * 64 * 64) + 64 * 12


TINY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet8": (lambda: resnet8_supernet(4, width=2, in_channels=1), (1, 8, 8)),
    "dscnn": (lambda: dscnn_supernet(4, width=2), (1, 12, 6)),
    "mobilenet_v1": (lambda: mobilenet_v1_supernet(4, width_mult=1 / 32), (3, 32, 32)),
}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("sampler", [Softmax(), GumbelSoftmax(), BinaryGates(2), UniformPath()])
def test_they_train_with_every_sampler(name: str, sampler: Any) -> None:
    torch.manual_seed(0)
    build, shape = TINY[name]
    net = build()
    set_sampler(net, sampler)
    draw(net, torch.Generator().manual_seed(0))
    output = net(torch.rand(3, *shape))
    output.square().sum().backward()
    assert output.shape == (3, 4)
    if not isinstance(sampler, UniformPath):
        assert all(d.alpha.grad is not None and d.alpha.grad.any() for d in decisions(net).values())


@pytest.mark.parametrize("name", TINY)
def test_a_search(name: str) -> None:
    torch.manual_seed(0)
    build, shape = TINY[name]
    net = build()
    x = torch.rand(48, *shape)
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
        cost="params",
        dummy_input=(1, *shape),
        ref_latency=1_000,
        grad_reg_loss_params={"lambda": 0.5},
        progress=False,
    )
    trainer.train()
    params = count_params(net)
    smallest = params.fixed + sum(min(row) for row in params.table.values())
    arch = trainer.export(budget={"params": smallest})
    choices = {label: d.index_of(arch[label]) for label, d in decisions(net).items()}
    plain = verified_fixed(net, choices, [(x[:2],)])
    assert sum(p.numel() for p in plain.parameters()) == smallest


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (
            lambda: resnet8_supernet(0),
            r"resnet8_supernet\(n_classes=0, width=16, in_channels=3\): numbers of at least 1",
        ),
        (lambda: dscnn_supernet(width=0), "width=0"),
        (lambda: mobilenet_v1_supernet(in_channels=0), "in_channels=0"),
        (lambda: mobilenet_v1_supernet(width_mult=0.03), "width_mult=0.03"),
        (lambda: mobilenet_v1_supernet(width_mult=float("inf")), "width_mult=inf"),
    ],
)
def test_sizes_that_cannot_work(build: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        build()
