"""PIT as its paper and PLiNIO have it: sharing, exclusion, modes, descent of the cost, and networks beyond PLiNIO's.

Where PLiNIO cannot follow an operator and gives up, PIT freezes what is around it and says why.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from models import randomize
from pit_networks import (
    COSTS,
    Cat,
    CatDepthwise,
    MultiPath,
    SimpleNN,
    TCResNet14,
    ToyAdd,
    export_equal,
    half,
    plain_params,
    put,
    same,
    scatter,
    shapes,
)
from torch import Tensor, nn
from torch.nn import functional as F

from oneshot.errors import ConfigurationError, InputTypeError, UnsupportedModelError
from oneshot.graph.dimensions import Dimension
from oneshot.mutables.masks import ChannelMask, DilationMask, KernelMask
from oneshot.pit import PIT


def wide(*shape: int) -> Tensor:
    return torch.randn(3, *shape, dtype=torch.float64)


# ---- the masked network is the network -------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("build", "shape"), [(ToyAdd, (3, 15)), (SimpleNN, (3, 40)), (TCResNet14, (40, 32))])
def test_nothing_masked_changes_nothing(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    net = randomize(build(), seed=0).eval()
    pit = PIT(net, shape)
    for _ in range(10):
        x = torch.randn(2, *shape)
        same(net(x), pit(x), 1e-6)


def test_every_tc_resnet_block_shares_with_its_shortcut() -> None:
    """Widths 16, 24, 24, 32, 32, 48, 48: where the width stays, the identity ties a block to the one before."""
    pit = PIT(TCResNet14(), (40, 32))
    channels = {label: len(mask.alpha) for label, mask in pit.masks.items() if isinstance(mask, ChannelMask)}
    inner = {f"blocks.{i}.conv1": width for i, width in enumerate([24, 24, 32, 32, 48, 48])}
    assert channels == {"stem": 16, **inner, "blocks.0.conv2": 24, "blocks.2.conv2": 32, "blocks.4.conv2": 48}
    kernels = [label for label, mask in pit.masks.items() if isinstance(mask, KernelMask)]
    unstrided = [f"blocks.{i}.conv{j}" for i in range(6) for j in (1, 2) if (i, j) not in ((0, 1), (2, 1), (4, 1))]
    assert kernels == [f"{path}.kernel_size" for path in ["stem", *unstrided]]


# ---- what shares a mask ----------------------------------------------------------------------------------------------


def test_added_convolutions_have_one_mask() -> None:
    pit = PIT(ToyAdd().double(), (3, 15))
    assert {label for label, mask in pit.masks.items() if isinstance(mask, ChannelMask)} == {"conv0", "conv2"}
    put(pit, "conv0", [1, 0] * 5)
    for _ in range(2):
        small = export_equal(pit, wide(3, 15))
        assert shapes(small)["conv0"] == shapes(small)["conv1"] == (5, 3, 3)
    assert torch.equal(small.get_parameter("conv1.weight"), pit.network.get_parameter("conv1.weight")[::2])
    assert Dimension("fc.weight", 0) in pit.space.frozen


def test_concat_is_as_wide_as_what_is_alive() -> None:
    """Half: 5 of 10 and 8 of 15 are alive, 32 are the output: (3*3+1)*(5+8) + (13*3+1)*32 = 1410."""
    pit = PIT(Cat().double(), (3, 24), cost="params_no_norm")
    half(pit)
    small = export_equal(pit, wide(3, 24))
    assert shapes(small) == {"conv0": (5, 3, 3), "conv1": (8, 3, 3), "conv2": (32, 13, 3)}
    assert pit.cost.item() == plain_params(small) == 1_410


def test_the_last_channel_of_each_side_of_a_concat_stays() -> None:
    pit = PIT(Cat().double(), (3, 24))
    put(pit, "conv0", [0.3] * 10)
    put(pit, "conv1", [0.1] * 15)
    small = export_equal(pit, wide(3, 24))
    assert shapes(small) == {"conv0": (1, 3, 3), "conv1": (1, 3, 3), "conv2": (32, 2, 3)}
    assert torch.equal(small.get_parameter("conv1.weight"), pit.network.get_parameter("conv1.weight")[14:])


def test_concat_into_a_depthwise_convolution() -> None:
    """Full: 2*8*(16*3+1) + 16*(5+1) + 8*(16+1) = 1016; half: 2*4*49 + 8*6 + 8*9 = 512; 8 outputs stay."""
    pit = PIT(CatDepthwise().double(), (16, 20), cost="params_no_norm")
    assert pit.cost.item() == 1_016
    half(pit)
    small = export_equal(pit, wide(16, 20))
    assert shapes(small) == {"conv0": (4, 16, 3), "conv1": (4, 16, 3), "depthwise": (8, 1, 5), "pointwise": (8, 8, 1)}
    assert small.get_submodule("depthwise").groups == 8
    assert pit.cost.item() == plain_params(small) == 512


# ---- which masks learn -----------------------------------------------------------------------------------------------


def learning(pit: PIT) -> set[type]:
    return {type(mask) for _, mask in pit.masks.items() if mask.alpha.requires_grad}


def test_flags_hold_whatever_is_trained() -> None:
    pit = PIT(ToyAdd(), (3, 15), train_features=False)
    assert learning(pit) == {KernelMask, DilationMask}
    pit.train_net_only()
    assert learning(pit) == set()
    assert all(p.requires_grad for p in pit.net_parameters())
    pit.train_nas_only()
    assert learning(pit) == {KernelMask, DilationMask}
    assert not any(p.requires_grad for p in pit.net_parameters())
    pit.train_net_and_nas()
    assert learning(pit) == {KernelMask, DilationMask}
    pit.train_features, pit.train_rf = True, False
    assert learning(pit) == {ChannelMask, DilationMask}


def descend(pit: PIT, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    costs = []
    for _ in range(count):
        optimizer.zero_grad()
        cost = pit.cost
        costs.append(cost.item())
        cost.backward()
        optimizer.step()
        pit.masks.clip_()
    return [*costs, pit.cost.item()]


@pytest.mark.parametrize(
    ("flag", "channels", "kernels", "dilations"),
    [
        ("train_features", (10, 20), [1, 1, 1], [2, 2, 4]),
        ("train_rf", (1, 1), [2, 2, 2], [2, 2, 4]),
        ("train_dilation", (1, 1), [1, 1, 1], [1, 1, 1]),
    ],
)
@pytest.mark.parametrize("discrete", [False, True])
def test_cost_alone_leaves_the_smallest_network(
    flag: str, channels: tuple[int, int], kernels: list[int], dilations: list[int], discrete: bool
) -> None:
    """The end of 6000 steps of 1e-3 is that of 30 steps of 0.1: every alpha that learns is at 0."""
    pit = PIT(ToyAdd(), (3, 15), cost="params_no_norm", discrete_cost=discrete)
    setattr(pit, flag, False)
    fixed = {label: m.alpha.detach().clone() for label, m in pit.masks.items() if not m.alpha.requires_grad}
    learn = [p for p in pit.nas_parameters() if p.requires_grad]
    descend(pit, torch.optim.Adam(learn, lr=0.1), 30)
    assert fixed
    assert all(torch.equal(pit.masks[label].alpha, alpha) for label, alpha in fixed.items())
    arch = pit.arch()
    assert (len(arch["conv0"]), len(arch["conv2"])) == channels
    small: Any = pit.export()
    convs = [
        next(m for m in top.modules() if isinstance(m, nn.Conv1d)) for top in (small.conv0, small.conv1, small.conv2)
    ]
    assert [conv.kernel_size[0] for conv in convs] == kernels
    assert [arch[f"conv{i}.dilation"] for i in range(3)] == dilations
    assert all(c.dilation == (d,) for c, k, d in zip(convs, kernels, dilations, strict=True) if k > 1)


def test_cost_alone_never_rises_and_moves_no_weight() -> None:
    pit = PIT(ToyAdd(), (3, 15), cost="params_no_norm")
    weights = {name: p.detach().clone() for name, p in pit.named_net_parameters()}
    adam = torch.optim.Adam([{"params": pit.nas_parameters()}, {"params": pit.net_parameters()}], lr=0.1)
    costs = descend(pit, adam, 10)
    assert all(after <= before for before, after in pairwise(costs))
    assert costs[-1] < costs[0] == 1502
    descend(pit, torch.optim.SGD(list(pit.nas_parameters()), lr=0.1), 30)
    arch = pit.arch()
    assert (len(arch["conv0"]), len(arch["conv2"])) == (1, 1)
    assert [arch[f"conv{i}.kernel_size"] for i in range(3)] == [1, 1, 1]
    assert pit.cost.item() == 26  # (3+1)*2 + (1+1) + 7*2+2
    assert all(torch.equal(p, weights[name]) for name, p in pit.named_net_parameters())


def with_factors(net: ToyAdd, channels: Tensor, maps: Tensor, taps: Tensor) -> ToyAdd:
    """ToyAdd with a factor on each channel that conv2 reads, on each map that fc reads, on each tap of conv2."""
    copied = copy.deepcopy(net)
    with torch.no_grad():
        copied.conv2.weight *= channels[:, None] * taps
        copied.fc.weight *= maps.repeat_interleave(7)
    return copied


def test_the_task_moves_a_mask_as_it_would_a_factor() -> None:
    """d loss / d |alpha| = d loss / d factor at the factors 0 and 1, by differences; a beta is in all later taps."""
    net = randomize(ToyAdd().double(), seed=0)
    assert isinstance(net, ToyAdd)
    pit, x = PIT(net, (3, 15)), wide(3, 15)
    pit.masks.double()
    put(pit, "conv0", [1, 0.8, 0.2, 1, 0, 0.9, 1, 0.4, 1, 1])
    put(pit, "conv2", [0.7, 0] * 10)
    put(pit, "conv2.kernel_size", [0.2, 0.1, 0.9, 0.3, 1])
    factors = [pit.masks["conv0"].hard(), pit.masks["conv2"].hard(), pit.masks["conv2.kernel_size"].hard()]
    factors = [factor.detach() for factor in factors]
    same(pit(x).detach(), with_factors(net, *factors)(x).detach(), 1e-12)
    pit(x).square().sum().backward()
    slopes: list[list[float]] = []
    for i, factor in enumerate(factors):
        slopes.append([])
        for j in range(len(factor)):
            losses = []
            for h in (1e-5, -1e-5):
                moved = [f.clone() for f in factors]
                moved[i][j] += h
                losses.append(with_factors(net, *moved)(x).square().sum().item())
            slopes[i].append((losses[0] - losses[1]) / 2e-5)
    assert pit.masks["conv0"].alpha.grad.tolist() == pytest.approx(slopes[0], rel=1e-5, abs=1e-6)
    assert pit.masks["conv2"].alpha.grad.tolist() == pytest.approx(slopes[1], rel=1e-5, abs=1e-6)
    of_betas = [sum(slopes[2][i:]) for i in range(4)] + [0.0]
    assert pit.masks["conv2.kernel_size"].alpha.grad.tolist() == pytest.approx(of_betas, rel=1e-5, abs=1e-6)


def test_loss_and_costs_may_be_differentiated_one_by_one() -> None:
    x = torch.randn(4, 3, 15)
    gradients = []
    for together in (True, False):
        torch.manual_seed(1)
        pit = PIT(ToyAdd(), (3, 15), cost=COSTS)
        put(pit, "conv0", [0.9, 0.2] * 5)
        costs = pit.costs()
        parts = [pit(x).square().mean(), 1e-3 * costs["params"], 1e-4 * costs["ops"]]
        for part in [torch.stack([p.double() for p in parts]).sum()] if together else parts:
            part.backward()
        gradients.append([p.grad for p in (*pit.nas_parameters(), *pit.net_parameters())])
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


# ---- wrong usage -----------------------------------------------------------------------------------------------------


def test_one_of_shape_and_example_is_needed() -> None:
    with pytest.raises(ConfigurationError, match="input_shape"):
        PIT(ToyAdd())
    with pytest.raises(InputTypeError, match="list"):
        PIT(ToyAdd(), [3, 15])  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="example_input is taken"):
        pit = PIT(ToyAdd(), (3, 99), example_input=torch.randn(1, 3, 15))
    assert pit(torch.randn(2, 3, 15)).shape == (2, 2)


def test_unknown_exclusions_and_costs_are_errors() -> None:
    with pytest.raises(ConfigurationError, match="conv7"):
        PIT(ToyAdd(), (3, 15), exclude=["conv7"])
    with pytest.raises(ConfigurationError, match="energy"):
        PIT(ToyAdd(), (3, 15), cost="energy")


class AlongChannels(nn.Module):
    """Input (3, 16): conv1 meets ``operator``, which works along its channels; conv0 does not."""

    def __init__(self, operator: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.operator = operator
        self.conv0, self.conv1, self.conv2 = nn.Conv1d(3, 6, 3), nn.Conv1d(6, 8, 3), nn.Conv1d(width, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(torch.tanh(self.operator(self.conv1(torch.relu(self.conv0(x))))))


@pytest.mark.parametrize(
    ("operator", "width"),
    [(lambda x: x.mean(1, keepdim=True), 1), (lambda x: torch.softmax(x, 1), 8), (lambda x: x.cumsum(1), 8)],
    ids=["mean", "softmax", "cumsum"],
)
def test_what_works_along_channels_freezes_them(operator: Callable[[Tensor], Tensor], width: int) -> None:
    pit = PIT(AlongChannels(operator, width).double(), (3, 16), train_rf=False, train_dilation=False)
    assert [label for label, mask in pit.masks.items() if isinstance(mask, ChannelMask)] == ["conv0"]
    reason = pit.space.frozen[Dimension("conv1.weight", 0)]
    assert isinstance(reason, str)
    assert len(reason) > 5
    pit.masks["conv0"].keep([1, 4])
    assert shapes(export_equal(pit, wide(3, 16))) == {"conv0": (2, 3, 3), "conv1": (8, 2, 3), "conv2": (4, width, 3)}


@pytest.mark.parametrize(
    ("operator", "width", "left"),
    [(lambda x: F.pad(x, (0, 0, 1, 1)), 10, 5), (lambda x: x.flip(1), 8, 3)],
    ids=["pad", "flip"],
)
def test_padded_and_reversed_channels_are_followed(operator: Callable[[Tensor], Tensor], width: int, left: int) -> None:
    """The two channels of zeros stay, whatever of the 8 between them goes."""
    pit = PIT(AlongChannels(operator, width).double(), (3, 16))
    pit.masks["conv1"].keep([0, 3, 4])
    assert shapes(export_equal(pit, wide(3, 16)))["conv2"] == (4, left, 3)


def test_a_network_without_anything_to_search_is_an_error() -> None:
    with pytest.raises(UnsupportedModelError, match="nothing to search"):
        PIT(nn.Sequential(nn.Linear(3, 2)), (3,))


# ---- the user's model ------------------------------------------------------------------------------------------------


def test_the_users_model_is_left_alone() -> None:
    net = SimpleNN()
    net.train()
    net.bn0.eval()
    net.fc.weight.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    pit = PIT(net, (3, 40))
    assert pit.training
    assert not pit.network.get_submodule("bn0").training
    optimizer = torch.optim.SGD(pit.parameters(), lr=0.1)
    (pit(torch.randn(4, 3, 40)).square().mean() + 1e-3 * pit.cost).backward()
    optimizer.step()
    pit.eval()
    half(pit)
    pit.export()
    assert [m.training for m in net.modules()] == [m is not net.bn0 for m in net.modules()]
    assert not net.fc.weight.requires_grad
    assert net.conv0.weight.grad is None
    after = net.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_that_of_the_model(training: bool) -> None:
    pit = PIT(SimpleNN().train(training), (3, 40))
    assert {m.training for m in pit.network.modules()} == {training} == {pit.training}
    pit.export()
    assert pit.training is training
    assert {m.training for m in pit.network.modules()} == {training}


# ---- exclusion -------------------------------------------------------------------------------------------------------


def test_a_layer_type_is_excluded() -> None:
    pit = PIT(MultiPath().double(), (3, 40), exclude=(nn.Conv1d,))
    assert list(pit.masks) == ["hidden"]
    scatter(pit)
    small = export_equal(pit, wide(3, 40))
    assert [s for path, s in shapes(small).items() if path.startswith("conv")] == [
        s for path, s in shapes(MultiPath()).items() if path.startswith("conv")
    ]


def test_layers_are_excluded_by_name() -> None:
    """conv2, conv4 and conv5 are added: with conv4 their 64 outputs stay. Its inputs can be cut."""
    full = PIT(MultiPath(), (3, 40))
    channels = [label for label, mask in full.masks.items() if isinstance(mask, ChannelMask)]
    assert channels == ["conv0", "conv1", "conv2", "conv3", "hidden"]
    pit = PIT(MultiPath().double(), (3, 40), exclude=["conv0", "conv4"])
    channels = [label for label, mask in pit.masks.items() if isinstance(mask, ChannelMask)]
    assert channels == ["conv1", "conv3", "hidden"]
    kernels = [label for label, mask in pit.masks.items() if isinstance(mask, KernelMask)]
    assert kernels == [f"conv{i}.kernel_size" for i in (1, 2, 3, 5)]
    assert "excluded" in pit.space.frozen[Dimension("conv4.weight", 0)]
    pit.masks["conv1"].keep([0, 5])
    pit.masks["conv3"].keep([1, 2, 49])
    pit.masks["hidden"].keep([3])
    small = export_equal(pit, wide(3, 40))
    found = shapes(small)
    assert (found["conv0"], found["conv1"]) == ((32, 3, 3), (2, 3, 3))
    assert (found["conv3"], found["conv4"]) == ((3, 3, 5), (64, 3, 9))
    assert next(s for path, s in found.items() if path.startswith("conv5")) == (64, 34, 3)
    assert (found["hidden"], found["fc"]) == ((1, 640), (3, 1))


@pytest.mark.parametrize("excluded", ["conv0", "conv1", "conv2", "conv3", "conv4", "conv5", "hidden", "conv[35]"])
def test_any_excluded_layer_leaves_an_export_that_runs(excluded: str) -> None:
    pit = PIT(randomize(MultiPath().double(), 0), (3, 40), exclude=[excluded], cost="params_no_norm")
    for label in pit.masks:
        assert excluded not in (label, label.partition(".")[0])
    scatter(pit, seed=1)
    small = export_equal(pit, wide(3, 40))
    assert pit.cost.item() == plain_params(small)


# ---- exported and masked compute the same ----------------------------------------------------------------------------


class Heads(nn.Module):
    """``body`` and a Linear on the mean over time."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.fc = body, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean(2))


class CatNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Conv1d(3, 4, 3), nn.Conv1d(3, 6, 3), nn.BatchNorm1d(10)
        self.conv = nn.Conv1d(10, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.relu(self.norm(torch.cat([self.one(x), self.two(x)], 1))))


def conv(cin: int, cout: int, **more: Any) -> nn.Conv1d:
    return nn.Conv1d(cin, cout, 3, padding=1, **more)


BODIES: dict[str, Callable[[], nn.Module]] = {
    "conv-bn-relu": lambda: nn.Sequential(conv(3, 8), nn.BatchNorm1d(8), nn.ReLU(), conv(8, 6), nn.BatchNorm1d(6)),
    "conv-pool-bn": lambda: nn.Sequential(conv(3, 8), nn.MaxPool1d(2), nn.BatchNorm1d(8), nn.ReLU(), conv(8, 6)),
    "conv-relu-bn": lambda: nn.Sequential(conv(3, 8), nn.ReLU(), nn.BatchNorm1d(8), conv(8, 6)),
    "pre-activation": lambda: nn.Sequential(conv(3, 8), nn.BatchNorm1d(8), nn.ReLU(), conv(8, 6, bias=False)),
    "sigmoid": lambda: nn.Sequential(conv(3, 8), nn.Sigmoid(), conv(8, 6), nn.Sigmoid()),
    "pad-of-ones": lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.ConstantPad1d(2, 1.0), nn.Conv1d(8, 6, 5)),
    "cat-bn": CatNorm,
    "bn-without-scale": lambda: nn.Sequential(conv(3, 8), nn.BatchNorm1d(8, affine=False), nn.ReLU(), conv(8, 6)),
}


