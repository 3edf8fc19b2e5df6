"""Measured tables. Times are those of a clock that the layers themselves advance, so that they are known."""

from __future__ import annotations

import gc
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_times import Clock, Takes, by_clock
from random_spaces import architectures, random_space
from torch import Tensor, nn

import oneshot.cost.timing
from oneshot import (
    BinaryGates,
    InputChoice,
    LatencyTable,
    LayerChoice,
    OnePath,
    Repeat,
    decisions,
    draw,
    measure_table,
    set_sampler,
)
from oneshot.cost import price
from oneshot.cost.timing import Repetition
from oneshot.cost.timing_cache import cache_folder
from oneshot.errors import ConfigurationError, UnsupportedModelError


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The milliseconds of every round that is measured."""
    measured: list[float] = []

    def noted(run: Callable[[], Any], *args: Any) -> list[Repetition]:
        repetitions = by_clock(run, *args)
        measured.append(repetitions[0].ms)
        return repetitions

    monkeypatch.setattr(oneshot.cost.timing, "one_round", noted)
    return measured


X = torch.rand(2, 3)


def measured(model: nn.Module, example_input: Any = X, **settings: Any) -> LatencyTable:
    return measure_table(model, example_input, **{"cache": False, "progress": False, **settings})


# --- known times ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("clock")
def test_own_times_and_fixed_by_hand() -> None:
    inner = LayerChoice([Takes(3), Takes(5)], label="inner")
    nested = nn.Sequential(Takes(10), inner, Takes(20))
    outer = LayerChoice({"plain": Takes(7), "nested": nested}, label="outer")
    row = Repeat([Takes(100), nn.Sequential(Takes(200), LayerChoice([Takes(1), Takes(2)]))], depth=(0, 2))
    table = measured(nn.Sequential(Takes(1000), outer, row, Takes(2000)), (X,))
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
    table = measured(nn.Sequential(outer, outer, other), (X,))
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
    table = measured(model, (X,))
    # outer x: 1, inner x: last; outer y: inner y 5 + 10, inner y: 5
    cost = price(model, (X,), table)
    costs = [cost.of({"a": a, "last": k}) for a in (0, 1) for k in (0, 1)]
    assert costs == pytest.approx([101, 201, 20, 20])


class SlowOnMany(nn.Module):
    """Takes as many milliseconds as it gets numbers per sample."""

    def forward(self, x: Tensor) -> Tensor:
        Clock.ms += x[0].numel()
        return x * 1


@pytest.mark.usefixtures("clock")
def test_a_choice_called_on_two_shapes_has_the_mean() -> None:
    choice = LayerChoice([SlowOnMany(), nn.Identity()], label="a")
    model = nn.Sequential(choice, nn.ZeroPad1d((0, 4)), choice)
    table = measured(model, (X,))
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
    table = measured(ByKeyword(), (X,))
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
        patch.setattr(oneshot.cost.timing, "one_round", by_clock)
        cost = price(model, (X,), measured(model, rounds=1))
    known = decisions(model)
    for choices in architectures(model):
        for label, decision in known.items():
            decision.set_sampler(OnePath(choices[label]))
        with torch.no_grad():
            took = by_clock(lambda: model(X))[0].ms
        assert cost.of(choices) == pytest.approx(took, abs=1e-6), choices


def test_a_slow_moment_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median of five rounds: two of them are a hundred times slower here."""
    calls: list[int] = []

    def uneven(run: Callable[[], Any], *_: Any) -> list[Repetition]:
        calls.append(1)
        slow = 100 if len(calls) > 15 else 1  # 2 networks, 2 candidates and what passes on, in each round
        return [r._replace(ms=r.ms * slow) for r in by_clock(run)]

    monkeypatch.setattr(oneshot.cost.timing, "one_round", uneven)
    table = measured(nn.Sequential(LayerChoice([Takes(1), Takes(2)]), Takes(10)))
    assert (table.by_place, table.fixed) == ({"0": {"0": pytest.approx(1), "1": pytest.approx(2)}}, pytest.approx(10))
    assert len(calls) == 25


def test_what_a_run_costs_in_itself_is_not_priced_per_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_overhead(run: Callable[[], Any], *_: Any) -> list[Repetition]:
        return [r._replace(ms=r.ms + 50) for r in by_clock(run)]

    monkeypatch.setattr(oneshot.cost.timing, "one_round", with_overhead)
    table = measured(nn.Sequential(LayerChoice([Takes(1), nn.Identity()]), LayerChoice([Takes(2), Takes(3)])))
    assert table.by_place == {"0": {"0": pytest.approx(1), "1": 0}, "1": {"0": pytest.approx(2), "1": pytest.approx(3)}}
    assert table.fixed == pytest.approx(50)  # once per network


# --- each distinct measurement once -----------------------------------------------------------------------------


def space(last: float = 7) -> nn.Module:
    """Three choices, of which two offer the same; distinct are 1, 2 and ``last`` ms, nothing at all, two networks."""
    same = [LayerChoice({"a": Takes(1), "b": Takes(2), "skip": nn.Identity()}) for _ in range(2)]
    return nn.Sequential(*same, LayerChoice([Takes(2), Takes(last)]), Takes(10))


