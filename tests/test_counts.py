"""Counted parameters and MACs, against the rebuilt network of every architecture: its numel, and torch's FLOP counter.

torch counts two FLOPs per multiply-accumulate, and none for a bias, a normalisation or an activation.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_spaces import architectures, random_space
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

import oneshot
from oneshot import InputChoice, LayerChoice, Repeat, count, count_macs, count_params, counted_cost, weight_bytes
from oneshot.cost import MACS, OPS, PARAMS_NO_BIAS, PARAMS_NO_NORM, LayerSpec
from oneshot.errors import ConfigurationError, UnknownCostError, UnsupportedModelError
from oneshot.export import arch_of
from oneshot.mutables import Mutable


def rebuilt(model: nn.Module, choices: dict[str, int]) -> nn.Module:
    return oneshot.fixed(model, arch_of(model, choices)).eval()


def numel(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def flops(model: nn.Module, *args: Tensor) -> int:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter cannot look into fused attention, nor into oneDNN's
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), one_dnn(False):
            model(*args)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    return counter.get_total_flops()


@contextmanager
def one_dnn(enabled: bool) -> Iterator[None]:
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(enabled)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


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


class Weighted(nn.Module):
    """Weights that are never called as a layer."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(4, n), nn.Linear(n, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down.weight, self.down.bias), self.up.weight)


class Mixed(nn.Module):
    """Positions mixed by their products with each other, in one of several ways to write it."""

    def __init__(self, way: int) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == 0:
            return (x @ x.transpose(1, 2)) @ x
        if self.way == 1:
            return torch.einsum("bic,bjc,bjd->bid", x, x, x)
        return F.scaled_dot_product_attention(x, x, x)


def tokens(rng: random.Random) -> nn.Module:
    attention = nn.TransformerEncoderLayer(4, 2, rng.randint(1, 5), batch_first=True)
    return rng.choice([nn.Linear(4, 4), Weighted(rng.randint(1, 3)), Mixed(rng.randint(0, 2)), attention])


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


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 2**32))
def test_macs_outside_of_layers_are_those_of_every_rebuilt_network(seed: int) -> None:
    model, x = random_space(seed, tokens), torch.rand(1, 3, 4)
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
            return self.body(x)

    with pytest.raises(
        UnknownCostError, match=rf"macs: body\.1\.candidates\.odd is a {name} with .*Linear.*with_rule\({name}, f"
    ):
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
    cost = count_macs(model, (torch.rand(3, 4, 5, 6),), spec=MACS.with_rule(Scale, rule))
    assert seen == [LayerSpec(4, 4, positions=30, in_positions=30, output_size=(5, 6))]
    assert cost.of({}) == 4 * 30 + 30 * 2 * 4


def test_the_most_specific_rule_decides_and_the_rules_of_the_library_stay() -> None:
    class Free(nn.Linear):
        pass

    model = nn.Sequential(Free(4, 4), nn.Linear(4, 4))
    assert count_macs(model, (torch.rand(1, 4),)).of({}) == 32
    assert count_macs(model, (torch.rand(1, 4),), spec=MACS.with_rule(Free, lambda layer: 1)).of({}) == 17
    assert count_macs(model, (torch.rand(1, 4),)).of({}) == 32


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


