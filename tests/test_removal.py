"""Removal of zero channels: what is cut by hand counts, what must not be cut, and outputs before and after."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import RandomNetwork, random_networks
from test_coupled_groups import Concat, Residual, Sliced, Tied
from torch import Tensor, nn
from torch.nn import functional as F

from oneshot import LayerChoice
from oneshot.errors import ConfigurationError, ExportError, UnsupportedModelError
from oneshot.regularizers.coupled import coupled_channels, coupled_inputs
from oneshot.regularizers.groups import Family
from oneshot.regularizers.removal import Removed, remove_zero_channels


def trained(model: nn.Module, shape: tuple[int, ...], steps: int = 3, seed: int = 0) -> nn.Module:
    """After some steps: norms have statistics, and nothing is 0 or 1 by its initial value."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(2 + torch.randn(8, *shape, generator=generator)).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                low, high = (0.5, 1.5) if name.endswith("weight") else (-0.5, 0.5)
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * (high - low) + low)
    return model


def zero(model: nn.Module, families: list[Family], channels: dict[str, list[int]], only: Any = None) -> None:
    """Zeros in the groups of these numbers, of the parameters that ``only`` takes."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for family in families:
            for name, index in family.index.items():
                if only is None or only(parameters[name]):
                    chosen = torch.isin(index, torch.tensor(channels.get(family.name, []), dtype=torch.int64))
                    parameters[name][chosen.expand_as(parameters[name])] = 0


def is_matrix(parameter: Tensor) -> bool:
    return parameter.dim() > 1


@torch.no_grad()
def difference(one: nn.Module, other: nn.Module, *inputs: Tensor) -> float:
    """max |a - b| / max |a| in eval mode and float64."""
    one, other = (copy.deepcopy(net).double().eval() for net in (one, other))
    outputs = [net(*(x.double() if x.is_floating_point() else x for x in inputs)) for net in (one, other)]
    a, b = (torch.cat([t.flatten() for t in (o if isinstance(o, tuple) else (o,))]) for o in outputs)
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))


def equal(model: nn.Module, removed: Removed, shape: tuple[int, ...]) -> bool:
    return difference(model, removed.network, 3 * torch.randn(16, *shape)) <= 1e-5


def steps_run(model: nn.Module, shape: tuple[int, ...], steps: int) -> None:
    """Forward, backward, and a step with momentum."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1, momentum=0.9)
    before = [parameter.clone() for parameter in model.parameters()]
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, *shape)).square().mean().backward()
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# ---- what is cut -----------------------------------------------------------------------------------------------


def conv_norm_conv() -> nn.Sequential:
    """Input (3, 6, 6)."""
    first, second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
    return nn.Sequential(first, nn.BatchNorm2d(16), nn.ReLU(), second)


def test_a_filter_with_its_norm() -> None:
    model = trained(conv_norm_conv(), (3, 6, 6))
    zero(model, coupled_channels(model, (3, 6, 6)), {"0": [5]})
    assert float(model[1].running_mean[5].abs()) > 0.01  # the norm would make something else of zero
    removed = remove_zero_channels(model, (3, 6, 6))
    small = removed.network
    assert (small[0].out_channels, small[3].in_channels, small[1].num_features) == (15, 15, 15)
    assert {t.shape for t in small[1].state_dict().values()} == {torch.Size([15]), torch.Size([])}
    assert removed.removed == {"0": (5,)}
    assert removed.kept == {"0": tuple(i for i in range(16) if i != 5)}
    # 16 * (27 + 1 + 2) + 4 * 144 + 4 = 1060, without 30 and 4 * 9
    assert (removed.before, removed.after) == (
        {"channels": 16, "parameters": 1060},
        {"channels": 15, "parameters": 994},
    )
    assert equal(model, removed, (3, 6, 6))
    steps_run(small, (3, 6, 6), 1)


def test_filters_before_a_flattened_linear_layer() -> None:
    model = nn.Sequential(nn.Conv2d(2, 10, 3), nn.ReLU(), nn.Flatten(), nn.Linear(90, 3))
    zero(model, coupled_channels(model, (2, 5, 5)), {"0": [0, 7, 9]})
    removed = remove_zero_channels(model, (2, 5, 5))
    assert removed.network[3].in_features == 9 * 7
    assert equal(model, removed, (2, 5, 5))
    steps_run(removed.network, (2, 5, 5), 2)


