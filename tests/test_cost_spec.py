"""The table of rules: which one wins whatever the order, what ties, and channel counts that are tensors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from oneshot import LayerChoice, count
from oneshot.cost import MACS, OPS, PARAMS_NO_BIAS, PARAMS_NO_NORM, CostSpec, LayerSpec, Rule
from oneshot.errors import ConfigurationError, UnknownCostError


class Depthwise(nn.Conv2d):
    pass


def always(layer: LayerSpec) -> bool:
    return True


def is_depthwise(layer: LayerSpec) -> bool:
    return layer.depthwise


def is_wide(layer: LayerSpec) -> bool:
    return layer.out_channels >= 100


def price(value: float) -> Callable[[LayerSpec], float]:
    return lambda layer: value


RULES = [
    Rule(nn.Module, price(1)),
    Rule(_ConvNd, price(2)),
    Rule(_ConvNd, price(3), is_depthwise),
    Rule(nn.Conv2d, price(4)),
    Rule(nn.Conv2d, price(5), is_depthwise),
    Rule(nn.Conv1d, price(6), is_wide),
    Rule(Depthwise, price(7), is_wide),
]
DENSE, DEPTHWISE, WIDE = LayerSpec(8, 8), LayerSpec(8, 8, groups=8), LayerSpec(8, 100)


@given(st.permutations(RULES))
def test_the_most_specific_rule_wins_in_any_order(rules: list[Rule]) -> None:
    spec = CostSpec("c", "u")
    for rule in rules:
        spec = spec.with_rule(*rule)

    def cost(layer_type: type[nn.Module], layer: LayerSpec) -> float:
        formula = spec.formula_for(layer_type, layer)
        assert formula is not None
        return formula(layer)

    assert [cost(nn.Linear, layer) for layer in (DENSE, DEPTHWISE, WIDE)] == [1, 1, 1]
    assert [cost(nn.Conv3d, layer) for layer in (DENSE, DEPTHWISE, WIDE)] == [2, 3, 2]
    assert [cost(nn.Conv2d, layer) for layer in (DENSE, DEPTHWISE, WIDE)] == [4, 5, 4]
    # no rule of Conv1d itself holds: its base decides
    assert [cost(nn.Conv1d, layer) for layer in (DENSE, DEPTHWISE, WIDE)] == [2, 3, 6]
    assert [cost(Depthwise, layer) for layer in (DENSE, DEPTHWISE, WIDE)] == [4, 5, 7]


def test_a_spec_is_extended_by_a_new_one() -> None:
    first = CostSpec("c", "u", per_call=False, functional=price(9))
    second = first.with_rule(nn.Linear, price(1))
    assert (first.rules, len(second.rules)) == ((), 1)
    assert (second.name, second.unit, second.per_call, second.functional) == ("c", "u", False, first.functional)
    assert first.formula_for(nn.Linear, DENSE) is None
    assert (first.covers(nn.Linear), second.covers(nn.Linear), second.covers(nn.Conv1d)) == (False, True, False)
    with pytest.raises(AttributeError):
        second.unit = "other"  # type: ignore[misc]


@pytest.mark.parametrize("condition", [None, is_wide])
def test_one_type_and_condition_twice_is_an_error_that_names_both(condition: Callable[[LayerSpec], bool]) -> None:
    spec = CostSpec("c", "u").with_rule(nn.Linear, math.floor, condition)
    with pytest.raises(ConfigurationError, match=r"c: two rules .*'Linear.*floor' and 'Linear.*ceil'"):
        spec.with_rule(nn.Linear, math.ceil, condition)


def test_two_conditions_that_both_hold_are_an_error_that_names_both() -> None:
    spec = CostSpec("c", "u").with_rule(nn.Linear, math.floor, is_wide).with_rule(nn.Linear, math.ceil, always)
    assert spec.formula_for(nn.Linear, DENSE) is math.ceil
    with pytest.raises(ConfigurationError, match=r"Linear has two rules.*'Linear if is_wide.*floor' and .*always"):
        spec.formula_for(nn.Linear, WIDE)


def test_a_rule_is_for_a_type_of_layer() -> None:
    with pytest.raises(ConfigurationError, match=r"a rule for 'Linear'; a subclass of torch\.nn\.Module"):
        CostSpec("c", "u").with_rule("Linear", price(1))  # type: ignore[arg-type]


def test_a_condition_that_does_not_hold_leaves_a_layer_without_a_price() -> None:
    spec = CostSpec("c", "u").with_rule(nn.Linear, price(1), is_wide)
    assert count(nn.Linear(2, 100), (torch.rand(1, 2),), spec).of({}) == 1
    with pytest.raises(UnknownCostError, match="c: the network is a Linear for which no condition holds"):
        count(nn.Linear(2, 3), (torch.rand(1, 2),), spec)


# --- a spec of one's own: cycles of the GAP8 microcontroller ---------------------------------------------------------


def gap8_conv(layer: LayerSpec) -> int:
    """Two rows and eight columns at once, channels in fours (PLiNIO's model)."""
    (kx, ky), (ox, oy) = layer.kernel, layer.output_size
    inner = kx * ky * layer.in_channels
    load = 2 * inner + math.ceil(layer.out_channels / 4) * (5 + 14 * math.ceil(inner / 4) + 10)
    return math.ceil(ox / 2) * math.ceil(oy / 8) * load


def gap8_depthwise(layer: LayerSpec) -> int:
    return 4 * math.ceil(layer.out_channels / 4) * math.prod(layer.output_size) * math.prod(layer.kernel)


def gap8_linear(layer: LayerSpec) -> int:
    return math.ceil(layer.in_channels / 2) * math.ceil(layer.out_channels / 4)


GAP8 = (
    CostSpec("gap8", "cycle")
    .with_rule(nn.Conv2d, gap8_conv)
    .with_rule(nn.Conv2d, gap8_depthwise, is_depthwise)
    .with_rule(nn.Linear, gap8_linear)
)


def test_cycles_of_gap8() -> None:
    convs = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*convs, nn.Flatten(), nn.Linear(1024, 10))
    # 4 * 1 * (2*27 + 2 * (5 + 14*7 + 10)) = 1120; 4 * 1 * (2*72 + 4 * (5 + 14*18 + 10)) = 4848; 512 * 3 = 1536
    cost = count(model, (torch.rand(1, 3, 8, 8),), GAP8)
    assert (cost.name, cost.unit, cost.of({})) == ("gap8", "cycle", 1120 + 4848 + 1536)
    # depthwise: 4 * 2 channels in fours * 8*8 * 3*3
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    assert count(depthwise, (torch.rand(1, 8, 8, 8),), GAP8).of({}) == 4 * 2 * 64 * 9


