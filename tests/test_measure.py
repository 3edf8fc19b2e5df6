"""Measured latencies. Times are those of a clock that the layers themselves advance, so that they are known."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_spaces import architectures, random_space
from torch import Tensor, nn

import oneshot.cost.measure
from oneshot import (
    BinaryGates,
    InputChoice,
    LatencyTable,
    LayerChoice,
    OnePath,
    Repeat,
    decisions,
    draw,
    measure_latency,
    set_sampler,
)
from oneshot.cost import price, time_module
from oneshot.errors import UnsupportedModelError


class Clock:
    ms = 0.0


class Takes(nn.Module):
    """Takes a known time, and twice as much in training mode or with grad."""

    def __init__(self, ms: float) -> None:
        super().__init__()
        self.ms = ms

    def forward(self, x: Tensor) -> Tensor:
        Clock.ms += self.ms * (2 if self.training or torch.is_grad_enabled() else 1)
        return x + 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oneshot.cost.measure, "_timed", by_clock)


def by_clock(run: Callable[[], Any], min_run_time: float) -> Any:
    start = Clock.ms
    run()
    return SimpleNamespace(times=[(Clock.ms - start) / 1e3])


X = torch.rand(2, 3)


# --- known times ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("clock")
def test_own_times_and_fixed_by_hand() -> None:
    inner = LayerChoice([Takes(3), Takes(5)], label="inner")
    nested = nn.Sequential(Takes(10), inner, Takes(20))
    outer = LayerChoice({"plain": Takes(7), "nested": nested}, label="outer")
    row = Repeat([Takes(100), nn.Sequential(Takes(200), LayerChoice([Takes(1), Takes(2)]))], depth=(0, 2))
    table = measure_latency(nn.Sequential(Takes(1000), outer, row, Takes(2000)), (X,))
    rounded = {place: {name: round(ms, 9) for name, ms in rows.items()} for place, rows in table.by_place.items()}
    assert rounded == {
        "1.candidates.nested.1": {"0": 3, "1": 5},
        "1": {"plain": 7, "nested": 30},  # 10 + 20, the choice inside is priced by itself
        "2.blocks.1.1": {"0": 1, "1": 2},
        "2": {"0": 0, "1": 100, "2": 300},  # 100 + 200, the choice inside is priced by itself
    }
    assert table.fixed == pytest.approx(3000)
    assert (table.source, table.by_key, table.runtime["threads"]) == ("this machine", False, "1")


@pytest.mark.usefixtures("clock")
def test_a_choice_that_stands_in_two_places_by_hand() -> None:
    inner = LayerChoice([Takes(3), Takes(5)], label="inner")
    outer = LayerChoice({"once": nn.Sequential(inner, Takes(10)), "twice": nn.Sequential(inner, inner)}, label="outer")
    other = LayerChoice([nn.Sequential(inner, Takes(40)), Takes(50)], label="other")
    table = measure_latency(nn.Sequential(outer, outer, other), (X,))
    rows = {place: {name: round(ms, 9) for name, ms in row.items()} for place, row in table.by_place.items()}
    assert rows == {
        "0.candidates.once.0": {"0": 3, "1": 5},
        "0": {"once": 10, "twice": 0},
        "2": {"0": 40, "1": 50},
    }
    assert table.fixed == pytest.approx(0)


@pytest.mark.usefixtures("clock")
def test_a_choice_inside_its_own_label_is_timed_where_it_can_run() -> None:
    """The choice ``inner`` stands alone, where it may be 'x', and inside 'y' of its own label, where it is 'y'."""
    last = LayerChoice([Takes(100), Takes(200)], label="last")
    inner = LayerChoice({"x": nn.Sequential(last), "y": nn.Sequential(Takes(5))}, label="a")
    outer = LayerChoice({"x": nn.Sequential(Takes(1)), "y": nn.Sequential(inner, Takes(10))}, label="a")
    model = nn.Sequential(outer, inner)
    table = measure_latency(model, (X,))
    # outer x: 1, inner x: last; outer y: inner y 5 + 10, inner y: 5
    cost = price(model, (X,), table)
    costs = [cost.of({"a": a, "last": k}) for a in (0, 1) for k in (0, 1)]
    assert costs == pytest.approx([101, 201, 20, 20])


class SlowOnMany(nn.Module):
    """Takes as many milliseconds as it gets numbers per sample."""

    def forward(self, x: Tensor) -> Tensor:
        Clock.ms += x[0].numel()
        return x


@pytest.mark.usefixtures("clock")
def test_a_choice_called_on_two_shapes_has_the_mean() -> None:
    choice = LayerChoice([SlowOnMany(), nn.Identity()], label="a")
    model = nn.Sequential(choice, nn.ZeroPad1d((0, 4)), choice)
    table = measure_latency(model, (X,))
    assert table.by_place == {"0": {"0": pytest.approx(5), "1": 0}}  # 3 and 7 numbers
    assert price(model, (X,), table).of({"a": 0}) == pytest.approx(10)


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.choice, self.row = LayerChoice([Takes(1), Takes(2)]), Repeat([Takes(4)], depth=(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.row(x=self.choice(x=x))


@pytest.mark.usefixtures("clock")
def test_inputs_given_by_keyword() -> None:
    table = measure_latency(ByKeyword(), (X,))
    assert table.by_place == {
        "choice": {"0": pytest.approx(1), "1": pytest.approx(2)},
        "row": {"0": 0, "1": pytest.approx(4)},
    }


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_every_architecture_takes_what_its_measured_table_says(seed: int) -> None:
    """Times add up on this clock, so the table must price every network of a random space exactly."""

    def leaf(rng: random.Random) -> nn.Module:
        return Takes(float(rng.randint(0, 1000)))

    model = random_space(seed, leaf).eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oneshot.cost.measure, "_timed", by_clock)
        cost = price(model, (X,), measure_latency(model, (X,)))
    known = decisions(model)
    for choices in architectures(model):
        for label, decision in known.items():
            decision.set_sampler(OnePath(choices[label]))
        with torch.no_grad():
            took = by_clock(lambda: model(X), 0.0).times[0] * 1e3
        assert cost.of(choices) == pytest.approx(took, abs=1e-6), choices


@pytest.mark.usefixtures("clock")
def test_a_slow_moment_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median of five rounds: two of them are a hundred times slower here."""
    calls: list[int] = []

    def uneven(run: Callable[[], Any], min_run_time: float) -> Any:
        calls.append(1)
        slow = 100 if len(calls) > 12 else 1  # 2 networks and 2 candidates in each round
        return SimpleNamespace(times=[t * slow for t in by_clock(run, min_run_time).times])

    monkeypatch.setattr(oneshot.cost.measure, "_timed", uneven)
    table = measure_latency(nn.Sequential(LayerChoice([Takes(1), Takes(2)]), Takes(10)), (X,))
    assert (table.by_place, table.fixed) == ({"0": {"0": pytest.approx(1), "1": pytest.approx(2)}}, pytest.approx(10))
    assert len(calls) == 20