def test_a_residual_sum_with_all_its_addends_and_its_depthwise_convolution() -> None:
    model = trained(Residual(), (3, 8, 8))
    zero(model, coupled_channels(model, (3, 8, 8)), {"stem": [1, 4], "conv1": [0]})
    removed = remove_zero_channels(model, (3, 8, 8))
    assert removed.removed == {"stem": (1, 4), "conv1": (0,), "pointwise": ()}
    small = removed.network
    assert isinstance(small, Residual)
    assert (small.stem.out_channels, small.conv2.out_channels, small.depthwise.groups) == (4, 4, 4)
    assert (small.conv1.out_channels, small.conv1.in_channels, small.pointwise.in_channels) == (3, 4, 4)
    assert equal(model, removed, (3, 8, 8))
    steps_run(small, (3, 8, 8), 1)


def test_zeros_in_one_addend_only_are_no_zero_channel() -> None:
    model = trained(Residual(), (3, 8, 8))
    with torch.no_grad():
        model.stem.weight[1] = 0
        model.stem_norm.weight[1] = model.stem_norm.bias[1] = 0
    removed = remove_zero_channels(model, (3, 8, 8))
    assert removed.removed == {"stem": (), "conv1": (), "pointwise": ()}
    assert type(removed.network) is Residual
    assert equal(model, removed, (3, 8, 8))


def test_concatenated_channels() -> None:
    model = Concat()
    zero(model, coupled_channels(model, (2, 6, 6)), {"a": [0], "b": [1, 3]})
    removed = remove_zero_channels(model, (2, 6, 6))
    assert (removed.network.a.out_channels, removed.network.b.out_channels) == (2, 2)
    assert removed.network.c.in_channels == 4
    assert equal(model, removed, (2, 6, 6))


def test_what_only_zero_weights_read_goes_whatever_it_is() -> None:
    model = trained(Residual(), (3, 8, 8))
    zero(model, coupled_inputs(model, (3, 8, 8)), {"stem: inputs": [3], "pointwise: inputs": [2]})
    removed = remove_zero_channels(model, (3, 8, 8))
    assert removed.removed == {"stem": (3,), "conv1": (), "pointwise": (2,)}
    assert equal(model, removed, (3, 8, 8))


def test_one_of_two_readers_is_not_enough() -> None:
    model = trained(Residual(), (3, 8, 8))
    with torch.no_grad():
        model.pointwise.weight[:, 3] = 0
    assert remove_zero_channels(model, (3, 8, 8)).removed["stem"] == ()


def test_a_norm_of_zeros() -> None:
    """Network slimming: the filter itself is not zero."""
    model = trained(conv_norm_conv(), (3, 6, 6))
    with torch.no_grad():
        model[1].weight[[2, 3]] = 0
        model[1].bias[[2, 4]] = 0
    removed = remove_zero_channels(model, (3, 6, 6))
    assert removed.removed == {"0": (2,)}  # 3 is its bias, 4 is alive
    assert equal(model, removed, (3, 6, 6))


def test_a_tied_weight() -> None:
    model = Tied()
    zero(model, coupled_channels(model, (8,)), {"weight": [1, 2]})
    removed = remove_zero_channels(model, (8,))
    assert removed.network.weight.shape == (2, 8)
    assert equal(model, removed, (8,))


def test_numbers_in_the_code() -> None:
    model = trained(Sliced(), (2, 5, 5))
    zero(model, coupled_channels(model, (2, 5, 5)), {"conv": [1]})
    removed = remove_zero_channels(model, (2, 5, 5))
    assert sum(map(len, removed.removed.values())) == 1
    assert equal(model, removed, (2, 5, 5))


def test_nothing_to_remove_is_an_equal_copy() -> None:
    model = Residual()
    removed = remove_zero_channels(model, (3, 8, 8))
    assert removed.before == removed.after
    assert type(removed.network) is Residual
    state = removed.network.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in removed.network.parameters()}


def test_the_model_and_its_modes_stay() -> None:
    model = trained(Residual(), (3, 8, 8)).train()
    model.norm1.eval()
    model.head.weight.requires_grad_(False)
    zero(model, coupled_channels(model, (3, 8, 8)), {"conv1": [0]})
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    small = remove_zero_channels(model, (3, 8, 8)).network
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]


# ---- what must not be cut --------------------------------------------------------------------------------------