def test_a_product_without_a_formula_is_an_error() -> None:
    class Gram(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x.T

    model = nn.Sequential(nn.Linear(4, 4), LayerChoice({"gram": Gram()}))
    with pytest.raises(UnknownCostError, match=r"gap8: aten::mm, run in 1\.candidates\.gram outside of all layers"):
        count(model, (torch.rand(1, 4),), GAP8)


# --- channels that are searched ---------------------------------------------------------------------------------

SPECS = {spec.name: spec for spec in (MACS, OPS, PARAMS_NO_NORM, PARAMS_NO_BIAS)}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("layer_type", [nn.Conv2d, nn.ConvTranspose2d, nn.Linear])
def test_tensors_for_channels_give_the_count_and_its_gradient(name: str, layer_type: type[nn.Module]) -> None:
    def cost(c_in: Tensor, c_out: Tensor, taps: Tensor) -> Tensor:
        kernel = () if layer_type is nn.Linear else (taps, 3)
        layer = LayerSpec(c_in, c_out, kernel, positions=20, in_positions=7, has_bias=True)
        formula = SPECS[name].formula_for(layer_type, layer)
        assert formula is not None
        return formula(layer) + 0 * taps

    at = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (6.0, 10.0, 5.0)]
    assert torch.autograd.gradcheck(cost, at)  # against finite differences
    whole = cost(*(tensor.detach().long() for tensor in at))
    assert float(cost(*at).detach()) == int(whole)


def test_tensors_in_a_depthwise_layer() -> None:
    channels = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    layer = LayerSpec(channels, channels, (3, 3), groups=channels, positions=4)
    assert layer.depthwise
    # 4 positions, 9 taps per channel
    cost = MACS.formula_for(nn.Conv2d, layer)(layer)
    assert float(cost.detach()) == 4 * 9 * 5
    cost.backward()
    assert float(channels.grad) == pytest.approx(4 * 9, rel=1e-12)


@given(*[st.integers(1, 10**6)] * 3, st.integers(1, 64))
@settings(max_examples=50)
def test_ints_stay_exact_ints(c_in: int, c_out: int, positions: int, groups: int) -> None:
    layer = LayerSpec(c_in * groups, c_out * groups, (7, 7), groups, positions, has_bias=True)
    cost = OPS.formula_for(nn.Conv2d, layer)(layer)
    assert type(cost) is int
    assert cost == positions * (c_out * groups) * (c_in * 49 + 1)