@pytest.mark.usefixtures("clock")
def test_progress_counts_candidates() -> None:
    lines: list[str] = []
    measure_latency(nn.Sequential(LayerChoice([Takes(1), Takes(2)])), (X,), progress=lines.append)
    assert lines == [f"timing candidates, round {r} of 5: {n} of 2" for r in range(1, 6) for n in (1, 2)]


@pytest.mark.usefixtures("clock")
def test_a_model_without_choices_is_fixed(tmp_path: Path) -> None:
    table = measure_latency(nn.Sequential(Takes(3)), (X,))
    assert (table.by_place, table.fixed) == ({}, pytest.approx(3))
    table.write(tmp_path / "table.yaml")
    assert LatencyTable.read(tmp_path / "table.yaml").as_dict() == table.as_dict()


# --- the real clock ---------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Every mutable, BatchNorm, a layer that is random in eval mode too, and one that its owner has frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        inner = LayerChoice([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))])
        noisy = nn.Sequential(nn.Linear(4, 4), Noisy())
        self.choice = LayerChoice({"plain": noisy, "nested": nn.Sequential(inner, nn.ReLU())}, label="first")
        self.row = Repeat(lambda i: nn.Linear(4, 4), depth=(0, 2), label="row")
        self.pick = InputChoice(2, label="pick")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.pick([self.choice(x), self.row(x)])


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