def biased(bias: float, activation: nn.Module) -> nn.Sequential:
    """Input (1, 6, 6): four filters, of which 1 and 2 are zero, 2 with this bias and 1 without one."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), activation, nn.Conv2d(4, 3, 3, padding=1))
    with torch.no_grad():
        model[0].weight[1:3] = 0
        model[0].bias[1], model[0].bias[2] = 0.0, bias
    return model


def test_a_bias_on_a_zero_filter_is_refused() -> None:
    with pytest.raises(ExportError, match=r"channel 2 of '0' is 0\.75 where '2' reads it.*coupled_channels.*'keep'"):
        remove_zero_channels(biased(0.75, nn.ReLU()), (1, 6, 6))


def test_or_it_stays() -> None:
    model = biased(0.75, nn.ReLU())
    removed = remove_zero_channels(model, (1, 6, 6), constant="keep")
    assert (removed.removed, removed.constant) == ({"0": (1,)}, {"0": (2,)})
    assert equal(model, removed, (1, 6, 6))


def test_a_bias_that_the_activation_cuts_off_is_none() -> None:
    model = biased(-0.75, nn.ReLU())
    removed = remove_zero_channels(model, (1, 6, 6))
    assert (removed.removed, removed.constant) == ({"0": (1, 2)}, {})
    assert equal(model, removed, (1, 6, 6))


def test_an_activation_that_makes_something_of_zero() -> None:
    model = biased(0.0, nn.Sigmoid())
    with pytest.raises(ExportError, match=r"channel 1 of '0' is 0\.5 where.*channel 2 of '0' is 0\.5"):
        remove_zero_channels(model, (1, 6, 6))
    assert remove_zero_channels(model, (1, 6, 6), constant="keep").constant == {"0": (1, 2)}


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.Tanh()])
def test_an_activation_that_leaves_zero_zero(activation: nn.Module) -> None:
    model = biased(0.0, activation)
    removed = remove_zero_channels(model, (1, 6, 6))
    assert removed.removed == {"0": (1, 2)}
    assert equal(model, removed, (1, 6, 6))


def test_a_zero_filter_before_a_norm_that_is_not() -> None:
    """gamma (0 - mean) / sqrt(var + eps) + beta of statistics 2 and 4 - eps, gamma 3, beta 4: 1, behind the ReLU 1."""
    model = conv_norm_conv()
    with torch.no_grad():
        model[0].weight[5], model[0].bias[5] = 0, 0
        model[1].running_mean[5], model[1].running_var[5] = 2, 4 - 1e-5
        model[1].weight[5], model[1].bias[5] = 3, 4
    with pytest.raises(ExportError, match=r"channel 5 of '0' is 1 where '3' reads it"):
        remove_zero_channels(model, (3, 6, 6))
    assert remove_zero_channels(model, (3, 6, 6), constant="keep").removed == {"0": ()}


def test_the_constant_is_named_where_it_is_read() -> None:
    """The stem's channel 1 is 0 where conv1 reads it, and the depthwise convolution's bias where pointwise does."""
    model = trained(Residual(), (3, 8, 8))
    zero(model, coupled_channels(model, (3, 8, 8)), {"stem": [1]})
    with torch.no_grad():
        model.depthwise.bias[1] = -0.25
    with pytest.raises(ExportError, match=r"channel 1 of 'stem' is -0\.25 where 'pointwise' reads it\. Without"):
        remove_zero_channels(model, (3, 8, 8))
    removed = remove_zero_channels(model, (3, 8, 8), constant="keep")
    assert removed.constant == {"stem": (1,)}
    assert equal(model, removed, (3, 8, 8))


def test_a_zero_norm_whose_channel_is_alive_stays_without_a_word() -> None:
    model = trained(Residual(), (3, 8, 8))
    with torch.no_grad():
        for norm in (model.stem_norm, model.norm2):
            norm.weight[2] = norm.bias[2] = 0
        model.depthwise.bias[2] = 0.3
    removed = remove_zero_channels(model, (3, 8, 8))
    assert removed.removed["stem"] == ()
    with torch.no_grad():
        model.depthwise.bias[2] = 0
    assert remove_zero_channels(model, (3, 8, 8)).removed["stem"] == (2,)


class DeadAddend(nn.Module):
    """Input (2, 4, 4): a zero norm, and an addend that is off for all inputs of usual size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(2, 4, 1)
        self.head = nn.Conv2d(4, 2, 1)
        with torch.no_grad():
            self.norm.weight[0] = self.norm.bias[0] = 0
            self.b.bias[0] = -100

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.a(x)) + F.relu(self.b(x)))


def test_a_channel_that_is_zero_by_chance_stays() -> None:
    removed = remove_zero_channels(DeadAddend(), (2, 4, 4))
    assert removed.removed == {"a": ()}