class WithToken(nn.Module):
    """A class token in front of the others, as in a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.mix = nn.Parameter(torch.zeros(1, 1, 4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.cat([self.token.expand(len(x), -1, -1), x], dim=1))


@pytest.mark.parametrize("ignore", [WithToken, "1", "?"])
def test_ignored_parameters_are_no_error_and_what_is_inside_counts(ignore: Any) -> None:
    model, x = nn.Sequential(nn.Identity(), WithToken()), torch.rand(2, 3, 4)
    with pytest.raises(UnknownCostError, match="macs: 1 is a WithToken"):
        count_macs(model, (x,))
    assert count_macs(model, (x,), ignore=[ignore]).of({}) == 4 * 4 * 2
    assert count(model, (x,), PARAMS_NO_NORM, ignore=[ignore]).of({}) == 4 * 2 + 2
    # what runs outside of a layer counts too: a row of 4 times a matrix of 4 * 4
    assert count_macs(Bank(), (torch.rand(1, 4),), ignore=[Bank]).of({}) == 16
    assert count(Bank(), (torch.rand(1, 4),), PARAMS_NO_NORM, ignore=[Bank]).of({}) == 0


def test_an_ignored_layer_that_a_rule_covers_costs_nothing() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 3))), torch.rand(1, 4)
    assert count_macs(model, (x,), ignore=[nn.Linear]).of({}) == 0
    assert count_macs(model, (x,), ignore=["1*"]).of({}) == 16
    assert count(model, (x,), PARAMS_NO_BIAS, ignore=["0"]).of({}) == 12


# --- attention, recurrence, operators outside of layers ---------------------------------------------------------


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args, *self.layers)


def attention(**arguments: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(8, 2, **arguments)


@torch.inference_mode()
def in_inference_mode(x: Tensor, linear: nn.Linear) -> Tensor:
    return F.linear(x, linear.weight, linear.bias) @ torch.einsum("bik,bjk->bij", x, x)


ATTENTION: list[tuple[nn.Module, list[tuple[int, ...]], int | None]] = [
    (attention(batch_first=True), [(1, 5, 8)] * 3, 0),
    (attention(batch_first=True, kdim=6, vdim=4, bias=False), [(1, 5, 8), (1, 7, 6), (1, 7, 4)], 0),
    (attention(add_bias_kv=True, add_zero_attn=True), [(5, 1, 8), (7, 1, 8), (7, 1, 8)], 1),
    (attention(), [(5, 8), (7, 8), (7, 8)], None),
    (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), [(1, 5, 8)], 0),
    (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, activation="gelu"), [(1, 5, 8)], 0),
    (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2), [(1, 5, 8)], 0),
    (nn.TransformerDecoderLayer(8, 2, 16), [(5, 1, 8), (6, 1, 8)], 1),
]
RECURRENT: list[tuple[nn.Module, list[tuple[int, ...]], int | None]] = [
    (nn.LSTM(3, 5, 2, bidirectional=True, batch_first=True), [(1, 7, 3)], 0),
    (nn.LSTM(3, 5, proj_size=2, bias=False), [(7, 1, 3)], 1),
    (nn.GRU(3, 5, 2, bidirectional=True), [(7, 3)], None),
    (nn.RNN(3, 5, batch_first=True), [(1, 7, 3)], 0),
    (nn.LSTMCell(3, 5), [(1, 3)], 0),
    (nn.GRUCell(3, 5), [(1, 3)], 0),
    (nn.RNNCell(3, 5, bias=False), [(1, 3)], 0),
]
OUTSIDE: list[tuple[nn.Module, list[tuple[int, ...]], int | None]] = [
    (Function(lambda x, y: x @ y.transpose(-1, -2)), [(1, 3, 5, 4), (1, 3, 7, 4)], 0),
    (Function(lambda x: torch.addmm(x, x, x.T)), [(4, 4)], None),
    (Function(lambda x: torch.baddbmm(x, x, torch.bmm(x, x))), [(1, 4, 4)], 0),
    (Function(lambda x, layer: F.linear(x, layer.weight), nn.Linear(4, 3)), [(1, 2, 5, 4)], 0),
    (Function(lambda x, layer: F.conv1d(x, layer.weight, layer.bias, 2), nn.Conv1d(4, 3, 2)), [(1, 4, 9)], 0),
    (
        Function(lambda x, layer: F.conv2d(x, layer.weight, groups=2, dilation=2), nn.Conv2d(4, 6, 3, groups=2)),
        [(1, 4, 8, 9)],
        0,
    ),
    (
        Function(
            lambda x, layer: F.conv_transpose2d(x, layer.weight, stride=2, groups=2),
            nn.ConvTranspose2d(4, 6, 3, groups=2),
        ),
        [(1, 4, 5, 6)],
        0,
    ),
    (Function(F.scaled_dot_product_attention), [(1, 2, 5, 4), (1, 2, 7, 4), (1, 2, 7, 3)], 0),
    (Function(in_inference_mode, nn.Linear(4, 5)), [(1, 5, 4)], 0),
    (Function(lambda x: F.normalize(x).softmax(-1) * x.cumsum(-1)), [(1, 5, 4)], 0),
]


@pytest.mark.parametrize(("model", "shapes", "batch_dim"), [*ATTENTION, *RECURRENT, *OUTSIDE])
def test_macs_by_the_flop_counter(model: nn.Module, shapes: list[tuple[int, ...]], batch_dim: int | None) -> None:
    args = [torch.rand(shape) for shape in shapes]
    with one_dnn(False):  # which has no LSTM with projections, and warns
        assert 2 * count_macs(model.eval(), args, batch_dim=batch_dim).of({}) == flops(model, *args)


@pytest.mark.parametrize(("model", "shapes", "batch_dim"), [*ATTENTION, *RECURRENT])
def test_params_by_layers_are_those_of_the_network(
    model: nn.Module, shapes: list[tuple[int, ...]], batch_dim: int | None
) -> None:
    args = [torch.rand(shape) for shape in shapes]
    with one_dnn(False):
        cost = count(model, args, PARAMS_NO_NORM, batch_dim=batch_dim)
    assert cost.of({}) == plain_params(model)


def plain_params(model: nn.Module) -> int:
    """Parameters outside of normalisations and PReLUs."""
    kinds = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU)
    return numel(model) - sum(numel(module) for module in model.modules() if isinstance(module, kinds))


def test_attention_by_hand() -> None:
    """5 queries and 7 keys of 8 numbers, in 2 heads of 4."""
    layer, x, y = attention(batch_first=True), torch.rand(3, 5, 8), torch.rand(3, 7, 8)
    # projections of 5 queries, 7 keys, 7 values and 5 outputs with 8 * 8; per head scores 5 * 7 * 4 and sums 5 * 7 * 4
    macs = (5 + 7 + 7 + 5) * 64 + 2 * (5 * 7 * 4 + 5 * 7 * 4)
    assert count_macs(layer, (x, y, y)).of({}) == macs
    assert count(layer, (x, y, y), OPS).of({}) == macs + (5 + 7 + 7 + 5) * 8
    assert count(layer, (x, y, y), PARAMS_NO_BIAS).of({}) == 4 * 64


def test_attention_is_called_by_names_too() -> None:
    layer, x = attention(batch_first=True), torch.rand(1, 5, 8)
    model = Function(lambda x, layer: layer(x, key=x[:, :3], value=x[:, :3])[0], layer)
    # projections of 5 queries, 3 keys, 3 values and 5 outputs; 5 * 3 scores and sums of 8 numbers
    assert count_macs(model, (x,)).of({}) == (5 + 3 + 3 + 5) * 64 + 2 * 5 * 3 * 8

    class Own(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, x, x)[0]

    with pytest.raises(UnsupportedModelError, match=r"0 .Own. is called without 'key' as argument 1"):
        count_macs(nn.Sequential(Own(8, 2, batch_first=True)), (x,))


def test_recurrence_by_hand() -> None:
    layer, x = nn.LSTM(3, 5, bidirectional=True, batch_first=True), torch.rand(2, 7, 3)
    # 7 steps in 2 directions: 4 gates of 5 from 3 inputs and 5 states; two biases for each gate
    assert count_macs(layer, (x,)).of({}) == 7 * 2 * 20 * (3 + 5)
    assert count(layer, (x,), OPS).of({}) == 7 * 2 * 20 * (3 + 5 + 2)


def test_bilinear_and_embeddings_by_hand() -> None:
    bilinear, x = nn.Bilinear(3, 4, 2), torch.rand(1, 5, 3)
    # at 5 positions and for 2 outputs: 3 numbers times 4 columns, and these 4 times those of the other input
    assert count_macs(bilinear, (x, torch.rand(1, 5, 4))).of({}) == 5 * 2 * (3 * 4 + 4)
    assert count(bilinear, (x, torch.rand(1, 5, 4)), PARAMS_NO_NORM).of({}) == 2 * 3 * 4 + 2
    embedding, words = nn.Embedding(10, 4), torch.zeros(1, 6, dtype=torch.long)
    assert count_macs(embedding, (words,)).of({}) == 0
    assert count(embedding, (words,), PARAMS_NO_NORM).of({}) == 40


def test_operators_that_the_flop_counter_does_not_know() -> None:
    # 4 * 4 rows times 4 * 4 in place: 64; a matrix of 4 * 4 times a vector: 16, twice; two vectors of 4: 4
    model = Function(lambda x: x.clone().baddbmm_(x, x)[0].mv(torch.addmv(x[0, 1], x[0], x[0, 2])).dot(x[0, 3]))
    assert count_macs(model, (torch.rand(1, 4, 4),)).of({}) == 64 + 2 * 16 + 4


def test_a_bias_outside_of_a_layer_is_an_operation_however_the_input_lies_in_memory() -> None:
    model = Function(lambda x, layer: F.linear(x.transpose(1, 2), layer.weight, layer.bias), nn.Linear(4, 3))
    # 5 positions of 3 outputs
    assert count(model, (torch.rand(1, 4, 5),), OPS).of({}) == 5 * 3 * (4 + 1)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.fft.fft, "aten::_fft_r2c"),
        (lambda x: torch.cdist(x, x), "aten::_cdist_forward"),
        (torch.linalg.inv, "aten::linalg_inv_ex"),
        (torch.linalg.matrix_exp, "aten::linalg_matrix_exp"),
    ],
)
def test_an_operator_that_nobody_counts_is_an_error_that_names_it(function: Callable[..., Any], name: str) -> None:
    model = nn.Sequential(nn.ReLU(), Function(function))
    with pytest.raises(UnknownCostError, match=rf"{name}, run in 1, .* or say ignore=\('{name}',\)"):
        count_macs(model, (torch.rand(1, 4, 4),))
    assert count_macs(model, (torch.rand(1, 4, 4),), ignore=[name]).of({}) == 0
    assert count(model, (torch.rand(1, 4, 4),), PARAMS_NO_NORM).of({}) == 0  # an operator has no parameters


def test_an_operator_that_is_not_of_torch_is_an_error_too() -> None:
    @torch.library.custom_op("oneshot_tests::double", mutates_args=())
    def double(x: Tensor) -> Tensor:
        return 2 * x

    with pytest.raises(UnknownCostError, match="oneshot_tests::double, run in the network, "):
        count_macs(Function(double), (torch.rand(1, 4),))
    assert count_macs(Function(double), (torch.rand(1, 4),), ignore=["oneshot_tests::*"]).of({}) == 0


def test_a_count_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), LayerChoice([nn.BatchNorm1d(4), nn.Dropout()], label="a"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_macs(model, (torch.rand(3, 4),))
    with pytest.raises(UnsupportedModelError):
        count_macs(model, (torch.rand(3, 5),))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_products_inside_of_a_layer_with_a_rule_are_the_rules_business() -> None:
    class Gram(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x.transpose(1, 2)

    x = torch.rand(1, 3, 4)
    assert count_macs(Gram(), (x,)).of({}) == 3 * 3 * 4
    assert count_macs(Gram(), (x,), spec=MACS.with_rule(Gram, lambda layer: 7)).of({}) == 7


def test_fused_kernels_are_switched_on_again() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    for width in (8, 7):
        try:
            count_macs(layer, (torch.rand(1, 5, width),))
        except UnsupportedModelError:
            assert width == 7
        assert torch.backends.mha.get_fastpath_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()


def test_steps_or_samples() -> None:
    layer, x = nn.GRU(3, 5), torch.rand(7, 2, 3)
    with pytest.raises(UnsupportedModelError, match=r"an input of 7 .* GRU with batch_first=False.*batch_dim=1"):
        count_macs(layer, (x,))
    assert count_macs(layer, (x,), batch_dim=1).of({}) == 7 * 15 * (3 + 5)
    assert count_macs(layer, (x[:, 0],), batch_dim=None).of({}) == 7 * 15 * (3 + 5)


# --- other costs ------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32))
def test_params_without_normalisation_are_those_of_every_rebuilt_network(seed: int) -> None:
    model, x = random_space(seed, dense), torch.rand(1, 4)
    owners = [id(p) for m in model.modules() if not isinstance(m, Mutable) for p in m.parameters(recurse=False)]
    if len(owners) > len(set(owners)):  # tied weights
        with pytest.raises(UnsupportedModelError, match="are one parameter"):
            count(model, (x,), PARAMS_NO_NORM)
        return
    cost = count(model, (x,), PARAMS_NO_NORM)
    for choices in architectures(model):
        assert cost.of(choices) == plain_params(rebuilt(model, choices)), choices


def toy(d: int) -> nn.Module:
    """Two convolutions added, a pool, one more convolution, a linear layer; on 15 or 15 * 15 positions."""
    conv = (nn.Conv1d, nn.Conv2d)[d - 1]

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = conv(3, 10, 3, padding="same"), conv(3, 10, 3, padding="same")
            self.last, self.linear = conv(10, 20, 5, padding="same"), nn.Linear(20 * 7**d, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.one(x) + self.other(x))
            x = F.max_pool1d(x, 2) if d == 1 else F.max_pool2d(x, 2)
            return self.linear(self.last(x).flatten(1))

    return Toy()


def simple() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv1d(3, 32, 3, padding="same"), nn.BatchNorm1d(32), nn.AvgPool1d(2), nn.ReLU6()),
        *(nn.Conv1d(32, 57, 5, padding="same"), nn.BatchNorm1d(57), nn.AvgPool1d(2), nn.ReLU()),
        *(nn.Flatten(), nn.Dropout(), nn.Linear(570, 3)),
    )


@pytest.mark.parametrize(
    ("model", "shape", "params", "ops"),
    [
        # 2 * 10 * (9 + 1) + 20 * (50 + 1) + 2 * (140 + 1); 200 * 15 + 1020 * 7 + 282
        (toy(1), (1, 3, 15), 1502, 10_422),
        # 2 * 10 * (27 + 1) + 20 * (250 + 1) + 2 * (980 + 1); 560 * 225 + 5020 * 49 + 1962
        (toy(2), (1, 3, 15, 15), 7542, 373_942),
        # 32 * (9 + 1) + 57 * (160 + 1) + 3 * (570 + 1); 320 * 40 + 9177 * 20 + 1713
        (simple(), (1, 3, 40), 11_210, 198_053),
    ],
)
def test_the_conventions_of_plinio(model: nn.Module, shape: tuple[int, ...], params: int, ops: int) -> None:
    x = torch.rand(shape)
    assert counted_cost("params_no_norm", model, (x,)).of({}) == params
    assert counted_cost("ops", model, (x,)).of({}) == ops


def test_a_choice_of_convolutions_in_the_middle() -> None:
    def conv(kernel: int) -> nn.Module:
        return nn.Conv2d(32, 32, kernel, padding="same")

    choice = LayerChoice([conv(3), nn.Sequential(conv(3), conv(3)), conv(5), nn.Identity()], label="a")
    uniform = {"a": torch.full((4,), 0.25, dtype=torch.float64)}
    x = torch.rand(1, 32, 64, 64)
    # (9248 + 2 * 9248 + 25632 + 0) / 4, and as much at each of 64 * 64 positions
    assert float(counted_cost("params_no_norm", choice, (x,)).expected(uniform)) == 13_344
    assert float(counted_cost("ops", choice, (x,)).expected(uniform)) == 13_344 * 4096


def test_a_layer_that_is_never_called_has_parameters() -> None:
    model, x = Weighted(3), torch.rand(1, 4)
    assert count(model, (x,), PARAMS_NO_NORM).of({}) == 4 * 3 + 3 + 3 * 4
    assert count_macs(model, (x,)).of({}) == 4 * 3 + 3 * 4


def test_a_shared_layer_has_its_parameters_once_and_where_it_stands() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(4, 4, bias=False)
            self.choice = LayerChoice([nn.Sequential(self.shared, self.shared), nn.Linear(4, 4)], label="a")

        def forward(self, x: Tensor) -> Tensor:
            return self.choice(x)

    model, x = Net(), torch.rand(1, 4)
    cost, macs = count(model, (x,), PARAMS_NO_NORM), count_macs(model, (x,))
    # the shared layer is in the network though option 1 does not call it
    assert [cost.of({"a": k}) for k in (0, 1)] == [16, 16 + 20]
    assert [macs.of({"a": k}) for k in (0, 1)] == [32, 16]


def test_a_cost_per_layer_that_depends_on_the_call_is_an_error() -> None:
    linear = nn.Linear(4, 4)
    model = nn.Sequential(linear, nn.Unflatten(1, (2, 2)), nn.Flatten(), linear)
    assert count(model, (torch.rand(1, 4),), replace(MACS, per_call=False)).of({}) == 16
    model = nn.Sequential(linear, Function(lambda x: x.repeat(2, 1)), linear)
    with pytest.raises(UnsupportedModelError, match=r"macs: 0 is due once, .* would cost \[16.0, 32.0\] MAC"):
        count(model, (torch.rand(1, 4),), replace(MACS, per_call=False))


def test_only_what_is_searched() -> None:
    model = nn.Sequential(nn.Linear(4, 4), LayerChoice([nn.Linear(4, 4), nn.Identity()], label="a"))
    whole, part = (count(model, (torch.rand(1, 4),), OPS, scope) for scope in ("all", "searchable"))
    assert [whole.of({"a": k}) for k in (0, 1)] == [40, 20]
    assert [part.of({"a": k}) for k in (0, 1)] == [20, 0]
    with pytest.raises(ConfigurationError, match=r"scope='fixed'.*'all' or 'searchable'"):
        count(model, (torch.rand(1, 4),), OPS, "fixed")  # type: ignore[arg-type]


def test_bytes_of_the_weights() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    # 216 weights; 8 biases, 8 scales and 8 shifts
    assert weight_bytes(model).of({}) == 216 + 24 * 4
    assert weight_bytes(model, bits=4, vector_bits=16).of({}) == 108 + 48
    assert weight_bytes(model, bits=32).of({}) == 4 * count_params(model).of({})
    choice = LayerChoice([nn.Linear(4, 4, bias=False), nn.Identity()], label="a")
    assert [weight_bytes(choice, bits=2).of({"a": k}) for k in (0, 1)] == [4, 0]
    with pytest.raises(ConfigurationError, match="bits=0"):
        weight_bytes(model, bits=0)


def test_costs_by_name() -> None:
    model, x = nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2)), torch.rand(1, 4)
    costs = {"params": 14, "params_no_norm": 10, "params_no_bias": 8, "macs": 8, "ops": 10, "weight_bytes": 8 + 6 * 4}
    for name, value in costs.items():
        cost = counted_cost(name, model, (x,))
        assert (cost.name, cost.of({})) == (name, value)
    with pytest.raises(ConfigurationError, match=f"cost 'flops': allowed are .*{', '.join(map(repr, sorted(costs)))}"):
        counted_cost("flops", model, (x,))


# --- what a rule of a base class does not know ------------------------------------------------------------------


class AdaptiveNorm(nn.LayerNorm):
    """A normalisation whose scale and shift come from a linear layer of its own: 8 * 16 products a position."""

    def __init__(self) -> None:
        super().__init__(8, elementwise_affine=False)
        self.modulation = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.modulation(x).chunk(2, -1)
        return super().forward(x) * scale + shift


class LowRank(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)
        self.down, self.up = nn.Parameter(torch.ones(2, 8)), nn.Parameter(torch.ones(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


class Quiet(nn.Conv2d):
    """A subclass that adds nothing with a weight."""

    def __init__(self) -> None:
        super().__init__(3, 4, 3)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


@pytest.mark.parametrize(("layer", "added"), [(AdaptiveNorm(), "modulation"), (LowRank(), "down")])
def test_a_subclass_that_adds_weights_needs_a_rule(layer: nn.Module, added: str) -> None:
    x = torch.rand(1, 8)
    for spec in (MACS, OPS, PARAMS_NO_NORM):
        with pytest.raises(UnknownCostError, match=rf"0 is a {type(layer).__name__} with \['{added}'"):
            count(nn.Sequential(layer), (x,), spec)
    own = MACS.with_rule(type(layer), lambda layer: 128)
    assert count(nn.Sequential(layer), (x,), own).of({}) == 128
    assert count_macs(nn.Sequential(Quiet()), (torch.rand(1, 3, 5, 5),)).of({}) == 9 * 4 * 27
    weighted = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))
    assert count_macs(nn.Sequential(weighted), (x,)).of({}) == 32


def test_one_number_beside_a_batch() -> None:
    class Stepped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 4)

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return self.layer(x) * t

    for t in (torch.rand(1), torch.tensor(1.0), torch.rand(8, 1)):
        assert count_macs(Stepped(), (t, torch.rand(8, 5))).of({}) == 20
    for dim in (7, -1, "0", True):
        with pytest.raises(ConfigurationError, match="batch_dim="):
            count_macs(nn.Linear(5, 4), (torch.rand(8, 5),), batch_dim=dim)  # type: ignore[arg-type]


@pytest.mark.parametrize("ignore", ["head.*", nn.Linear, (nn.Linear(1, 1),)])
def test_ignore_is_a_list_of_types_and_patterns(ignore: Any) -> None:
    with pytest.raises(ConfigurationError, match="a list of layer types and patterns is needed"):
        count_macs(nn.Linear(5, 4), (torch.rand(8, 5),), ignore=ignore)


def test_searchable_is_what_some_architectures_do_without() -> None:
    """Four layers of 16 MACs, two of which are always there."""
    model = Repeat(lambda i: nn.Linear(4, 4), depth=(2, 4), label="d")
    assert count(model, (torch.rand(1, 4),), MACS, "searchable").table == {"d": [0, 16, 32]}


def test_a_profiled_region_is_no_operator() -> None:
    class Marked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.profiler.record_function("layer"):
                return self.layer(x)

    assert count_macs(Marked(), (torch.rand(1, 5),)).of({}) == 20
