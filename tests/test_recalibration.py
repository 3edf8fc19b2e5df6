"""Recomputed BatchNorm statistics against sums written out by hand, and what must not change on the way."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from oneshot import LayerChoice, UniformPath, draw, set_sampler
from oneshot.errors import ConfigurationError
from oneshot.trainers.evaluator import pinned
from oneshot.trainers.recalibration import recalibrate_, recalibrated, statistics_kept

EVEN, UNEVEN = (6, 6, 6), (8, 3, 5)


def batches(sizes: Sequence[int], *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, *shape, generator=generator).double() * (i + 1) + i for i, n in enumerate(sizes)]


def by_hand(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Weighted by samples: mean, and unbiased variance of each batch, over all dimensions but that of channels."""
    total = sum(len(x) for x in inputs)
    mean = sum(len(x) / total * x.transpose(0, 1).flatten(1).mean(1) for x in inputs)
    var = sum(len(x) / total * x.transpose(0, 1).flatten(1).var(1, correction=1) for x in inputs)
    return mean, var


@pytest.mark.parametrize("sizes", [EVEN, UNEVEN])
@pytest.mark.parametrize("momentum", [0.1, None, 0.0])
def test_statistics_of_one_layer(sizes: tuple[int, ...], momentum: float | None) -> None:
    """With momentum=None torch would weigh every batch alike, and go on from what it had seen before."""
    norm = nn.BatchNorm2d(3, momentum=momentum).double()
    norm(torch.randn(4, 3, 2, 2).double())
    inputs = batches(sizes, 3, 4, 4)
    recalibrate_(norm, inputs)
    mean, var = by_hand(inputs)
    assert torch.allclose(norm.running_mean, mean, rtol=1e-12)
    assert torch.allclose(norm.running_var, var, rtol=1e-12)
    # Weighted by samples, the mean of the means is the mean of everything.
    everything = torch.cat(inputs)
    assert torch.allclose(norm.running_mean, everything.mean((0, 2, 3)), rtol=1e-12)
    assert int(norm.num_batches_tracked) == len(sizes)
    assert norm.momentum == momentum
    assert norm.training


def test_one_batch_gives_what_torch_keeps_of_it() -> None:
    x = batches((16,), 3, 4, 4)[0]
    ours, torchs = nn.BatchNorm2d(3).double(), nn.BatchNorm2d(3, momentum=None).double()
    recalibrate_(ours, [x])
    torchs(x)
    assert torch.allclose(ours.running_mean, torchs.running_mean, rtol=1e-12)
    assert torch.allclose(ours.running_var, torchs.running_var, rtol=1e-12)


