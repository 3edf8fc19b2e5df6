"""Counted parameters and MACs, against the rebuilt network of every architecture: its numel, and torch's FLOP counter.

torch counts two FLOPs per multiply-accumulate, and none for a bias, a normalisation or an activation.
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_spaces import architectures, random_space
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

import oneshot
from oneshot import InputChoice, LayerChoice, Repeat, count_macs, count_params
from oneshot.cost import MAC_RULES, LayerSpec
from oneshot.errors import UnknownCostError
from oneshot.export import arch_of


def rebuilt(model: nn.Module, choices: dict[str, int]) -> nn.Module:
    return oneshot.fixed(model, arch_of(model, choices)).eval()


def numel(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def flops(model: nn.Module, *args: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(*args)
    return counter.get_total_flops()


# --- every architecture of random spaces ------------------------------------------------------------------------


def dense(rng: random.Random) -> nn.Module:
    n, bias = rng.randint(0, 4), rng.random() < 0.5
    if n == 0:
        return rng.choice([nn.Identity, nn.ReLU, nn.PReLU, lambda: nn.LayerNorm(4)])()
    return nn.Sequential(nn.Linear(4, n, bias=bias), nn.Linear(n, 4)) if n < 4 else nn.Linear(4, 4, bias=bias)


def image(rng: random.Random) -> nn.Module:
    kernel, dilation, groups = rng.choice([1, 3]), rng.choice([1, 2]), rng.choice([1, 2, 4])
    mode = rng.choice(["zeros", "circular", "reflect"])
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(4, 4, kernel, dilation=dilation, padding=padding, groups=groups, padding_mode=mode, bias=False)
    down_up = nn.Sequential(nn.Conv2d(4, 2, 2, stride=2), nn.ConvTranspose2d(2, 4, 2, stride=2))
    return rng.choice([conv, conv, down_up, nn.BatchNorm2d(4), nn.Identity()])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_params_are_those_of_every_rebuilt_network(seed: int) -> None:
    model = random_space(seed, dense)
    cost = count_params(model)
    for choices in architectures(model):
        assert cost.of(choices) == numel(rebuilt(model, choices)), choices


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([(1, 4), (1, 5, 4)]))
def test_macs_of_linear_layers_are_those_of_every_rebuilt_network(seed: int, shape: tuple[int, ...]) -> None:
    model, x = random_space(seed, dense), torch.rand(shape)
    cost = count_macs(model, (x,))
    for choices in architectures(model):
        assert 2 * cost.of(choices) == flops(rebuilt(model, choices), x), choices


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32))
def test_macs_of_convolutions_are_those_of_every_rebuilt_network(seed: int) -> None:
    model, x = random_space(seed, image), torch.rand(1, 4, 6, 8)
    cost = count_macs(model, (x,))
    for choices in architectures(model):
        assert 2 * cost.of(choices) == flops(rebuilt(model, choices), x), choices


# --- one layer --------------------------------------------------------------------------------------------------

CONVOLUTIONS = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_macs_of_any_convolution(data: st.DataObject) -> None:
    def per_axis(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(d))

    d, groups, transposed = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.booleans())
    inputs, outputs = groups * data.draw(st.integers(1, 3)), groups * data.draw(st.integers(1, 3))
    modes = ["zeros"] if transposed else ["zeros", "circular", "replicate", "reflect"]
    conv = CONVOLUTIONS[d][transposed](
        inputs,
        outputs,
        per_axis(1, 3),
        stride=per_axis(1, 2),
        padding=per_axis(0, 1),
        dilation=per_axis(1, 2),
        groups=groups,
        bias=data.draw(st.booleans()),
        padding_mode=data.draw(st.sampled_from(modes)),
    )
    x = torch.rand(1, inputs, *per_axis(5, 8))
    assert 2 * count_macs(conv, (x,)).of({}) == flops(conv, x)


@pytest.mark.parametrize("shape", [(1, 6), (1, 5, 6), (1, 2, 5, 6)])
def test_macs_of_a_linear_layer(shape: tuple[int, ...]) -> None:
    linear, x = nn.Linear(6, 3), torch.rand(shape)
    assert 2 * count_macs(linear, (x,)).of({}) == flops(linear, x)


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        # 8 * 8 outputs of 16 channels, each 3 * 3 * 4 products
        (nn.Conv2d(4, 16, 3, padding=1), (1, 4, 8, 8), 8 * 8 * 16 * 36),
        # depthwise, stride 2: 4 * 4 outputs of 4 channels, each 5 * 5 * 1 products
        (nn.Conv2d(4, 4, 5, stride=2, padding=2, groups=4), (1, 4, 8, 8), 4 * 4 * 4 * 25),
        # transposed: each of 8 * 8 inputs of 4 channels is spread over 2 * 2 positions of 6 channels
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 8, 8), 8 * 8 * 4 * 24),
        (nn.Linear(10, 4), (1, 10), 40),
        (nn.Linear(10, 4), (1, 7, 10), 280),
        (nn.Sequential(nn.BatchNorm2d(4), nn.PReLU(4), nn.GroupNorm(2, 4)), (1, 4, 8, 8), 0),
    ],
)
def test_macs_by_hand(layer: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    assert count_macs(layer, (torch.rand(shape),)).of({}) == macs


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_macs_are_those_of_one_sample(batch: int) -> None:
    class Windows(nn.Module):
        """Folds windows and steps into the batch, as attention in windows does; its bias table has no batch."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear, self.table = nn.Conv2d(2, 3, 2), nn.Linear(3, 5), nn.Linear(7, 1)
            self.register_buffer("positions", torch.rand(5, 7))

        def forward(self, x: Tensor) -> Tensor:
            windows = x.unfold(3, 4, 4).permute(0, 3, 1, 2, 4).flatten(0, 1)  # (2 N, 2, 4, 4)
            features = self.conv(windows).flatten(2).transpose(1, 2)  # (2 N, 9, 3)
            return self.linear(features.reshape(-1, 3)) + self.table(self.positions).T

    # 2 windows of 3 * 3 outputs of 3 channels with 2 * 4 products; 18 rows of a Linear(3, 5); 5 of a Linear(7, 1)
    assert count_macs(Windows(), (torch.rand(batch, 2, 4, 8),)).of({}) == 2 * 9 * 3 * 8 + 18 * 15 + 35


