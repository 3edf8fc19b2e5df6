"""Shares of exact zeros, against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from oneshot.errors import ConfigurationError, InputTypeError
from oneshot.mutables import LayerChoice
from oneshot.regularizers.sparsity import sparsity


def test_a_small_matrix() -> None:
    net = nn.Linear(3, 4, bias=False)
    net.weight.data = torch.tensor([[0.0, 0, 0], [1, 4, 0], [1, 2, 0], [0, 0, 0]])
    row = sparsity(net)["weight"]
    assert (row.elements, row.rows, row.columns) == (8 / 12, 0.5, pytest.approx(1 / 3))
    assert (row.kernels, row.output_channels, row.input_channels) == (None, None, None)


def test_a_small_convolution() -> None:
    net = nn.Conv2d(3, 4, 2, bias=False)
    net.weight.data = torch.zeros(4, 3, 2, 2)
    net.weight.data[0] = 1.0
    net.weight.data[1, 0] = 1.0
    row = sparsity(net)["weight"]  # 16 of 48 elements and 4 of 12 kernels are left, filters 0 and 1, every channel
    assert row.elements == pytest.approx(2 / 3)
    assert row.kernels == pytest.approx(2 / 3)
    assert (row.output_channels, row.input_channels, row.rows, row.columns) == (0.5, 0.0, None, None)


def test_totals_are_of_what_has_them() -> None:
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ConvTranspose1d(4, 2, 3), nn.Linear(5, 10))
    for p in net.parameters():
        p.data.fill_(1.0)
    net[0].weight.data[:3] = 0.0  # 3 of 4 output channels, 18 elements, 6 kernels
    net[2].weight.data[:, 1] = 0.0  # 1 of 2 output channels, 12 elements, 4 kernels
    net[3].bias.data.zero_()  # 10 elements
    report = sparsity(net)
    assert [row.name for row in report.rows] == [name for name, _ in net.named_parameters()]
    total = report.total
    assert total.elements == 40 / sum(p.numel() for p in net.parameters())
    assert total.output_channels == 4 / 6
    assert total.input_channels == 0 / 6
    assert total.kernels == 10 / 16
    assert (total.rows, total.columns) == (0.0, 0.0)
    assert report["3.bias"].elements == 1.0
    assert report["3.bias"].rows is None
    with pytest.raises(ConfigurationError, match=r"no parameter '3'; there are 0.weight"):
        report["3"]


def test_channels_of_grouped_convolutions() -> None:
    net = nn.Conv2d(4, 4, 3, groups=4, bias=False)
    net.weight.data.fill_(1.0)
    net.weight.data[1] = 0.0
    row = sparsity(net)["weight"]
    assert (row.kernels, row.output_channels, row.input_channels) == (0.25, 0.25, 0.25)


def test_a_table() -> None:
    net = nn.Linear(2, 2)
    net.weight.data = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    net.bias.data = torch.tensor([1.0, 2.0])
    assert str(sparsity(net)).splitlines() == [
        "parameter  shape  elements  kernels  output channels  input channels   rows  columns",
        "weight     2 x 2     75.0%        -                -               -  50.0%    50.0%",
        "bias       2          0.0%        -                -               -      -        -",
        "total      -         50.0%        -                -               -  50.0%    50.0%",
    ]


def test_shared_parameters_once_alphas_never_and_computed_weights_by_their_parameters() -> None:
    tied = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    tied[1].weight = tied[0].weight
    assert [row.name for row in sparsity(tied).rows] == ["0.weight"]
    choice = LayerChoice([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)], label="choice")
    assert [row.shape for row in sparsity(choice).rows] == [(2, 2), (2, 2)]
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    assert sparsity(normed).total.rows is None


def test_models_without_weights() -> None:
    with pytest.raises(ConfigurationError, match="has no weights"):
        sparsity(nn.ReLU())
    with pytest.raises(InputTypeError, match="is needed"):
        sparsity(None)  # type: ignore[arg-type]