@pytest.mark.parametrize("name", list(BODIES))
def test_norms_and_borders(name: str) -> None:
    """With nothing, a half, and anything pruned; statistics as after training."""
    net = randomize(Heads(BODIES[name](), 6).double(), seed=1)
    pit = PIT(net, (3, 20))
    assert sum(isinstance(mask, ChannelMask) for _, mask in pit.masks.items()) == (3 if name == "cat-bn" else 2)
    export_equal(pit, wide(3, 20))
    half(pit)
    small = export_equal(pit, wide(3, 20))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    scatter(pit, seed=2)
    export_equal(pit, wide(3, 20))


class BeforeItsNorm(nn.Module):
    """Another layer reads the convolution before its BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.norm, self.conv1, self.conv2 = conv(3, 8), nn.BatchNorm1d(8), conv(8, 6), conv(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv0(x)
        return self.conv1(torch.relu(self.norm(x))) * self.conv2(x)


class Aliases(nn.Module):
    """All names of the concatenation, one within another, and along the end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.conv1, self.conv2, self.fuse = conv(3, 4), conv(3, 5), conv(3, 6), conv(19, 6)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.conv0(x), self.conv1(x), self.conv2(x)
        inner = torch.concat([a, torch.relu(b)], dim=-2)
        return self.fuse(torch.hstack([torch.concatenate((inner, c), 1), a.neg()]))


