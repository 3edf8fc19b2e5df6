"""Groups of coupled channels: what they hold, by hand, and that zeros in them make channels zero, by hooks."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from random_networks import RandomNetwork, random_networks
from torch import Tensor, nn
from torch.nn import functional as F

from oneshot.errors import ConfigurationError, UnsupportedModelError
from oneshot.pit import PIT
from oneshot.regularizers.coupled import coupled_channels, coupled_inputs
from oneshot.regularizers.groups import Family, check_family, group_sizes


class Residual(nn.Module):
    """Input (3, 8, 8): a stem, a block of two convolutions added to it, a depthwise and a pointwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv1, self.norm1 = nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.pointwise = nn.Conv2d(6, 5, 1)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x))
        x = F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        return self.head(F.relu(self.pointwise(self.depthwise(x))).mean((2, 3)))


class Concat(nn.Module):
    """Input (2, 6, 6): 3 and 4 channels concatenated into a convolution of 5."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 4, 1)
        self.c, self.head = nn.Conv2d(7, 5, 1), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(torch.relu(torch.cat([self.a(x), self.b(x)], 1))).mean((2, 3)))


class Heads(nn.Module):
    """Input (5, 8), tokens: 2 heads of 3 in q, k and v, a residual, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 6)
        self.out, self.head = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 3)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((x + self.out(y)).mean(1))


class Tied(nn.Module):
    """Input (8): one weight, used in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.weight.T + self.bias) @ self.weight


class Sliced(nn.Module):
    """Input (2, 5, 5): numbers in the code, which are changed in a graph; its first layer stands last."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 2)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(2, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return self.head(torch.cat([x[:, :4].relu(), x[:, 4:].sigmoid()], 1).mean((2, 3)))


def named(families: list[Family]) -> dict[str, tuple[int, list[str]]]:
    return {family.name: (family.n, sorted(family.index)) for family in families}


def test_a_residual_sum_is_one_group_of_all_that_is_added() -> None:
    model = Residual()
    families = coupled_channels(model, (3, 8, 8))
    stem = ["conv2.weight", "depthwise.bias", "depthwise.weight", "norm2.bias", "norm2.weight", "stem.weight"]
    assert named(families) == {
        "stem": (6, sorted([*stem, "stem_norm.bias", "stem_norm.weight"])),
        "conv1": (4, ["conv1.weight", "norm1.bias", "norm1.weight"]),
        "pointwise": (5, ["pointwise.bias", "pointwise.weight"]),
    }
    # stem 27 + 2, conv2 36 + 2, depthwise 9 + 1; conv1 54 + 2; pointwise 6 + 1
    parameters = dict(model.named_parameters())
    sizes = {family.name: group_sizes(family, parameters).tolist() for family in families}
    assert sizes == {"stem": [77] * 6, "conv1": [56] * 4, "pointwise": [7] * 5}


def test_the_readers_of_a_channel() -> None:
    families = coupled_inputs(Residual(), (3, 8, 8))
    assert named(families) == {
        "stem: inputs": (6, ["conv1.weight", "pointwise.weight"]),
        "conv1: inputs": (4, ["conv2.weight"]),
        "pointwise: inputs": (5, ["head.weight"]),
    }
    assert families[0].index["conv1.weight"].shape == (1, 6, 1, 1)
    assert families[0].index["conv1.weight"].flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_concatenated_channels_have_groups_of_their_own() -> None:
    assert named(coupled_channels(Concat(), (2, 6, 6))) == {
        "a": (3, ["a.bias", "a.weight"]),
        "b": (4, ["b.bias", "b.weight"]),
        "c": (5, ["c.bias", "c.weight"]),
    }
    families = coupled_inputs(Concat(), (2, 6, 6))[:2]
    readers = {family.name: family.index["c.weight"].flatten().tolist() for family in families}
    assert readers == {"a: inputs": [0, 1, 2, -1, -1, -1, -1], "b: inputs": [-1, -1, -1, 0, 1, 2, 3]}