def test_every_candidate_of_every_choice_has_a_row() -> None:
    table = measure_latency(Net(), (X,), min_run_time=1e-5)
    assert {place: list(rows) for place, rows in table.by_place.items()} == {
        "choice.candidates.nested.0": ["0", "1"],
        "choice": ["plain", "nested"],
        "row": ["0", "1", "2"],
    }
    assert all(ms >= 0 for rows in table.by_place.values() for ms in rows.values())
    assert table.by_place["choice"]["plain"] > 0
    assert table.fixed is not None
    assert set(table.runtime) == {"runtime", "machine", "processor", "threads"}


@pytest.mark.parametrize("ending", [".yaml", ".json"])
def test_a_measured_table_is_written_read_back_and_prices(tmp_path: Path, ending: str) -> None:
    model = Net()
    table = measure_latency(model, (X,), min_run_time=1e-5)
    table.write(tmp_path / f"table{ending}")
    again = LatencyTable.read(tmp_path / f"table{ending}")
    assert again.as_dict() == table.as_dict()
    cost = price(model, (X,), again)
    first = dict.fromkeys(decisions(model), 0)
    by_hand = table.by_place["choice"]["plain"] + table.by_place["row"]["0"] + table.fixed
    assert cost.of(first) == pytest.approx(by_hand, rel=1e-12)


def test_measuring_leaves_everything_as_it_was() -> None:
    model = Net().train()
    model.stem.eval()
    set_sampler(model, BinaryGates(2))
    draw(model, torch.Generator().manual_seed(0))
    mutables = [d.members[0] for d in decisions(model).values()]

    def seen() -> tuple[object, ...]:
        return (
            [module.training for module in model.modules()],
            [(m.sampler, m.drawn) for m in mutables],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
            [p.grad for p in model.parameters()],
            torch.get_num_threads(),
            torch.is_grad_enabled(),
        )

    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state, before = torch.get_rng_state(), seen()
    measure_latency(model, (X,), min_run_time=1e-5)
    assert seen() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_threads_and_modes_come_back_after_an_exception() -> None:
    model = nn.Sequential(LayerChoice([nn.Linear(3, 3), nn.Identity()])).train()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(UnsupportedModelError, match=r"shape \[\(2, 5\)\]"):
            measure_latency(model, (torch.rand(2, 5),))
        assert (torch.get_num_threads(), all(m.training for m in model.modules())) == (2, True)
        measure_latency(model, (X,), min_run_time=1e-5)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_a_model_on_another_device_is_refused() -> None:
    model = nn.Sequential(LayerChoice([nn.Linear(3, 3), nn.Identity()])).to("meta")
    with pytest.raises(UnsupportedModelError, match=r"parameters of Sequential are on \['meta'\]"):
        measure_latency(model, (X,))


def test_time_module_runs_in_eval_mode_without_grad() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), Watched()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert time_module(model, (X,), min_run_time=1e-5) > 0
    assert model[1].seen == {(False, False)}
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_time_module_takes_any_function() -> None:
    seen: set[bool] = set()
    assert time_module(lambda x: seen.add(torch.is_grad_enabled()), (X,), min_run_time=1e-5) > 0
    assert seen == {False}
    assert torch.is_grad_enabled()


class Watched(nn.Module):
    """Remembers the modes it ran in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[bool, bool]] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add((self.training, torch.is_grad_enabled()))
        return x
