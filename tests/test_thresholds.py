"""Hard thresholds, and zeros that are held."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oneshot.errors import ConfigurationError, InputTypeError
from oneshot.regularizers.thresholds import Zeroed, hold_zeros, threshold_
from oneshot.regularizers.weights import L1


def linear(values: Tensor) -> nn.Linear:
    layer = nn.Linear(values.shape[1], values.shape[0], bias=False)
    layer.weight.data = values.clone()
    return layer


FILTERS = torch.tensor([[0.5, 0.1, 0.1, 0.1], [0.2, 0.2, 0.2, 0.2]]).view(2, 1, 2, 2)  # max 0.5, 0.2; mean 0.2, 0.2


@pytest.mark.parametrize(
    ("criterion", "level", "zero"),
    [
        ("Max", 0.2, (1,)),
        ("Mean_Abs", 0.25, (0, 1)),
        ("Max", 0.19, ()),
        ("Mean_Abs", 0.19, ()),
        ("L1", 0.9, (0, 1)),
        ("L1", 0.7, ()),
        ("L2", 0.45, (1,)),  # norms sqrt(0.28) = 0.53 and 0.4
        ("Max", 0.0, ()),
    ],
)
def test_a_group_is_kept_if_its_norm_is_greater_than_the_level(
    criterion: Any, level: float, zero: tuple[int, ...]
) -> None:
    net = nn.Conv2d(1, 2, 2, bias=False)
    net.weight.data = -FILTERS.clone()
    assert threshold_(net, "output_channels", level, criterion) == [Zeroed("weight: output channels", zero, 2)]
    for f in range(2):
        assert torch.equal(net.weight[f], torch.zeros(1, 2, 2) if f in zero else -FILTERS[f])


def test_equal_to_the_level_is_not_kept() -> None:
    net = nn.Conv2d(1, 2, 2, bias=False)
    net.weight.data = torch.full((2, 1, 2, 2), 0.25)
    for criterion, level in (("Max", 0.25), ("Mean_Abs", 0.25), ("L1", 1.0), ("L2", 0.5)):
        net.weight.data.fill_(0.25)
        below = math.nextafter(level, 0) - 1e-6
        assert threshold_(net, "output_channels", below, criterion)[0].zero == ()  # type: ignore[arg-type]
        assert threshold_(net, "output_channels", level, criterion)[0].zero == (0, 1)  # type: ignore[arg-type]
        assert not net.weight.any()


def test_rows_and_columns_of_a_small_matrix() -> None:
    matrix = torch.arange(1.0, 13.0).view(4, 3)
    assert threshold_(linear(matrix), "rows", 7)[0].zero == (0, 1)
    net = linear(matrix)
    assert threshold_(net, "columns", 11)[0].zero == (0, 1)
    assert net.weight.tolist() == [[0, 0, 3], [0, 0, 6], [0, 0, 9], [0, 0, 12]]


def test_nan_is_not_hidden() -> None:
    net = linear(torch.tensor([[0.1, float("nan")], [0.1, 0.1]]))
    assert threshold_(net, "rows", 1.0)[0].zero == (1,)
    assert net.weight[0, 1].isnan()


def test_patterns_choose_the_layers() -> None:
    net = nn.Sequential(linear(torch.ones(2, 2)), linear(torch.ones(2, 2)))
    (found,) = threshold_(net, "rows", 1.0, patterns="1")
    assert found == Zeroed("1.weight: rows", (0, 1), 2)
    assert net[0].weight.all()
    with pytest.raises(ConfigurationError, match="fits nothing"):
        threshold_(net, "rows", 1.0, patterns="2")
    with pytest.raises(ConfigurationError, match="criterion='Var'"):
        threshold_(net, "rows", 1.0, "Var")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="level"):
        threshold_(net, "rows", -1.0)


def test_momentum_moves_a_zero_unless_it_is_held() -> None:
    for holds in (False, True):
        net = linear(torch.tensor([[1.0, 1.0]]))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        net.weight.grad = torch.ones(1, 2)
        optimizer.step()
        with torch.no_grad():
            net.weight[0, 0] = 0.0
        held = hold_zeros(net, optimizer) if holds else None
        net.weight.grad.zero_()
        optimizer.step()  # 0 - 0.1 * 0.9, and 0.9 - 0.1 * 0.9
        assert net.weight.flatten().tolist() == pytest.approx([0.0 if holds else -0.09, 0.81])
        if held is not None:
            assert held.n == {"weight": 1}
            assert net.weight[0, 0] == 0


def test_dense_sparse_dense() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    x = torch.randn(16, 4)

    def train() -> None:
        for _ in range(5):
            optimizer.zero_grad()
            (net(x) - 1).square().mean().backward()
            optimizer.step()

    train()
    threshold_(net, "elements", float(net[0].weight.detach().abs().median()), patterns="0")
    zero = net[0].weight == 0
    assert int(zero.sum()) == 16
    with hold_zeros(net, optimizer, "0") as held:
        train()
        assert held.n == {"0.weight": 16}
        assert torch.equal(net[0].weight == 0, zero)
    train()
    assert not (net[0].weight == 0).all()
    assert int((net[0].weight == 0).sum()) < 16


def test_held_zeros_and_a_penalty_together() -> None:
    net = linear(torch.tensor([[0.0, 0.05, 1.0]]))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.5)
    penalty = L1("*", 0.05)
    penalty.attach(net, optimizer)
    hold_zeros(net, optimizer)
    net.weight.grad = torch.full((1, 3), -0.01)
    penalty(net)
    optimizer.step()  # + 0.01, then 0.05 / (1 - 0.5) less
    assert net.weight.flatten().tolist() == pytest.approx([0.0, 0.0, 0.91])


def test_zeros_that_cannot_be_held() -> None:
    net = linear(torch.ones(2, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match="no chosen weight is zero"):
        hold_zeros(net, optimizer)
    net.weight.data[0] = 0.0
    with pytest.raises(ConfigurationError, match="holds none of weight"):
        hold_zeros(net, torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    with pytest.raises(ConfigurationError, match="fits nothing"):
        hold_zeros(net, optimizer, "bias")
    with pytest.raises(InputTypeError, match="Optimizer is needed"):
        hold_zeros(net, None)  # type: ignore[arg-type]