DISTINCT = 6


def test_what_executes_the_same_is_measured_once(clock: list[float]) -> None:
    table = measured(space(), rounds=1)
    assert sorted(clock) == [0, 1, 2, 7, 10 + 1 + 1 + 2, 10 + 0 + 0 + 7]
    row = {"a": pytest.approx(1), "b": pytest.approx(2), "skip": 0}
    assert table.by_place == {"0": row, "1": row, "2": {"0": pytest.approx(2), "1": pytest.approx(7)}}


def test_another_shape_is_another_measurement(clock: list[float]) -> None:
    choice = LayerChoice([Takes(1)])
    measured(nn.Sequential(choice, nn.ZeroPad1d((0, 4)), choice), rounds=1)
    assert sorted(clock) == [0, 0, 1, 1, 2]  # on 3 and on 7 numbers; the two ends are one network


def test_rows_carry_their_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    def scattered(run: Callable[[], Any], *_: Any) -> list[Repetition]:
        (one,) = by_clock(run)
        return [one._replace(ms=one.ms * factor) for factor in (0.5, 1.0, 1.5)]

    monkeypatch.setattr(oneshot.cost.timing, "one_round", scattered)
    table = measured(nn.Sequential(LayerChoice([Takes(4), nn.Identity()])), rounds=4)
    # 2, 4 and 6 four times each: quartiles 2 and 6
    assert table.spread == {"0": {"0": {"iqr": pytest.approx(4), "n": 12}, "1": {"iqr": 0, "n": 12}}}
    assert table.by_place == {"0": {"0": pytest.approx(4), "1": 0}}


# --- the cache --------------------------------------------------------------------------------------------------


def test_what_was_measured_is_not_measured_again(clock: list[float], tmp_path: Path) -> None:
    first = measured(space(), cache=tmp_path)
    assert len(clock) == 5 * DISTINCT
    assert measured(space(), cache=tmp_path) == first
    assert len(clock) == 5 * DISTINCT
    assert len(list(tmp_path.glob("latency/*/*.json"))) == DISTINCT
    # Another space: one new candidate and one new network.
    measured(space(last=8), cache=tmp_path)
    assert len(clock) == 5 * DISTINCT + 5 * 2


def test_the_cache_asks_for_as_many_and_as_long_rounds(clock: list[float], tmp_path: Path) -> None:
    measured(space(), cache=tmp_path, rounds=2, min_run_time=0.01)
    measured(space(), cache=tmp_path, rounds=1, min_run_time=0.005)
    assert len(clock) == 2 * DISTINCT
    measured(space(), cache=tmp_path, rounds=3, min_run_time=0.01)
    assert len(clock) == 3 * DISTINCT  # the missing third
    measured(space(), cache=tmp_path, rounds=3, min_run_time=0.02)
    assert len(clock) == 6 * DISTINCT  # too short before