def test_channels_flattened_into_a_linear_layer() -> None:
    model = nn.Sequential(nn.Conv1d(1, 3, 1), nn.Flatten(), nn.Linear(12, 2))
    (family,) = coupled_inputs(model, (1, 4))
    assert family.index["2.weight"].tolist() == [[0] * 4 + [1] * 4 + [2] * 4]


def test_a_head_of_attention_is_a_group() -> None:
    (family,) = coupled_channels(Heads(), (5, 8))
    assert sorted(family.index) == sorted(f"{layer}.{leaf}" for layer in "qkv" for leaf in ("weight", "bias"))
    assert family.n == 2
    assert family.index["v.bias"].tolist() == [0, 0, 0, 1, 1, 1]


def test_a_tied_weight_makes_and_reads() -> None:
    model = Tied()
    assert named(coupled_channels(model, (8,))) == {"weight": (4, ["bias", "weight"])}
    (family,) = coupled_channels(model, (8,))
    with torch.no_grad():
        model.weight[family.index["weight"].expand(4, 8) == 2] = 0
    assert model.weight[2].eq(0).all()
    assert int(model.weight.eq(0).sum()) == 8


def test_names_are_those_of_the_model_where_pit_writes_a_graph() -> None:
    model = Sliced()
    assert PIT(model, (2, 5, 5)).space.as_graph
    families = coupled_channels(model, (2, 5, 5))
    parameters = dict(model.named_parameters())
    for family in families:
        check_family(family, parameters)
    # The channels of each half may be cut, and one of each half stays.
    assert sum(family.n for family in families) == 8
    rows = torch.stack([family.index["conv.weight"].flatten() for family in families])
    assert ((rows >= 0).sum(0) == 1).all()


def test_a_shared_module_has_its_first_name() -> None:
    layer = nn.Linear(6, 6)
    model = nn.Sequential(nn.Linear(4, 6), layer, nn.ReLU(), layer, nn.Linear(6, 2))
    names = {name for family in coupled_channels(model, (4,)) for name in family.index}
    assert names == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_excluded_layers_and_parameters_that_do_not_learn() -> None:
    model = Residual()
    assert list(named(coupled_channels(model, (3, 8, 8), exclude="stem"))) == ["conv1", "pointwise"]
    model.norm1.requires_grad_(False)
    assert named(coupled_channels(model, (3, 8, 8)))["conv1"] == (4, ["conv1.weight"])
    model.requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match="none of its parameters learns"):
        coupled_channels(model, (3, 8, 8))


def test_errors() -> None:
    with pytest.raises(UnsupportedModelError, match="an output of the network"):
        coupled_channels(nn.Conv1d(1, 3, 1), (1, 4))
    with pytest.raises(UnsupportedModelError, match="an output of the network"):
        coupled_channels(nn.Linear(3, 4), (3,))
    with pytest.raises(ConfigurationError, match="fits no module"):
        coupled_channels(Residual(), (3, 8, 8), exclude="steem")
    with pytest.raises(ConfigurationError, match="input_shape"):
        coupled_channels(Residual())


def test_the_model_stays_as_it_is() -> None:
    model = Residual().train()
    model.norm1.eval()
    before = copy.deepcopy(model.state_dict())
    coupled_channels(model, (3, 8, 8))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training
    assert not model.norm1.training


@settings(max_examples=12, derandomize=True, database=None, deadline=None)
@given(random_networks())
def test_families_of_random_networks_fit_and_do_not_overlap(network: RandomNetwork) -> None:
    parameters = dict(network.model.named_parameters())
    for function in (coupled_channels, coupled_inputs):
        try:
            families = function(network.model, example_input=network.inputs)
        except UnsupportedModelError:
            continue
        times = {name: torch.zeros(p.shape, dtype=torch.int64) for name, p in parameters.items()}
        for family in families:
            check_family(family, parameters)
            for name, index in family.index.items():
                times[name] += (index >= 0).expand_as(times[name])
        if function is coupled_inputs:
            continue
        # A tied weight may be in groups of both of its sides; any other element is in one group.
        twice = {name for name, count in times.items() if int(count.max()) > 1}
        assert all(min(parameters[name].shape) > 1 for name in twice)
