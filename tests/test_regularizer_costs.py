"""Regularizers of costs against their formulas by hand, the page they are known from, and what they do in a loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oneshot import DUCCIO, L2, PIT, BaseRegularizer, GroupLasso, LayerChoice, Regularizer, Schedule, SuperNet
from oneshot.errors import CheckpointError, ConfigurationError, InfeasibleTargetError
from oneshot.regularizers.base import Sum, gradient_share


class Costs:
    """A network of which only the costs are known; what it would be exported with may be another number."""

    def __init__(self, hard: dict[str, float] | None = None, **costs: float) -> None:
        self.values = {
            name: torch.tensor(cost, dtype=torch.float64, requires_grad=True) for name, cost in costs.items()
        }
        self.asked = 0
        if hard is not None:
            self.hard = hard
            self.hard_cost = lambda name: hard[name]

    def get_cost(self, name: str) -> Tensor:
        self.asked += 1
        return self.values[name]


def number(value: Tensor) -> float:
    return value.detach().item()


def dense() -> nn.Sequential:
    """8 hidden units of 4 + 1 + 2 = 7 parameters, and 2 biases: 58, at least 9."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def gradients(value: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(parameters)))


# --- DUCCIO: the strengths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ramp", "wanted"),
    [
        # s = 0.6 / (1000 - 400) = 0.001, times 600: 0.6 min(1, 0.01 + 0.99 e / 5)
        ("half", [0.006, 0.1248, 0.2436, 0.3624, 0.4812, 0.6, 0.6, 0.6, 0.6, 0.6]),
        # 0.6 (0.01 + 0.99 e / 9)
        ("end", [0.006, 0.072, 0.138, 0.204, 0.27, 0.336, 0.402, 0.468, 0.534, 0.6]),
    ],
)
def test_strength_of_an_epoch(ramp: Any, wanted: list[float]) -> None:
    reg = DUCCIO({"params": 400.0}, task_loss=0.6, ramp=ramp)
    network = Costs(params=1000.0)
    found = [reg(network, epoch, 10) for epoch in range(10)]
    assert [number(value) for value in found] == pytest.approx(wanted, rel=1e-12)
    assert reg.final_strengths == {"params": pytest.approx(0.001)}
    for value, want in zip(found, wanted, strict=True):
        (slope,) = torch.autograd.grad(value, [network.values["params"]])
        assert number(slope) == pytest.approx(want / 600)


def test_end_is_the_default_and_without_an_epoch_the_strength_is_final() -> None:
    reg = DUCCIO({"params": torch.tensor(400)}, task_loss=torch.tensor(0.6))
    assert number(reg(Costs(params=1000.0), 1, 10)) == pytest.approx(0.072)
    assert number(reg(Costs(params=1000.0))) == pytest.approx(0.6)
    with pytest.raises(ConfigurationError, match="epoch 3 of how many"):
        reg(Costs(params=1000.0), 3)


@pytest.mark.parametrize(("ramp", "n", "wanted"), [("end", 1, 1.0), ("end", 2, 0.01), ("half", 1, 0.01)])
def test_the_first_epoch_of_very_short_searches(ramp: Any, n: int, wanted: float) -> None:
    """The only epoch is the last one; with 'half' of N = 1 it is still the first: 0.01 + 0.99 * 0."""
    reg = DUCCIO({"c": 1.0}, final_strengths=(2.0,), ramp=ramp)
    assert number(reg(Costs(c=4.0), 0, n)) == pytest.approx(wanted * 6)


def test_the_strength_is_that_of_the_first_call() -> None:
    """0.001 stays: at 700 the value is 0.3, and at the target 0."""
    reg = DUCCIO({"params": 400.0}, task_loss=0.6)
    assert [number(reg(Costs(params=c))) for c in (1000.0, 700.0, 400.0, 300.0, 1600.0)] == pytest.approx(
        [0.6, 0.3, 0.0, 0.0, 1.2]
    )


def test_the_hard_cost_gives_the_strength_and_the_cost_of_the_step_the_value() -> None:
    reg = DUCCIO({"params": 400.0}, task_loss=0.6)
    assert number(reg(Costs({"params": 1000.0}, params=700.0))) == pytest.approx(0.3)


def test_within_its_target_a_cost_is_free_and_has_no_gradient() -> None:
    reg = DUCCIO({"params": 400.0}, task_loss=0.6)
    network = Costs(params=300.0)
    value = reg(network, 9, 10)
    assert number(value) == 0
    assert gradients(value, [network.values["params"]])[0] == 0
    assert not reg.final_strengths