def test_a_later_layer_is_measured_behind_batch_statistics_without_dropout() -> None:
    """By hand: every batch goes through the first layer with the statistics of that batch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.9), nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, 2.0, -1.0]))
    inputs = batches(UNEVEN, 3)
    recalibrate_(net, inputs)
    normalised = [(x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() * net[0].weight for x in inputs]
    mean, var = by_hand([x @ net[2].weight.T + net[2].bias for x in normalised])
    assert torch.allclose(net[3].running_mean, mean, atol=1e-10)
    assert torch.allclose(net[3].running_var, var, atol=1e-10)


def test_what_was_spoilt_before_does_not_last() -> None:
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(float("nan"))
    norm.running_var.fill_(float("inf"))
    recalibrate_(norm, [torch.tensor([[1.0, 0.0], [3.0, 4.0]])])
    assert norm.running_mean.tolist() == [2.0, 2.0]
    assert norm.running_var.tolist() == [2.0, 8.0]  # (1 + 1) / 1 and (4 + 4) / 1


def test_a_layer_that_runs_twice_averages_both_runs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm(10 * x)

    net, inputs = Twice(), batches(UNEVEN, 2)
    recalibrate_(net, inputs)
    mean, var = by_hand([*inputs, *(10 * x for x in inputs)])
    assert torch.allclose(net.norm.running_mean, mean)
    assert torch.allclose(net.norm.running_var, var)
    assert int(net.norm.num_batches_tracked) == 6


def test_instance_norm_with_running_statistics() -> None:
    """Its batch statistics are the averages over the instances, each over its own pixels."""
    norm = nn.InstanceNorm2d(3, track_running_stats=True, affine=True).double()
    inputs = batches(UNEVEN, 3, 4, 4)
    recalibrate_(norm, inputs)
    everything = torch.cat(inputs).flatten(2)
    assert torch.allclose(norm.running_mean, everything.mean(2).mean(0))
    assert torch.allclose(norm.running_var, everything.var(2, correction=1).mean(0))


def supernet() -> nn.Module:
    torch.manual_seed(0)
    candidates = [nn.Sequential(nn.Conv2d(3, 3, k, padding=k // 2), nn.BatchNorm2d(3)) for k in (1, 3, 5)]
    net = nn.Sequential(LayerChoice(candidates, label="a"), nn.Dropout(0.5), nn.BatchNorm2d(3, momentum=None))
    set_sampler(net, UniformPath())
    for i in range(4):
        draw(net, torch.Generator().manual_seed(i))
        net(torch.randn(4, 3, 6, 6))
    return net


def snapshot(net: nn.Module) -> tuple[dict[str, Tensor], list[bool], list[object], int]:
    momenta = [getattr(m, "momentum", "none") for m in net.modules()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())
    return copy.deepcopy(net.state_dict()), [m.training for m in net.modules()], momenta, hooks


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    return {name for name in one if torch.equal(one[name], other[name])}


def test_what_is_off_the_path_keeps_its_statistics_and_no_weight_moves() -> None:
    net = supernet()
    before, modes, momenta, hooks = snapshot(net)
    with pinned(net, {"a": 1}):
        recalibrate_(net, [torch.randn(8, 3, 6, 6), torch.randn(4, 3, 6, 6)])
    after, *rest = snapshot(net)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    expected = {f"{norm}.{name}" for norm in ("0.candidates.1.1", "2") for name in statistics}
    assert set(before) - equal(before, after) <= expected
    assert set(before) - equal(before, after) >= {n for n in expected if not n.endswith("tracked")}
    assert rest == [modes, momenta, hooks]
    assert all(p.grad is None for p in net.parameters())


def test_the_supernet_is_afterwards_as_it_was() -> None:
    net = supernet()
    before, *rest = snapshot(net)
    drawn = net[0].drawn
    with pinned(net, {"a": 2}), recalibrated(net, [torch.randn(8, 3, 6, 6)]):
        assert equal(before, net.state_dict()) != set(before)
    after, *rest_after = snapshot(net)
    assert equal(before, after) == set(before)
    assert rest == rest_after
    assert net[0].drawn == drawn


def test_a_batch_that_fails_changes_nothing() -> None:
    net = supernet()
    before, *rest = snapshot(net)
    with pinned(net, {"a": 0}), pytest.raises(RuntimeError):
        recalibrate_(net, [torch.randn(8, 3, 6, 6), torch.randn(8, 4, 6, 6)])
    after, *rest_after = snapshot(net)
    assert equal(before, after) == set(before)
    assert rest == rest_after


def test_statistics_are_kept_through_an_error() -> None:
    norm = nn.BatchNorm1d(2)
    net = nn.Sequential(norm, nn.Linear(3, 1))
    with pytest.raises(RuntimeError), statistics_kept(net):
        net(torch.randn(4, 2))
    assert norm.running_mean.tolist() == [0.0, 0.0]
    assert int(norm.num_batches_tracked) == 0


def test_layers_without_running_statistics_are_left_alone() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), nn.GroupNorm(1, 2), nn.Linear(2, 2))
    before = copy.deepcopy(net.state_dict())
    recalibrate_(net, [torch.randn(4, 2)])
    assert equal(before, net.state_dict()) == set(before)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [([], "no batches"), ([torch.randn(1, 2)], r"shape \(1, 2\), a single value per channel")],
)
def test_batches_that_have_no_statistics(inputs: list[Tensor], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        recalibrate_(nn.BatchNorm1d(2), inputs)