def test_a_convolution_of_one_image_without_batch() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.conv(image) for image in x])

    # 4 * 5 outputs of 3 channels with 2 products
    assert count_macs(Loop(), (torch.rand(1, 2, 4, 5),)).of({}) == 4 * 5 * 6


# --- shared modules ---------------------------------------------------------------------------------------------


def test_a_module_called_twice_has_its_params_once_and_its_macs_twice() -> None:
    linear = nn.Linear(4, 4, bias=False)
    model = nn.Sequential(linear, nn.ReLU(), linear)
    assert count_params(model).of({}) == 16
    assert count_macs(model, (torch.rand(1, 4),)).of({}) == 32


def test_one_module_as_several_candidates() -> None:
    linear = nn.Linear(4, 4, bias=False)
    model = nn.Sequential(LayerChoice([linear, linear, nn.Identity(), nn.Sequential(linear, linear)], label="a"))
    params, macs = count_params(model), count_macs(model, (torch.rand(1, 4),))
    assert [params.of({"a": k}) for k in range(4)] == [16, 16, 0, 16]
    assert [macs.of({"a": k}) for k in range(4)] == [16, 16, 0, 32]


def test_one_block_repeated() -> None:
    linear = nn.Linear(4, 4, bias=False)
    model = nn.Sequential(Repeat([linear] * 20, depth=(0, 20), label="r"))
    params, macs = count_params(model), count_macs(model, (torch.rand(1, 4),))
    assert [params.of({"r": k}) for k in range(21)] == [0] + [16] * 20
    assert [macs.of({"r": k}) for k in range(21)] == [16 * k for k in range(21)]


def test_tied_weights_count_while_one_of_their_places_is_there() -> None:
    one, other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    other.weight = one.weight
    choices = [LayerChoice([layer, nn.Identity()], label=label) for layer, label in ((one, "a"), (other, "b"))]
    cost = count_params(nn.Sequential(*choices))
    assert [cost.of({"a": a, "b": b}) for a in (0, 1) for b in (0, 1)] == [16, 16, 16, 0]