class Series(nn.Module):
    """One convolution twice in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again = conv(3, 6), conv(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.relu(self.again(torch.relu(self.stem(x)))))


class Learned(nn.Module):
    """A learned scale per channel and a learned vector per channel and step."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.conv1 = conv(3, 8), conv(8, 6)
        self.scale, self.added = nn.Parameter(torch.ones(8, 1)), nn.Parameter(torch.zeros(1, 8, 20))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(torch.relu(self.scale * self.conv0(x) + self.added))


class FlattenAdd(nn.Module):
    """Maps flattened and added to a Linear of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.side, self.mixed = nn.Conv1d(3, 4, 3, 4, 1), nn.Linear(60, 20), nn.Linear(20, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(torch.relu(self.conv0(x).flatten(1) + self.side(x.flatten(1)))).unsqueeze(2)


class Upwards(nn.Module):
    """Strided convolution, channel multiplier, transposed convolution, and functions without modules."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.multiply = nn.Conv1d(3, 8, 4, 2, 1), conv(8, 16, groups=8)
        self.up, self.last = nn.ConvTranspose1d(16, 6, 4, 2, 1), nn.Conv1d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(F.max_pool1d(self.multiply(self.down(x).relu() / 2), 2), scale_factor=2.0)
        return self.last(F.adaptive_avg_pool1d(F.hardswish(self.up(x)), 5))