class Shifted(nn.Module):
    """Input (2, 4, 4): something of the input is added to every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x) + x.mean((1, 2, 3), keepdim=True))


def test_zero_weights_of_a_channel_that_depends_on_the_input() -> None:
    model = Shifted()
    zero(model, coupled_channels(model, (2, 4, 4)), {"a": [1]})
    removed = remove_zero_channels(model, (2, 4, 4))
    assert (removed.removed, removed.constant) == ({"a": ()}, {})


def test_all_channels_of_a_layer() -> None:
    model = conv_norm_conv()
    zero(model, coupled_channels(model, (3, 6, 6)), {"0": list(range(16))})
    with pytest.raises(ExportError, match=r"all 16 channels of '0' are zero.*GroupLasso\(least=1\)"):
        remove_zero_channels(model, (3, 6, 6))
    with pytest.raises(ExportError, match="all 16 channels"):
        remove_zero_channels(model, (3, 6, 6), constant="keep")
    with torch.no_grad():
        model[1].bias[3] = 1  # now one of them is a constant
    removed = remove_zero_channels(model, (3, 6, 6), constant="keep")
    assert removed.kept == removed.constant == {"0": (3,)}
    assert equal(model, removed, (3, 6, 6))


class Squeezed(nn.Module):
    """Input (1, 5): a squeeze, which would take a single channel away."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(1, 4, 5), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).squeeze())


def test_an_axis_that_has_to_keep_two_keeps_a_zero_one() -> None:
    model = Squeezed()
    zero(model, coupled_channels(model, (1, 5)), {"conv": [0, 2, 3]})
    removed = remove_zero_channels(model, (1, 5))
    assert removed.kept == {"conv": (1, 3)}
    assert removed.constant == {}
    assert equal(model, removed, (1, 5))


def test_all_readers_of_a_layer() -> None:
    model = conv_norm_conv()
    with torch.no_grad():
        model[3].weight.zero_()
    with pytest.raises(ExportError, match="all 16 channels of '0'"):
        remove_zero_channels(model, (3, 6, 6))


def test_a_network_that_has_diverged() -> None:
    model = biased(0.0, nn.ReLU())
    with torch.no_grad():
        model[2].bias[0] = float("nan")
    with pytest.raises(ExportError, match="not finite"):
        remove_zero_channels(model, (1, 6, 6))


def test_arguments() -> None:
    with pytest.raises(ConfigurationError, match=r"constant='drop'.*'refuse' and 'keep'"):
        remove_zero_channels(Concat(), (2, 6, 6), constant="drop")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="input_shape"):
        remove_zero_channels(Concat())
    choice = LayerChoice([nn.Linear(3, 3), nn.Identity()], "a")
    with pytest.raises(ConfigurationError, match="fixed"):
        remove_zero_channels(nn.Sequential(choice, nn.Linear(3, 2)), (3,))
    with pytest.raises(UnsupportedModelError, match="an output of the network"):
        remove_zero_channels(nn.Linear(3, 2), (3,))


# ---- random networks -------------------------------------------------------------------------------------------


@settings(max_examples=10, derandomize=True, database=None, deadline=None)
@given(random_networks(), st.randoms(use_true_random=False), st.sampled_from(["all", "weights", "readers"]))
def test_random_networks_compute_the_same_or_are_refused(network: RandomNetwork, rng: Any, kind: str) -> None:
    model = network.model.double()
    inputs = tuple(x.double() for x in network.inputs)
    try:
        families = (coupled_inputs if kind == "readers" else coupled_channels)(model, example_input=inputs)
    except UnsupportedModelError:
        return
    channels = {family.name: rng.sample(range(family.n), rng.randrange(family.n)) for family in families}
    zero(model, families, channels, is_matrix if kind == "weights" else None)
    refusal = ""
    try:
        removed = remove_zero_channels(model, example_input=inputs)
    except ExportError as error:
        refusal = str(error)
        removed = remove_zero_channels(model, example_input=inputs, constant="keep")
    assert not refusal or ("channels with zero weights" in refusal and removed.constant)
    assert difference(model, removed.network, *(torch.randn_like(x) for x in inputs)) <= 1e-5
    if kind == "readers":  # nothing of them is left to see
        gone = {f"{label}: inputs": set(numbers) for label, numbers in removed.removed.items()}
        assert all(set(numbers) <= gone[name] for name, numbers in channels.items())