def test_a_choice_inside_a_candidate_of_its_own_label() -> None:
    inner = LayerChoice({"x": nn.Sequential(nn.Linear(4, 4)), "y": nn.Sequential(nn.Linear(4, 2))}, label="a")
    model = nn.Sequential(LayerChoice({"x": nn.Sequential(nn.Linear(4, 2)), "y": nn.Sequential(inner)}, label="a"))
    # x: Linear(4, 2); y: the inner choice takes y too, its Linear(4, 4) is never there
    assert [count_params(model).of({"a": k}) for k in (0, 1)] == [10, 10]


def test_inputs_that_are_not_chosen_are_still_computed() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))
            self.choice = InputChoice(3, n_chosen=2, label="in")

        def forward(self, x: Tensor) -> Tensor:
            return self.choice([branch(x) for branch in self.branches])

    model = Net()
    assert {count_params(model).of({"in": k}) for k in range(3)} == {48}
    assert {count_macs(model, (torch.rand(1, 4),)).of({"in": k}) for k in range(3)} == {48}


# --- what no rule covers ----------------------------------------------------------------------------------------


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Bank(nn.Module):
    """Weights in a ParameterList, which is no module that is ever called."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.ones(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weights[0]


@pytest.mark.parametrize(
    ("layer", "shape", "name"),
    [
        (Scale(), (1, 4, 5, 5), "Scale"),
        (Bank(), (1, 4), "Bank"),
        (nn.Bilinear(4, 4, 2), (1, 4), "Bilinear"),
        (nn.LSTM(4, 4), (1, 3, 4), "LSTM"),
        (nn.Embedding(4, 2), (1, 3), "Embedding"),
    ],
)
def test_a_layer_without_a_rule_is_an_error_with_its_path_and_type(
    layer: nn.Module, shape: tuple[int, ...], name: str
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Identity(), LayerChoice({"odd": layer}))

        def forward(self, x: Tensor) -> Tensor:
            choice = self.body[1]
            if name == "Bilinear":
                return choice(x, x)
            return choice(x.long()) if name == "Embedding" else choice(x)

    with pytest.raises(UnknownCostError, match=rf"macs: body\.1\.candidates\.odd is a {name} with .*Linear"):
        count_macs(Net(), (torch.rand(shape),))


def test_a_network_with_parameters_of_its_own_is_named_as_such() -> None:
    with pytest.raises(UnknownCostError, match="macs: the network is a Scale"):
        count_macs(Scale(), (torch.rand(1, 4, 5, 5),))


def test_a_rule_of_the_user_is_told_channels_and_positions() -> None:
    seen: list[LayerSpec] = []

    def rule(spec: LayerSpec) -> float:
        seen.append(spec)
        return spec.out_channels * spec.positions

    model = nn.Sequential(Scale(), nn.Conv2d(4, 2, 1))
    cost = count_macs(model, (torch.rand(3, 4, 5, 6),), rules={**MAC_RULES, Scale: rule})
    assert seen == [LayerSpec(in_channels=4, out_channels=4, positions=30)]
    assert cost.of({}) == 4 * 30 + 30 * 2 * 4


def test_the_most_specific_rule_decides_and_the_rules_of_the_library_stay() -> None:
    class Free(nn.Linear):
        pass

    model = nn.Sequential(Free(4, 4), nn.Linear(4, 4))
    assert count_macs(model, (torch.rand(1, 4),)).of({}) == 32
    assert count_macs(model, (torch.rand(1, 4),), rules={**MAC_RULES, Free: lambda spec: 1}).of({}) == 17
    with pytest.raises(TypeError):
        MAC_RULES[Free] = lambda spec: 1  # type: ignore[index]


def test_a_choice_inside_a_layer_that_is_counted_whole_is_an_error() -> None:
    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.adapter = LayerChoice([nn.Linear(4, 4), nn.Identity()], label="adapter")

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.adapter(x)

    with pytest.raises(UnknownCostError, match=r"macs: 0 is a Adapted, .*LayerChoice\(label='adapter'\)"):
        count_macs(nn.Sequential(Adapted()), (torch.rand(1, 4),))


def test_parametrized_layers_are_still_layers() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(4, 4, 1)))
    # the MACs of the convolution; weight, its norm per output channel, and bias
    assert count_macs(model, (torch.rand(1, 4, 5, 5),)).of({}) == 25 * 16
    assert count_params(model).of({}) == 16 + 4 + 4