class Activations(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        acts = (nn.GELU(), nn.LeakyReLU(), nn.ELU(), nn.Hardswish(), nn.Tanh(), nn.Dropout1d(), nn.SiLU(), nn.PReLU(8))
        layers = [layer for act in acts for layer in (nn.Conv1d(8, 8, 1), act)]
        self.layers = nn.Sequential(nn.Conv1d(3, 8, 1), *layers, nn.AdaptiveMaxPool1d(4), conv(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Optional(nn.Module):
    """An argument that may be missing, control flow, and tensors kept in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.conv1 = conv(3, 8), conv(8, 6)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        kept = {"x": self.conv0(x)}
        if mask is not None:
            kept["x"] = kept["x"] * mask
        if x.shape[2] > 4:
            kept["x"] = torch.relu(kept["x"])
        return self.conv1(kept["x"])


class OwnConv(nn.Conv1d):
    """A subclass with a forward of its own: a kernel of mean 0."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(2, keepdim=True)
        return F.conv1d(x, weight, self.bias, self.stride, self.padding)


class OwnLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.conv1 = OwnConv(3, 8, 3, padding=1), OwnConv(8, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(torch.relu(self.conv0(x)))


class ThereAndBack(nn.Module):
    """One matrix of a convolution, used forwards and, transposed, backwards, with as much padding as it needs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tied = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.last = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.tied(torch.tanh(self.stem(x.unflatten(2, (4, 5))))))
        weight = self.tied.weight.transpose(0, 1)
        x = F.conv2d(x, weight, padding=(weight.shape[2] // 2, weight.shape[3] // 2))
        return self.last(torch.tanh(x)).flatten(2)


BEYOND: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    # The product ties conv1 and conv2.
    "read before its norm": (BeforeItsNorm, {"body.conv0": 8, "body.conv1": 6}),
    "names of concatenation": (Aliases, {"body.conv0": 4, "body.conv1": 5, "body.conv2": 6, "body.fuse": 6}),
    # again's outputs are its inputs.
    "in series": (Series, {"body.stem": 6}),
    "learned scale and vector": (Learned, {"body.conv0": 8, "body.conv1": 6}),
    # A channel of conv0 is 5 features of side.
    "flatten and add": (FlattenAdd, {"body.conv0": 4, "body.mixed": 6}),
    # A channel of down is two of multiply.
    "up and down": (Upwards, {"body.down": 8, "body.up": 6, "body.last": 6}),
    "activations": (Activations, {f"body.layers.{2 * i - (i > 0)}": 8 for i in range(9)} | {"body.layers.18": 6}),
    "optional argument": (Optional, {"body.conv0": 8, "body.conv1": 6}),
    # Both dimensions of tied are columns, and its kernel is masked as well.
    "there and back": (ThereAndBack, {"body.stem": 6, "body.tied": 8, "body.last": 6}),
    # Where weights are computed before they are read, no column of them can be masked: conv0 stays whole.
    "own layers": (OwnLayers, {"body.conv1": 6}),
}


@pytest.mark.parametrize("name", list(BEYOND))
def test_networks_that_plinio_cannot_take(name: str) -> None:
    build, groups = BEYOND[name]
    pit = PIT(randomize(Heads(build(), 6).double(), seed=0), (3, 20))
    assert {label: len(mask.alpha) for label, mask in pit.masks.items() if isinstance(mask, ChannelMask)} == groups
    for seed in range(2):
        scatter(pit, seed)
        small = export_equal(pit, wide(3, 20))
        assert pit.get_cost("params").item() == sum(p.numel() for p in small.parameters())


def test_linears_on_steps_count_every_step() -> None:
    """7 steps of 3 -> 8 -> 5, without biases: 7 * (24 + 40)."""
    net = nn.Sequential(nn.Linear(3, 8, bias=False), nn.GELU(), nn.Linear(8, 5, bias=False)).double()
    pit = PIT(net, (7, 3), cost=COSTS)
    assert pit.get_cost("ops").item() == 448
    pit.masks["0"].keep([0, 1, 6])
    assert pit.get_cost("ops").item() == 7 * (9 + 15)
    assert shapes(export_equal(pit, wide(7, 3))) == {"0": (3, 3), "2": (5, 3)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_precision_is_that_of_the_model(dtype: torch.dtype) -> None:
    pit = PIT(SimpleNN().to(dtype), (3, 40)).eval()
    half(pit)
    x = torch.randn(2, 3, 40, dtype=dtype)
    assert pit(x).dtype == dtype
    assert {p.dtype for p in pit.export().parameters()} == {dtype}
    assert all(mask.alpha.dtype in (torch.float32, torch.float64) for _, mask in pit.masks.items())


class Named(nn.Module):
    """Input (3,): a Linear of any name, in a dictionary of layers or not."""

    def __init__(self, name: str, inside: bool) -> None:
        super().__init__()
        self.name, self.inside, self.fc = name, inside, nn.Linear(6, 2)
        if inside:
            self.layers = nn.ModuleDict({name: nn.Linear(3, 6)})
        else:
            self.add_module(name, nn.Linear(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layers[self.name] if self.inside else getattr(self, self.name)
        return self.fc(torch.relu(layer(x)))


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("keys", False),
        ("values", False),
        ("items", False),
        ("a/b", True),
        ("a b", True),
        ("0:1", True),
        ("größe", True),
    ],
)
def test_layers_may_have_any_name(name: str, inside: bool) -> None:
    pit = PIT(Named(name, inside).double(), (3,))
    label = f"layers.{name}" if inside else name
    assert list(pit.masks) == [label]
    pit.decide({label: [1, 4]})
    assert pit.arch() == {label: [1, 4]}
    assert shapes(export_equal(pit, wide(3))) == {"fc": (2, 2), label: (2, 3)}


# ---- in the middle of a search ---------------------------------------------------------------------------------------


def searched() -> PIT:
    """SimpleNN after three steps, with alphas between 0 and 1."""
    pit = PIT(SimpleNN(), (3, 40), cost=COSTS)
    optimizer = torch.optim.Adam(pit.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        (pit(torch.randn(4, 3, 40)).square().mean() + 1e-3 * pit.get_cost("params")).backward()
        optimizer.step()
        pit.masks.clip_()
    put(pit, "conv0", [0.4, 0.7] * 16)
    return pit


def agree(one: PIT, other: PIT) -> None:
    x = torch.randn(2, 3, 40)
    one.eval(), other.eval()
    with torch.no_grad():
        assert torch.equal(one(x), other(x))
    assert one.arch() == other.arch()
    assert one.costs() == other.costs()
    assert one.soft_cost("ops").item() == other.soft_cost("ops").item()


def test_a_state_dict_continues_a_search() -> None:
    pit, other = searched(), PIT(SimpleNN(), (3, 40), cost=COSTS)
    assert other.arch() != pit.arch()
    other.load_state_dict(pit.state_dict())
    agree(pit, other)


def test_copies_and_files_of_a_search() -> None:
    pit = searched()
    agree(pit, copy.deepcopy(pit))
    file = io.BytesIO()
    torch.save(pit, file)
    file.seek(0)
    agree(pit, torch.load(file, weights_only=False))


def test_an_export_is_a_file_without_the_search() -> None:
    pit = searched().eval()
    file = io.BytesIO()
    torch.save(pit.export(), file)
    file.seek(0)
    small = torch.load(file, weights_only=False)
    assert type(small) is SimpleNN
    assert not any(type(m).__module__.startswith("oneshot") for m in small.modules())
    x = torch.randn(2, 3, 40)
    with torch.no_grad():
        same(pit(x), small.eval()(x), 1e-5)