def test_a_cost_that_comes_above_its_target_later_has_its_strength_then() -> None:
    reg = DUCCIO({"params": 400.0}, task_loss=0.6)
    assert [number(reg(Costs(params=c))) for c in (300.0, 399.0, 500.0, 450.0)] == pytest.approx([0, 0, 0.6, 0.3])


@pytest.mark.parametrize("cost", [400.0, math.nextafter(400.0, 500.0), 400.001, 403.9, 404.1, 8e9])
def test_at_and_just_above_the_target(cost: float) -> None:
    """Finite, and never more than the loss: of a gap below 4, 1 % of the target, s = 0.6 / 4."""
    reg = DUCCIO({"params": 400.0}, task_loss=0.6)
    network = Costs(params=cost)
    value = reg(network)
    assert 0 <= number(value) <= 0.6 * (1 + 1e-9)
    assert number(value) == pytest.approx(0.6 * min((cost - 400) / 4, 1.0), rel=1e-6, abs=1e-12)
    assert math.isfinite(gradients(value, [network.values["params"]])[0])
    if cost == 400.0:  # violated in a later step
        assert number(reg(Costs(params=410.0))) == pytest.approx(10 * 0.6 / 4)


@pytest.mark.parametrize("cost", [0.0, 5.0])
def test_a_target_of_nothing(cost: float) -> None:
    reg = DUCCIO({"macs": 0.0}, task_loss=0.5)
    assert number(reg(Costs(macs=cost))) == pytest.approx(0.5 if cost else 0.0)
    assert math.isfinite(reg.final_strengths["macs"])


def test_two_constraints_add() -> None:
    reg = DUCCIO({"params": 400.0, "ops": 5.0}, task_loss=0.6)
    network = Costs(params=1000.0, ops=7.0)
    assert number(reg(network)) == pytest.approx(1.2)
    assert reg.last == {"params_term": pytest.approx(0.6), "ops_term": pytest.approx(0.6)}
    network.values["params"].data.fill_(350)
    assert number(reg(network)) == pytest.approx(0.6)
    found = gradients(reg(network), list(network.values.values()))
    assert [number(g) for g in found] == pytest.approx([0, 0.3])


@pytest.mark.parametrize("given", [(0.1, 0.2), [0.1, 0.2], {"ops": 0.2, "params": 0.1}])
def test_given_strengths(given: Any) -> None:
    """By the order of the targets, or by name; 0.1 * 600 + 0.2 * 2."""
    reg = DUCCIO({"params": 400.0, "ops": 5.0}, final_strengths=given)
    assert number(reg(Costs(params=1000.0, ops=7.0))) == pytest.approx(60.4)
    assert number(reg(Costs(params=1000.0, ops=7.0), 0, 10)) == pytest.approx(0.604)