def test_another_number_of_threads_or_runtime_has_a_cache_of_its_own(
    clock: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(space(), cache=tmp_path, rounds=1)
    measured(space(), cache=tmp_path, rounds=1, threads=2)
    assert len(clock) == 2 * DISTINCT
    monkeypatch.setattr(torch, "__version__", "9.9")
    measured(space(), cache=tmp_path, rounds=1)
    assert len(clock) == 3 * DISTINCT
    assert len(list(tmp_path.glob("latency/*"))) == 3


@pytest.mark.parametrize("stopped_after", [0, 4, DISTINCT, 3 * DISTINCT + 2])
def test_an_interrupted_measurement_goes_on(
    clock: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_after: int
) -> None:
    noted = oneshot.cost.timing.one_round

    def interrupted(*args: Any) -> list[Repetition]:
        if len(clock) == stopped_after:
            raise KeyboardInterrupt
        return noted(*args)

    monkeypatch.setattr(oneshot.cost.timing, "one_round", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured(space(), cache=tmp_path)
    monkeypatch.setattr(oneshot.cost.timing, "one_round", noted)
    resumed = measured(space(), cache=tmp_path)
    assert len(clock) == 5 * DISTINCT  # no round twice
    assert resumed == measured(space())


DAMAGE = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-20],
    "no object": lambda data: b"[1]",
    "other format": lambda data: data.replace(b"oneshot-timing", b"something-else"),
    "newer version": lambda data: data.replace(b'"version": 1', b'"version": 2'),
    "no rounds": lambda data: json.dumps({**json.loads(data), "rounds": None}).encode(),
    "no numbers": lambda data: data.replace(b"0.01]", b"null]"),
    "not finite": lambda data: data.replace(b"0.01]", b"NaN]"),
    "negative": lambda data: data.replace(b"[[", b"[[-1.0, 1.0, 0.01], ["),
    "no repetitions": lambda data: json.dumps(
        {**json.loads(data), "rounds": [{"min_run_time": 1.0, "repetitions": []}]}
    ).encode(),
    "bytes": lambda data: b"\xff\xfe",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_cache_is_measured_anew(clock: list[float], tmp_path: Path, name: str) -> None:
    table = measured(space(), cache=tmp_path, rounds=2)
    path = sorted(tmp_path.glob("latency/*/*.json"))[0]
    good = path.read_bytes()
    path.write_bytes(DAMAGE[name](good))
    with pytest.warns(UserWarning, match=rf"{path.name} is damaged .* will be written anew"):
        again = measured(space(), cache=tmp_path, rounds=2)
    assert (again, len(clock)) == (table, 2 * DISTINCT + 2)
    assert path.read_bytes() == good


def test_a_cache_that_cannot_be_written_is_given_up(clock: list[float], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="latencies are not kept, .* cannot be written") as caught:
        table = measured(space(), cache=tmp_path / "file", rounds=1)
    assert (len(caught), len(clock)) == (1, DISTINCT)
    assert table == measured(space(), rounds=1)


def test_the_folder_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ONESHOT_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert cache_folder(True) == Path("/own")
    monkeypatch.delenv("ONESHOT_CACHE")
    assert cache_folder(True) == Path("/shared/oneshot")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(True) == tmp_path / ".cache" / "oneshot"
    assert (cache_folder(False), cache_folder("a"), cache_folder(tmp_path)) == (None, Path("a"), tmp_path)
    with pytest.raises(ConfigurationError, match="cache=1: True, False or a folder"):
        cache_folder(1)  # type: ignore[arg-type]


# --- arguments --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("clock")
def test_progress_counts_measurements() -> None:
    lines: list[str] = []
    measured(nn.Sequential(LayerChoice([Takes(1), nn.Identity()])), progress=lines.append, rounds=2)
    # one candidate, nothing; the networks of both ends execute just these
    assert lines == [f"timing, round {r} of 2: {n} of 2" for r in (1, 2) for n in (1, 2)]


@pytest.mark.usefixtures("clock")
def test_progress_is_a_bar_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    for progress in (False, None):  # no terminal here
        measured(nn.Sequential(LayerChoice([Takes(1), Takes(2)])), progress=progress)
    assert capsys.readouterr() == ("", "")
    measured(nn.Sequential(LayerChoice([Takes(1), Takes(2)])), progress=True)
    shown = capsys.readouterr()
    assert "measuring latency" in shown.err
    assert "15/15" in shown.err  # 3 measurements, 5 rounds
    assert shown.out == ""


@pytest.mark.usefixtures("clock")
def test_one_tensor_or_a_tuple_of_arguments() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.choice = LayerChoice([Takes(1), Takes(2)])

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.choice(x) + y

    assert measured(Two(), (X, X)).by_place == {"choice": {"0": pytest.approx(1), "1": pytest.approx(2)}}
    assert measured(nn.Sequential(LayerChoice([Takes(3)])), X).by_place == {"0": {"0": pytest.approx(3)}}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"runtime": "tflite"}, r"runtime='tflite': allowed are \['torch', 'onnxruntime'\]"),
        ({"threads": 0}, "threads=0: a whole number >= 1"),
        ({"threads": True}, "threads=True"),
        ({"threads": 1.0}, "threads=1.0"),
        ({"rounds": 0}, "rounds=0: a whole number >= 1"),
        ({"rounds": True}, "rounds=True"),
        ({"min_run_time": 0}, "min_run_time=0: seconds above 0"),
        ({"min_run_time": float("nan")}, "min_run_time=nan"),
        ({"cache": 0}, "cache=0: True, False or a folder"),
    ],
)
def test_arguments_that_are_not_allowed(clock: list[float], setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        measured(space(), **setting)
    assert clock == []


@pytest.mark.usefixtures("clock")
def test_a_model_without_choices_is_fixed(tmp_path: Path) -> None:
    table = measured(nn.Sequential(Takes(3)), (X,))
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
    table = measured(Net(), (X,), min_run_time=1e-5)
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
    table = measured(model, (X,), min_run_time=1e-5)
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
            gc.isenabled(),
            os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None,
        )

    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state, before = torch.get_rng_state(), seen()
    measured(model, (X,), min_run_time=1e-5)
    assert seen() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_an_input_that_is_changed_in_place_is_not_the_users() -> None:
    x = torch.full((2, 3), -1.0)
    measured(nn.Sequential(nn.ReLU(inplace=True), LayerChoice([nn.ReLU(), nn.Tanh()])), x, min_run_time=1e-5)
    assert torch.equal(x, torch.full((2, 3), -1.0))


def test_threads_and_modes_come_back_after_an_exception() -> None:
    model = nn.Sequential(LayerChoice([nn.Linear(3, 3), nn.Identity()])).train()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(UnsupportedModelError, match=r"shape \[\(2, 5\)\]"):
            measured(model, (torch.rand(2, 5),))
        assert (torch.get_num_threads(), all(m.training for m in model.modules())) == (2, True)
        measured(model, (X,), min_run_time=1e-5)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_a_model_on_another_device_is_refused() -> None:
    model = nn.Sequential(LayerChoice([nn.Linear(3, 3), nn.Identity()])).to("meta")
    with pytest.raises(UnsupportedModelError, match=r"parameters of Sequential are on \['meta'\]"):
        measured(model, (X,))
