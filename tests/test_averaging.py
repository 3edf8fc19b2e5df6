"""The average of weights against the recursion by hand, in float64."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oneshot import PIT, BinaryGates, LayerChoice, arch_parameters, draw, set_sampler, weight_parameters
from oneshot.errors import CheckpointError, ConfigurationError
from oneshot.trainers.averaging import WeightAverage, decay_of


def network() -> nn.Module:
    choice = LayerChoice([nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)], label="choice")
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), choice, nn.Flatten(), nn.Linear(64, 2)).double()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    draw(model, torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    model(x).square().mean().backward()
    optimizer.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def swapped_values(model: nn.Module, average: WeightAverage) -> dict[str, Tensor]:
    with average.swapped():
        return values(model)


@pytest.mark.parametrize(("decay", "bounds"), [(0.999, 0), (0.3, 6)])
def test_the_recursion_by_hand(decay: float, bounds: int) -> None:
    """(1 + t) / (10 + t) > 0.3 from t = 3 on: of 8 updates 6 have the decay itself."""
    model = network()
    set_sampler(model, BinaryGates(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = WeightAverage(model, weight_parameters(model), decay)
    moved = [name for name, value in model.state_dict().items() if "alpha" not in name and "batches" not in name]
    expected, bounded = values(model), 0
    for t in range(1, 9):
        step(model, optimizer, t)
        average.update()
        d = (1.0 + t) / (10.0 + t)
        bounded += d > decay
        d = min(d, decay)
        for name in moved:
            expected[name] = d * expected[name] + (1 - d) * model.state_dict()[name]
    assert bounded == bounds
    found = swapped_values(model, average)
    for name in moved:
        assert (found[name] - expected[name]).abs().max() < 1e-12, name
    # The bias in front of the normalisation has no gradient.
    for name in ("0.weight", "1.running_mean", "1.running_var", "2.candidates.0.weight", "4.bias"):
        assert (found[name] - model.state_dict()[name]).abs().max() > 1e-4, name


def test_what_is_searched_and_counted_stays() -> None:
    pit = PIT(nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8), nn.Flatten(), nn.Linear(80, 2)), (3, 10))
    average = WeightAverage(pit, weight_parameters(pit), 0.9)
    optimizer = torch.optim.SGD(pit.parameters(), lr=0.1)
    before = values(pit)
    pit.train()(torch.randn(4, 3, 10)).square().sum().backward()
    optimizer.step()
    average.update()
    now, inside = values(pit), swapped_values(pit, average)
    alphas = {id(alpha) for alpha in arch_parameters(pit)}
    searched = [name for name, p in pit.named_parameters() if id(p) in alphas]
    same = {name for name, value in now.items() if torch.equal(value, inside[name])}
    assert not torch.equal(before[searched[0]], now[searched[0]])
    assert {*searched, "network.1.num_batches_tracked"} <= same
    assert {"network.0.weight", "network.1.running_mean", "network.3.bias"}.isdisjoint(same)


def test_a_weight_that_does_not_run_is_its_own_average() -> None:
    model = network()
    set_sampler(model, BinaryGates(1))
    average = WeightAverage(model, weight_parameters(model), 0.9)
    optimizer = torch.optim.Adam(model.parameters())
    ran = set()
    for seed in (3, 4, 6):
        step(model, optimizer, seed)
        average.update()
        ran.add(model[2].drawn.active)
    assert ran == {0}  # the draws of these seeds
    inside = swapped_values(model, average)
    assert torch.equal(inside["2.candidates.1.weight"], model[2][1].weight)
    assert not torch.equal(inside["2.candidates.0.weight"], model[2][0].weight)


def moved(build: Callable[[], nn.Module] = network) -> tuple[nn.Module, WeightAverage]:
    model = build()
    average = WeightAverage(model, weight_parameters(model), 0.9)
    with torch.no_grad():
        for _ in range(3):
            for tensor in (*weight_parameters(model), *(b for b in model.buffers() if b.is_floating_point())):
                tensor.add_(torch.rand_like(tensor))
            average.update()
    return model, average


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_swapped_in_and_out_to_the_bit(dtype: torch.dtype) -> None:
    model, average = moved(lambda: network().to(dtype))
    before, parameters = values(model), [id(p) for p in model.parameters()]
    first = average.state_dict()
    with average.swapped():
        inside = values(model)
        with average.swapped():
            again = values(model)
        assert all(torch.equal(value, inside[name]) for name, value in values(model).items())
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())
    assert all(torch.equal(value, inside[name]) for name, value in again.items())
    assert not torch.equal(inside["0.weight"], before["0.weight"])
    assert [id(p) for p in model.parameters()] == parameters
    with pytest.raises(TypeError), average.swapped(), average.swapped():
        nn.init.zeros_(model[0].weight) + "no tensor"
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())
    assert all(torch.equal(value, first["averages"][name]) for name, value in average.state_dict()["averages"].items())


def test_half_precision_is_averaged_in_float32() -> None:
    """1 + (1 - d) of a step of 2^-8 is 1 again in bfloat16, and so the average would never come to 1 + 2^-7."""
    layer = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(layer.weight)
    average = WeightAverage(layer, [layer.weight], 0.9)
    nn.init.constant_(layer.weight, 1 + 2**-7)
    for _ in range(200):
        average.update()
    with average.swapped():
        assert layer.weight.item() == 1 + 2**-7


def test_a_run_that_is_taken_up_goes_on_to_the_bit() -> None:
    (model, average), (other, fresh) = moved(), moved()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "average": average.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other.load_state_dict(state["model"])
    fresh.load_state_dict(state["average"])
    assert fresh.updates == 3
    for each in (model, other):
        nn.init.constant_(each[0].weight, 0.25)
    for each in (average, fresh):
        each.update()
    one, two = swapped_values(model, average), swapped_values(other, fresh)
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    kept = average.state_dict()
    average.update()
    assert kept["updates"] == 4
    assert not torch.equal(kept["averages"]["0.weight"], average.state_dict()["averages"]["0.weight"])


def test_restart() -> None:
    model, average = moved()
    average.restart()
    assert average.updates == 0
    inside = swapped_values(model, average)
    assert all(torch.equal(value, inside[name]) for name, value in values(model).items())


def test_a_weight_that_becomes_smaller_begins_again() -> None:
    model, average = moved()
    expected = average.state_dict()["averages"]
    first = model[0]
    first.weight.data = first.weight.data[:2].clone()
    with average.swapped():
        assert first.weight.shape == (2, 3, 1, 1)
        assert torch.equal(model[4].weight, expected["4.weight"])
    average.update()
    assert torch.equal(average.state_dict()["averages"]["0.weight"], first.weight)
    assert average.state_dict()["averages"]["4.weight"].shape == (2, 64)


def test_averages_follow_the_weights() -> None:
    """To another precision, as to another device; buffers become other tensors there."""
    model, average = moved(lambda: network().float())
    before = average.state_dict()["averages"]
    model.double()
    with average.swapped():
        assert torch.equal(model[1].running_mean, before["1.running_mean"].double())
        assert torch.equal(model[4].weight, before["4.weight"].double())
    average.update()
    assert {tensor.dtype for tensor in average.state_dict()["averages"].values()} == {torch.float64}


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan"), True, "0.9"])
def test_decays(decay: Any) -> None:
    with pytest.raises(ConfigurationError, match="from 0 to below 1"):
        WeightAverage(nn.Linear(2, 2), [], decay)


def test_decay_zero_is_the_present() -> None:
    assert decay_of(5, 0.0) == 0
    model = nn.Linear(2, 2)
    average = WeightAverage(model, list(model.parameters()), 0)
    nn.init.ones_(model.weight)
    average.update()
    with average.swapped():
        assert torch.equal(model.weight, torch.ones(2, 2))


def test_weights_that_are_none() -> None:
    model = network()
    with pytest.raises(ConfigurationError, match=r"2\.alpha.*alphas have no average"):
        WeightAverage(model, list(model.parameters()), 0.9)
    with pytest.raises(ConfigurationError, match=r"weights \[1\] of 2 are no parameters"):
        WeightAverage(model, [model[0].weight, nn.Linear(1, 1).weight], 0.9)


def test_no_update_of_the_averages_by_themselves() -> None:
    _, average = moved()
    with average.swapped(), pytest.raises(RuntimeError, match="outside of swapped"):
        average.update()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("0.weight"), r"1 missing \['0\.weight'\]"),
        (lambda a: a.update(extra=torch.zeros(1)), r"1 too many \['extra'\]"),
        (lambda a: a.update({"0.bias": torch.zeros(5)}), r"1 of another shape \['0\.bias'\]"),
    ],
)
def test_states_that_do_not_fit(change: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    _, average = moved()
    state, before = average.state_dict(), average.state_dict()
    change(state["averages"])
    with pytest.raises(CheckpointError, match=message):
        average.load_state_dict(state)
    with pytest.raises(CheckpointError, match="'averages' and 'updates' are needed"):
        average.load_state_dict({"updates": 1})
    now = average.state_dict()["averages"]
    assert all(torch.equal(value, now[name]) for name, value in before["averages"].items())