def test_a_schedule_multiplies_the_ramp() -> None:
    reg = DUCCIO({"c": 1.0}, final_strengths=(2.0,), schedule=Schedule(start=2, end=8))
    found = [number(reg(Costs(c=4.0), epoch, 10)) for epoch in range(10)]
    assert found == pytest.approx([0, 0, *(6 * (0.01 + 0.11 * e) for e in range(2, 8)), 0, 0])


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"targets": {"c": 1.0}}, "exactly one"),
    ({"targets": {"c": 1.0}, "task_loss": 1.0, "final_strengths": (1.0,)}, "exactly one"),
    ({"targets": {"c": 1.0}, "task_loss": 1.0, "ramp": "whole"}, "allowed are 'end' and 'half'"),
    ({"targets": {}, "task_loss": 1.0}, "a mapping is needed"),
    ({"targets": [400.0], "task_loss": 1.0}, "a mapping is needed"),
    ({"targets": {"c": -1.0}, "task_loss": 1.0}, "target 'c'"),
    ({"targets": {"c": math.nan}, "task_loss": 1.0}, "target 'c'"),
    ({"targets": {"c": "400"}, "task_loss": 1.0}, "target 'c'"),
    ({"targets": {"c": torch.ones(2)}, "task_loss": 1.0}, "target 'c'"),
    ({"targets": {"c": 1.0}, "task_loss": math.inf}, "task_loss"),
    ({"targets": {"c": 1.0}, "task_loss": -1.0}, "task_loss"),
    ({"targets": {"c": 1.0}, "final_strengths": (1.0, 2.0)}, "as many numbers as targets, 1"),
    ({"targets": {"c": 1.0}, "final_strengths": 1.0}, "as many numbers as targets, 1"),
    ({"targets": {"c": 1.0}, "final_strengths": "1"}, "as many numbers as targets, 1"),
    ({"targets": {"c": 1.0}, "final_strengths": {"d": 1.0}}, "one for each"),
    ({"targets": {"c": 1.0}, "final_strengths": {"c": 1.0, "d": 1.0}}, "one for each"),
    ({"targets": {"c": 1.0}, "final_strengths": (-1.0,)}, "final strength of 'c'"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DUCCIO(**arguments)


def test_targets_that_no_network_reaches_and_costs_that_it_does_not_have() -> None:
    """9 parameters are left with one hidden unit."""
    pit = PIT(dense(), input_shape=(4,), cost=["params", "macs"])
    with pytest.raises(InfeasibleTargetError, match=r"params 8, but the smallest network has 9 and the largest 58"):
        DUCCIO({"params": 8.0}, task_loss=1.0)(pit)
    assert number(DUCCIO({"params": 9.0}, task_loss=1.0)(pit)) == pytest.approx(1.0)
    for reg in (DUCCIO({"flops": 9.0}, task_loss=1.0), BaseRegularizer("flops", 1.0)):
        with pytest.raises(ConfigurationError, match="flops"):
            reg.check(pit)
        with pytest.raises(ConfigurationError, match="flops"):
            reg(pit)
    with pytest.raises(ConfigurationError, match="Sequential has no costs"):
        BaseRegularizer("params", 1.0)(dense())


def test_state_of_derived_strengths() -> None:
    reg = DUCCIO({"params": 400.0, "ops": 5.0}, task_loss=0.6)
    reg(Costs(params=1000.0, ops=1.0))
    other = DUCCIO({"params": 400.0, "ops": 5.0}, task_loss=0.6)
    other.load_state_dict(reg.state_dict())
    network = Costs(params=700.0, ops=9.0)
    assert number(other(network, 3, 10)) == number(reg(network, 3, 10)) == pytest.approx(0.34 * (0.3 + 0.6))
    assert other.state_dict() == reg.state_dict()
    assert reg.settings() == DUCCIO({"params": 400.0, "ops": 5.0}, task_loss=0.6).settings()
    assert reg.settings() != DUCCIO({"params": 400.0, "ops": 6.0}, task_loss=0.6).settings()
    with pytest.raises(CheckpointError, match="ops"):
        DUCCIO({"params": 400.0}, task_loss=0.6).load_state_dict({"final_strengths": {"ops": 1.0}})


def test_what_can_never_change_anything() -> None:
    assert not BaseRegularizer("params", 0.0).pulls
    assert not DUCCIO({"c": 1.0}, final_strengths=(0.0,)).pulls
    assert not DUCCIO({"c": 1.0}, task_loss=0.0).pulls
    assert DUCCIO({"c": 1.0}, task_loss=1e-9).pulls
    assert DUCCIO({"c": 1.0, "d": 1.0}, final_strengths=(0.0, 1.0)).pulls


# --- BaseRegularizer ------------------------------------------------------------------------------------------------


def choices() -> nn.Sequential:
    return nn.Sequential(LayerChoice([nn.Linear(4, 4), nn.Identity()], label="a"), nn.Linear(4, 2))


@pytest.mark.parametrize("kind", [PIT, SuperNet])
def test_strength_times_the_cost(kind: Any) -> None:
    network = kind(dense() if kind is PIT else choices(), input_shape=(4,))
    alphas = list(network.nas_parameters())
    assert alphas
    with torch.no_grad():
        for i, alpha in enumerate(alphas):
            alpha.sub_(torch.linspace(0, 0.3, len(alpha)) * (1 + i))
    want = 1e-3 * network.get_cost("params")
    of_want = gradients(want, alphas)
    found = BaseRegularizer("params", 1e-3)(network)
    assert number(found) == number(want) > 0
    for got, expected in zip(gradients(found, alphas), of_want, strict=True):
        assert torch.equal(got, expected)
        assert got.any()


def test_by_hand_on_a_supernet() -> None:
    """p = (3/4, 1/4): 10 + 3/4 * 20 parameters; d cost / d alpha_0 = p0 p1 * 20."""
    network = SuperNet(choices(), input_shape=(4,))
    network.choices["a"].alpha.data.copy_(torch.tensor([math.log(3.0), 0.0]))
    network.update_softmax_options()
    value = BaseRegularizer("params", 0.1)(network)
    assert number(value) == pytest.approx(2.5)
    (slope,) = gradients(value, [network.choices["a"].alpha])
    assert slope.tolist() == pytest.approx([0.375, -0.375])


def test_normalized_by_the_first_network() -> None:
    reg = BaseRegularizer("c", 0.5, normalize=True)
    assert [number(reg(Costs({"c": 200.0}, c=c))) for c in (180.0, 100.0)] == pytest.approx([0.45, 0.25])
    assert number(reg(Costs({"c": 50.0}, c=100.0))) == pytest.approx(0.25)  # what it was divided by stays
    other = BaseRegularizer("c", 0.5, normalize=True)
    other.load_state_dict(reg.state_dict())
    assert number(other(Costs(c=100.0))) == pytest.approx(0.25)
    assert number(BaseRegularizer("c", 0.5, normalize=True)(Costs(c=100.0))) == pytest.approx(0.5)
    with pytest.raises(ConfigurationError, match="first network's c is 0"):
        BaseRegularizer("c", 0.5, normalize=True)(Costs(c=0.0))


@pytest.mark.parametrize("strength", [-1.0, math.nan, math.inf, "1", None, True])
def test_strengths_that_are_none(strength: Any) -> None:
    with pytest.raises(ConfigurationError, match="strength="):
        BaseRegularizer("params", strength)


def test_epochs_of_a_schedule() -> None:
    reg = BaseRegularizer("c", 2.0, schedule=Schedule(start=1, every=3))
    assert [number(reg(Costs(c=3.0), epoch, 9)) for epoch in range(9)] == [0, 6, 0, 0, 6, 0, 0, 6, 0]
    assert number(reg(Costs(c=3.0))) == 6


# --- schedules ------------------------------------------------------------------------------------------------------


def test_factors_by_hand() -> None:
    assert [Schedule().factor(e, 3) for e in range(3)] == [1, 1, 1]
    assert [Schedule(start=1, end=3).factor(e) for e in range(4)] == [0, 1, 1, 0]
    assert [Schedule(start=2, end=8, every=2).factor(e) for e in range(10)] == [0, 0, 1, 0, 1, 0, 1, 0, 0, 0]
    linear = [Schedule(ramp="linear").factor(e, 5) for e in range(5)]
    assert linear == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    cosine = [Schedule(ramp="cosine", start=1, end=6).factor(e, 7) for e in range(7)]
    half = math.sqrt(0.5) / 2
    assert cosine == pytest.approx([0, 0, 0.5 - half, 0.5, 0.5 + half, 1, 0])
    assert Schedule(start=3, end=4, ramp="linear").factor(3) in (0.0, 1.0)  # the only epoch is both
    assert Schedule(start=5, end=6, ramp="cosine").factor(None) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": -1}, "start=-1"),
        ({"start": 1.5}, "start=1.5"),
        ({"every": 0}, "every=0"),
        ({"every": True}, "every=True"),
        ({"end": 0}, "end=0"),
        ({"start": 3, "end": 3}, "no epoch lies between"),
        ({"start": 2, "end": 5, "every": 4}, "longer than the 3 epochs"),
        ({"ramp": "square"}, "ramp='square'"),
    ],
)
def test_schedules_that_never_act(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Schedule(**arguments)


def test_a_ramp_needs_an_end() -> None:
    with pytest.raises(ConfigurationError, match="n_epochs"):
        Schedule(ramp="linear").factor(2)
    assert Schedule(ramp="linear", end=3).factor(1) == 0.5


# --- sums -----------------------------------------------------------------------------------------------------------


def test_values_add_and_names_differ() -> None:
    one, two = BaseRegularizer("c", 2.0), BaseRegularizer("c", 3.0)
    three = DUCCIO({"c": 4.0, "d": 1.0}, final_strengths=(1.0, 10.0))
    together = one + two + three
    network = Costs(c=5.0, d=2.0)
    assert number(together(network)) == pytest.approx(10 + 15 + 1 + 10)
    assert together.last == {"c_term": 10.0, "c_term_2": 15.0, "c_term_3": 1.0, "d_term": 10.0}
    assert together.parts == (one, two, three)
    assert number((one + (two + three))(network)) == pytest.approx(36)
    assert (one + (two + three)).parts == (one, two, three)
    (slope,) = gradients(together(network), [network.values["c"]])
    assert number(slope) == pytest.approx(6)
    assert together.pulls
    assert not (BaseRegularizer("c", 0.0) + BaseRegularizer("d", 0.0)).pulls


def test_a_sum_is_given_its_epoch() -> None:
    together = BaseRegularizer("c", 1.0, schedule=Schedule(start=1)) + DUCCIO({"c": 1.0}, final_strengths=(1.0,))
    assert [number(together(Costs(c=3.0), e, 3)) for e in range(3)] == pytest.approx([0.02, 3 + 1.01, 5])


def test_costs_and_weights_in_one_sum() -> None:
    pit = PIT(dense(), input_shape=(4,))
    together = BaseRegularizer("params", 0.1) + L2("*weight", 0.5)
    squares = sum(number(p.detach().square().sum()) for name, p in pit.named_parameters() if name.endswith("weight"))
    assert number(together(pit)) == pytest.approx(5.8 + 0.5 * squares)


def test_state_of_a_sum() -> None:
    def made() -> Sum:
        return BaseRegularizer("c", 2.0, normalize=True) + DUCCIO({"c": 4.0}, task_loss=1.0)

    one, other = made(), made()
    one(Costs(c=5.0))
    other.load_state_dict(one.state_dict())
    assert number(other(Costs(c=10.0))) == number(one(Costs(c=10.0))) == pytest.approx(2 * 10 / 5 + 6)
    assert one.settings() == other.settings()
    with pytest.raises(CheckpointError, match="2 regularizers, here are 3"):
        (made() + BaseRegularizer("c", 1.0)).load_state_dict(one.state_dict())


@pytest.mark.parametrize("other", [1.0, None, "params", nn.ReLU(), lambda model: 0.0])
def test_what_is_no_regularizer_cannot_be_added(other: Any) -> None:
    with pytest.raises(TypeError):
        BaseRegularizer("c", 2.0) + other
    with pytest.raises(TypeError):
        other + BaseRegularizer("c", 2.0)


def test_all_of_them_are_regularizers() -> None:
    every: list[Regularizer] = [
        BaseRegularizer("c", 1.0),
        DUCCIO({"c": 1.0}, task_loss=1.0),
        L2("*", 1.0),
        GroupLasso("rows", 1.0),
    ]
    assert [reg.of for reg in every] == ["costs", "costs", "weights", "weights"]
    assert all(isinstance(reg, Regularizer) for reg in [*every, every[0] + every[2]])


def test_share_of_a_gradient() -> None:
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    assert gradient_share((w * torch.tensor([3.0, -3.0])).sum(), w.square().sum() / 2, [w]) == pytest.approx(3 / 9)
    assert gradient_share(torch.tensor(1.0), torch.tensor(2.0), [w]) == 0


# --- loops of one's own, as the page on these regularizers writes them ----------------------------------------------


def data() -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    return list(zip(x.split(16), (x[:, 0] * x[:, 1] > 0).long().split(16), strict=True))


def test_one_cost_in_a_loop() -> None:
    """Bit for bit the loop with ``1e-3 * model.get_cost('params')``, in which units go."""
    criterion = nn.CrossEntropyLoss()
    models = []
    for own in (True, False):
        model = PIT(dense(), input_shape=(4,), cost={"params": "params"})
        regularizer = BaseRegularizer("params", 1e-3)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(8):
            for sample, target in data():
                output = model(sample)
                paid = regularizer(model) if own else 1e-3 * model.get_cost("params")
                loss = criterion(output, target) + paid
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        models.append(model)
    one, other = (model.state_dict() for model in models)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert models[0].hard_cost("params") < 58
    assert sum(p.numel() for p in models[0].export().parameters()) == models[0].hard_cost("params")


def test_two_constraints_in_a_loop() -> None:
    """8 units of 7 parameters and 6 products; 16 of the 20 additions of biases and outputs are theirs."""
    n_epochs, criterion = 40, nn.CrossEntropyLoss()
    net = dense()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for sample, target in data() * 10:
        wu_task_loss = criterion(net(sample), target)
        optimizer.zero_grad()
        wu_task_loss.backward()
        optimizer.step()

    model = PIT(net, input_shape=(4,), cost={"params": "params", "ops": "ops"})
    before = model.hard_costs()
    regularizer = DUCCIO({"params": 30.0, "ops": 0.6 * before["ops"]}, task_loss=wu_task_loss)
    of_weights, of_masks = list(model.net_parameters()), list(model.nas_parameters())
    groups: list[dict[str, Any]] = [{"params": of_weights}, {"params": of_masks, "lr": 0.5}]
    search = torch.optim.SGD(groups, lr=0.02)
    for epoch in range(n_epochs):
        for sample, target in data():
            output = model(sample)
            loss = criterion(output, target) + regularizer(model, epoch, n_epochs)
            search.zero_grad()
            loss.backward()
            search.step()
    assert set(regularizer.final_strengths) == {"params", "ops"}
    # It is a term of the loss, and no promise: within a unit of the targets, and not far below.
    assert 9 < model.hard_cost("params") <= 37
    assert model.hard_cost("ops") < 0.8 * before["ops"]
