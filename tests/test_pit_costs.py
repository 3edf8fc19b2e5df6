"""Costs of PIT networks, against hand counts of small networks and against counts of the exported network."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from pit_networks import COSTS, SimpleNN, ToyAdd, ToyAdd2D, half, plain_ops, plain_params, put, scatter, shapes
from torch import Tensor, nn

from oneshot.cost import MACS, CostSpec, LayerSpec
from oneshot.errors import ConfigurationError
from oneshot.mutables.masks import ChannelMask
from oneshot.pit import PIT


def costs(pit: PIT) -> tuple[float, float]:
    return pit.get_cost("params").item(), pit.get_cost("ops").item()


def alphas(pit: PIT) -> list[nn.Parameter]:
    return [mask.alpha for _, mask in pit.masks.items()]


NETWORKS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "ToyAdd": (ToyAdd, (3, 15)),
    "ToyAdd2D": (ToyAdd2D, (3, 15, 15)),
    "SimpleNN": (SimpleNN, (3, 40)),
}


@pytest.mark.parametrize(
    ("name", "full", "halved"),
    [
        # conv0, conv1: (3*3+1)*10; conv2: (10*5+1)*20; fc: 140*2+2 => 1502. Over 15 and 7 steps: 200*15 + 1020*7 + 282.
        # Half: (3*3+1)*5 twice, (5*5+1)*10, 70*2+2 => 502; 100*15 + 260*7 + 142 = 3462.
        ("ToyAdd", (1502, 10_422), (502, 3_462)),
        # (3*9+1)*10 twice, (10*25+1)*20, 980*2+2 => 7542; 560*225 + 5020*49 + 1962 = 373942.
        # Half: (3*9+1)*5 twice, (5*25+1)*10, 490*2+2 => 2522; 280*225 + 1260*49 + 982 = 125722.
        ("ToyAdd2D", (7542, 373_942), (2_522, 125_722)),
        # (3*3+1)*32, (32*5+1)*57, 570*3+3 => 11210; 320*40 + 9177*20 + 1713 = 198053.
        # Half: 16 and 29 channels: (3*3+1)*16, (16*5+1)*29, 290*3+3 => 3382; 160*40 + 2349*20 + 873 = 54253.
        ("SimpleNN", (11_210, 198_053), (3_382, 54_253)),
    ],
)
@pytest.mark.parametrize("discrete", [False, True])
def test_full_and_half_networks(name: str, full: tuple[int, int], halved: tuple[int, int], discrete: bool) -> None:
    build, shape = NETWORKS[name]
    pit = PIT(build(), shape, cost=COSTS, discrete_cost=discrete)
    assert costs(pit) == full
    assert [pit.soft_cost(n).item() for n in COSTS] == pytest.approx(full)
    half(pit)
    assert costs(pit) == halved
    small = pit.export()
    assert plain_params(small) == halved[0]
    assert plain_ops(small, torch.randn(1, *shape)) == halved[1]


def test_half_of_toy_add_has_these_weights() -> None:
    pit = PIT(ToyAdd(), (3, 15), cost=COSTS)
    half(pit)
    small = pit.export()
    assert shapes(small) == {"conv0": (5, 3, 3), "conv1": (5, 3, 3), "conv2": (10, 5, 5), "fc": (2, 70)}
    assert sum(p.numel() for p in small.parameters()) == 502
    pit = PIT(ToyAdd2D(), (3, 15, 15), cost=COSTS)
    half(pit)
    assert sum(p.numel() for p in pit.export().parameters()) == 2_522


def some_channels_of_toy_add() -> PIT:
    """5 of the 10 channels of conv0 and conv1, and the 2 newest taps of conv1: theta = .2, .8, 1.8."""
    pit = PIT(ToyAdd(), (3, 15), cost=COSTS)
    put(pit, "conv0", [0.7, 0.2, 0.6, 0.4, 0.9, 0.1, 0.3, 0.3, 0.95, 1])
    put(pit, "conv1.kernel_size", [0.2, 0.6, 0.7])
    return pit


def test_shared_channels_and_one_kernel() -> None:
    pit = some_channels_of_toy_add()
    assert pit.arch()["conv0"] == [0, 2, 4, 8, 9]
    assert pit.arch()["conv1.kernel_size"] == 2
    # (3*3+1)*5 + (3*2+1)*5 + (5*5+1)*20 + 282 = 50 + 35 + 520 + 282; 85*15 + 520*7 + 282
    assert costs(pit) == (887, 5_197)
    small = pit.export()
    assert list(shapes(small).values()) == [(5, 3, 3), (5, 3, 2), (20, 5, 5), (2, 140)]
    assert (plain_params(small), plain_ops(small, torch.randn(1, 3, 15))) == (887, 5_197)


def test_a_dilation_as_well() -> None:
    pit = some_channels_of_toy_add()
    put(pit, "conv2.dilation", [0.1, 0.9, 0.85])  # steps of 2 and 4 are left: taps 0, 2, 4
    assert pit.arch()["conv2.dilation"] == 2
    assert costs(pit)[0] == 687  # 50 + 35 + (5*3+1)*20 + 282
    small = pit.export()
    assert isinstance(small, ToyAdd)
    assert (small.conv2.kernel_size, small.conv2.dilation) == ((3,), (2,))
    assert plain_params(small) == 687


# ---- values and gradients ------------------------------------------------------------------------------------------


def test_soft_cost_follows_the_relaxed_sizes() -> None:
    """C channels of conv0 and conv1, M of conv2: params = 2*10*C + (5*C + 1)*M + 14*M + 2."""
    pit = PIT(ToyAdd(), (3, 15), cost=COSTS)
    put(pit, "conv0", [0.8] * 5 + [0.6] * 5)  # C = 7
    put(pit, "conv2", [0.9] * 20)  # M = 18
    assert pit.soft_cost("params").item() == pytest.approx(20 * 7 + 36 * 18 + 14 * 18 + 2)
    assert pit.get_cost("params").item() == 1502
    (gradient,) = torch.autograd.grad(pit.get_cost("params"), pit.masks["conv0"].alpha)
    assert gradient.tolist() == pytest.approx([20 + 5 * 18] * 10)  # d/dC


def test_the_gradient_of_a_discrete_cost_is_at_the_hard_sizes() -> None:
    pit = PIT(ToyAdd(), (3, 15), cost=COSTS)
    put(pit, "conv2", [0.9] * 20)
    relaxed = torch.autograd.grad(pit.get_cost("params"), pit.masks["conv0"].alpha)[0].tolist()
    pit.discrete_cost = True
    assert pit.get_cost("params").item() == 1502
    discrete = torch.autograd.grad(pit.get_cost("params"), pit.masks["conv0"].alpha)[0].tolist()
    assert relaxed == pytest.approx([20 + 5 * 18] * 10)
    assert discrete == pytest.approx([20 + 5 * 20] * 10)
    pit.discrete_cost = False
    again = torch.autograd.grad(pit.get_cost("params"), pit.masks["conv0"].alpha)[0].tolist()
    assert again == relaxed


def test_the_relaxed_gradient_is_the_slope_of_soft_cost() -> None:
    pit = PIT(SimpleNN(), (3, 40), cost=COSTS)
    scatter(pit, seed=3)
    pit.masks.double()
    for name in COSTS:
        got = torch.autograd.grad(pit.get_cost(name), alphas(pit), allow_unused=True)
        for alpha, gradient in zip(alphas(pit), got, strict=True):
            i = int(alpha.argmax())  # far from the threshold
            before, h = alpha[i].item(), 1e-5
            values = []
            for at in (before - h, before + h):
                with torch.no_grad():
                    alpha[i] = at
                values.append(pit.soft_cost(name).item())
            with torch.no_grad():
                alpha[i] = before
            slope = (values[1] - values[0]) / (2 * h)
            assert gradient is not None
            assert gradient[i].item() == pytest.approx(slope, rel=1e-5, abs=1e-4)


def test_costs_are_swapped_at_any_time() -> None:
    pit = some_channels_of_toy_add()
    pit.cost_specification = "ops"
    assert pit.cost_names == ["ops"]
    assert pit.cost.item() == 5_197
    pit.cost_specification = {"size": "params_no_norm"}
    assert pit.cost.item() == pit.get_cost("size").item() == 887
    pit.discrete_cost = True
    assert pit.cost.item() == 887
    pit.cost_specification = COSTS
    assert costs(pit) == (887, 5_197)
    with pytest.raises(ConfigurationError, match="size"):
        pit.get_cost("size")


def test_cost_alone_needs_a_single_cost() -> None:
    pit = PIT(ToyAdd(), (3, 15), cost=COSTS)
    with pytest.raises(ConfigurationError, match=r"params.*ops"):
        pit.cost
    assert PIT(ToyAdd(), (3, 15), cost="params_no_norm").cost.item() == 1502
    assert PIT(ToyAdd(), (3, 15)).cost.item() == 1502


@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("level", [0.51, 0.49, 0.05])
def test_reported_is_the_cost_of_the_export(name: str, level: float) -> None:
    build, shape = NETWORKS[name]
    pit = PIT(build(), shape, cost=COSTS)
    full = costs(pit)
    with torch.no_grad():
        for alpha in alphas(pit):
            alpha.fill_(level)
    small = pit.export()
    assert costs(pit) == (plain_params(small), plain_ops(small, torch.randn(1, *shape)))
    assert (costs(pit) == full) == (level > 0.5)


# ---- random layers, against torch's counter --------------------------------------------------------------------------


def random_network(rng: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    """A layer of any kind, a depthwise one where there are such, and one whose outputs are those of the network."""
    a, b, c = rng.randint(1, 5), rng.randint(2, 9), rng.randint(1, 4)
    bias = [rng.random() < 0.5 for _ in range(3)]
    if rng.random() < 0.3:
        return nn.Sequential(nn.Linear(a, b, bias[0]), nn.ReLU(), nn.Linear(b, c, bias[1])), (a,)
    dims = rng.choice([1, 2])
    conv: Any = nn.Conv1d if dims == 1 else nn.Conv2d
    k = [tuple(rng.randint(1, 5) for _ in range(dims)) for _ in range(3)]
    padding: list[Any] = [rng.choice([0, 1, 2]) for _ in range(3)]
    stride = [rng.choice([1, 1, 2]) for _ in range(3)]
    layers = [
        conv(a, b, k[0], stride[0], padding[0], bias=bias[0]),
        conv(b, b, k[1], stride[1], padding[1], groups=b, bias=bias[1]),
        conv(b, c, k[2], stride[2], padding[2], bias=bias[2]),
    ]
    return nn.Sequential(*layers), (a, *(rng.randint(24, 30) for _ in range(dims)))


@pytest.mark.parametrize("seed", range(12))
def test_random_layers(seed: int) -> None:
    net, shape = random_network(random.Random(seed))
    x = torch.randn(1, *shape)
    pit = PIT(net, shape, cost=COSTS)
    assert costs(pit) == (plain_params(net), plain_ops(net, x))
    scatter(pit, seed)
    small = pit.export()
    assert costs(pit) == (plain_params(small), plain_ops(small, x))


# ---- formulas of the user ------------------------------------------------------------------------------------------


def ceil(x: Any) -> Any:
    """Of numbers; of tensors with the gradient of x itself."""
    return x + (torch.ceil(x) - x).detach() if isinstance(x, Tensor) else math.ceil(x)


def gap8_convolution(layer: LayerSpec) -> Any:
    along, across = layer.output_size
    columns = layer.kernel[0] * layer.kernel[1] * layer.in_channels
    products = 5 + 14 * ceil(columns / 4) + 10
    return ceil(along / 2) * ceil(across / 8) * (2 * columns + ceil(layer.out_channels / 4) * products)


def gap8_linear(layer: LayerSpec) -> Any:
    return ceil(layer.in_channels / 2) * ceil(layer.out_channels / 4)


GAP8 = CostSpec("gap8", "cycle").with_rule(nn.Conv2d, gap8_convolution).with_rule(nn.Linear, gap8_linear)


def gap8_network() -> nn.Sequential:
    """Input (3, 8, 8)."""
    one, two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
    return nn.Sequential(one, nn.ReLU(), two, nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10))


def test_gap8() -> None:
    """4 * (2*27 + 2*(15 + 14*7)) + 4 * (2*72 + 4*(15 + 14*18)) + 512*3 = 1120 + 4848 + 1536."""
    pit = PIT(gap8_network(), (3, 8, 8), cost=GAP8)
    assert pit.cost.item() == 7_504
    assert pit.soft_cost("gap8").item() == pytest.approx(7_504)
    gradients = torch.autograd.grad(pit.cost, alphas(pit))
    assert all(bool(torch.isfinite(g).all()) and float(g.abs().sum()) > 0 for g in gradients)


def test_gap8_of_a_pruned_network() -> None:
    """5 and 9 channels, 3x3 and 1x1.

    4 * (2*27 + 2*(15 + 14*7)) + 4 * (2*5 + 3*(15 + 14*2)) + ceil(9*64/2)*3 = 1120 + 556 + 864.
    """
    pit = PIT(gap8_network(), (3, 8, 8), cost=GAP8)
    pit.masks["0"].keep([0, 1, 2, 5, 6])
    pit.masks["2"].keep([*range(8), 15])
    pit.masks["2.kernel_size"].decide(1)
    assert pit.cost.item() == 1120 + 556 + 864
    gradients = torch.autograd.grad(pit.cost, alphas(pit))
    assert all(bool(torch.isfinite(g).all()) for g in gradients)


@pytest.mark.parametrize(("units", "block"), [(9, 4), (9, 2), (5, 4), (17, 8), (10, 3)])
def test_a_formula_with_steps_is_exact_at_every_size(units: int, block: int) -> None:
    """Blocks of outputs and of inputs. Of 9 in blocks of 4 there are 1, 2 and 3 at 1, 5 and 9, yet it is no line."""
    spec = CostSpec("blocks", "block").with_rule(
        nn.Linear, lambda layer: ceil(layer.in_channels / block) + 7 * ceil(layer.out_channels / block)
    )
    pit = PIT(nn.Sequential(nn.Linear(4, units), nn.ReLU(), nn.Linear(units, 2)), (4,), cost=spec)
    mask: ChannelMask = pit.masks["0"]
    for n in range(1, units + 1):
        mask.keep(range(n))
        blocks = math.ceil(n / block)
        expected = math.ceil(4 / block) + 7 * blocks + blocks + 7 * math.ceil(2 / block)
        assert pit.cost.item() == pytest.approx(expected)


def test_a_square_is_no_straight_line() -> None:
    spec = CostSpec("squares", "1").with_rule(nn.Linear, lambda layer: layer.out_channels**2 + layer.in_channels)
    pit = PIT(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), (4,), cost=spec)
    for n in range(1, 7):
        pit.masks["0"].keep(range(n))
        assert pit.cost.item() == pytest.approx(n * n + 4 + 4 + n)


def test_reachable_costs_of_toy_add() -> None:
    """One channel everywhere, one tap: (3+1)*2 + (1+1) + 7*2+2 = 26."""
    pit = PIT(ToyAdd(), (3, 15), cost=COSTS)
    assert pit.reachable_costs()["params"] == (26, 1502)
    assert pit.reachable_costs()["ops"] == (8 * 15 + 2 * 7 + 16, 10_422)


def test_macs_have_no_bias() -> None:
    pit = PIT(ToyAdd(), (3, 15), cost=[MACS, "params_no_bias"])
    assert pit.get_cost("macs").item() == 180 * 15 + 1000 * 7 + 280
    assert pit.get_cost("params_no_bias").item() == 180 + 1000 + 280


def test_costs_of_large_networks_are_summed_in_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the sizes of the axes in between: values and gradients are the same."""
    found = []
    for most in (10**6, 0):
        monkeypatch.setattr("oneshot.pit.masked_cost.MOST_ELEMENTS", most)
        torch.manual_seed(0)
        pit = PIT(ToyAdd(), (3, 15), cost=["params", "ops"])
        with torch.no_grad():
            for _, mask in pit.masks.items():
                mask.alpha.uniform_(0.2, 1)
        costs = pit.costs()
        (costs["params"] + 2 * costs["ops"]).backward()
        found.append([*(cost.detach() for cost in costs.values()), *(alpha.grad for alpha in pit.nas_parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0.0)
