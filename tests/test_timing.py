"""Repetitions and which of them count, on a clock that is not the machine's."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from oneshot.cost import Timing, time_module, time_modules, timing
from oneshot.cost.timing import Repetition, interleaved, one_round, summarised, undisturbed
from oneshot.errors import ConfigurationError

CLEAN = Repetition(1.0, 1.0, 0.010)


# --- which repetitions count ------------------------------------------------------------------------------------


def test_a_repetition_off_the_processor_is_dropped() -> None:
    # 0.92 of the time on the processor is 1.087 times as long; 0.90 is 1.111 times
    rows = [CLEAN] * 10 + [Repetition(2.0, 0.92, 0.010), Repetition(3.0, 0.90, 0.010), Repetition(9.0, 0.1, 0.010)]
    assert undisturbed(rows, 0.010) == [1.0] * 10 + [2.0]


def test_a_repetition_on_a_slow_processor_is_dropped() -> None:
    rows = [CLEAN] * 10 + [Repetition(2.0, 1.0, 0.0109), Repetition(3.0, 1.0, 0.0111), Repetition(0.5, 1.0, 0.02)]
    assert undisturbed(rows, 0.010) == [1.0] * 10 + [2.0]


def test_too_few_are_filled_up_with_the_least_disturbed() -> None:
    disturbed = [Repetition(10.0 + i, 1.0 / (1.2 + i), 0.010) for i in range(20)]
    slow = [Repetition(100.0, 1.0, 0.013)]  # 1.3: between the first two of these
    assert undisturbed([CLEAN] * 4 + disturbed[::-1] + slow, 0.010) == [1.0] * 4 + [10, 100, 11, 12, 13, 14]
    assert undisturbed(disturbed[:3], 0.010) == [10, 11, 12]
    assert undisturbed([Repetition(5.0, 0.0, 0.010)], 0.010) == [5.0]


@given(st.lists(st.builds(Repetition, st.floats(0, 1e3), st.floats(0, 1), st.floats(1e-3, 1.0)), min_size=1))
def test_what_counts_is_never_judged_by_its_own_time(rows: list[Repetition]) -> None:
    fastest = min(r.probe_ms for r in rows)
    kept = undisturbed(rows, fastest)
    numbered = [r._replace(ms=float(i)) for i, r in enumerate(rows)]
    assert kept == [rows[int(i)].ms for i in undisturbed(numbered, fastest)]
    assert min(10, len(rows)) <= len(kept) <= len(rows)


def test_slow_and_fast_mode_of_a_processor() -> None:
    """What a shared core does: a third of the time all takes 1.6 times as long, the probe too."""
    rng = np.random.default_rng(0)
    rows = [
        Repetition(float(slow * rng.normal(2.0, 0.01)), 1.0, float(slow * 0.01))
        for slow in rng.choice([1.0, 1.6], size=300, p=[1 / 3, 2 / 3])
    ]
    found = summarised({"a": [rows[:100], rows[100:]]})["a"]
    assert found.median_ms == pytest.approx(2.0, rel=0.005)
    assert 60 < found.n < 140  # 100 of 300, give or take five standard deviations of 8
    assert found.iqr_ms == pytest.approx(1.349 * 0.01, rel=0.4)  # of a normal distribution


def test_the_fastest_probe_is_that_of_all_measurements() -> None:
    fast, slow = [Repetition(1.0, 1.0, 0.01)] * 10, [Repetition(5.0, 1.0, 0.03)] * 10
    found = summarised({"a": [slow, fast], "b": [[*slow, Repetition(4.0, 1.0, 0.01)]]})
    assert (found["a"].median_ms, found["a"].n) == (1.0, 10)
    assert (found["b"].median_ms, found["b"].n) == (5.0, 10)  # one clean one, and nine of the others


def test_timing_is_median_and_quantiles() -> None:
    ms = np.random.default_rng(0).exponential(size=101).tolist()
    low, middle, high, p95 = np.percentile(ms, [25, 50, 75, 95])
    assert Timing.of(ms) == Timing(middle, p95, high - low, 101)


# --- one round --------------------------------------------------------------------------------------------------


class Machine:
    """A clock that only a run and a probe advance. ``share``: of the time of the next runs on the processor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float, share: Callable[[int], float] = lambda i: 1.0):
        self.wall = self.cpu = 0.0
        self.seconds, self.share, self.runs = seconds, share, 0
        self.fastest = 0.01
        info = lambda name: SimpleNamespace(resolution=1e-9)  # noqa: E731
        clocks = {"perf_counter": lambda: self.wall, "thread_time": lambda: self.cpu, "process_time": lambda: self.cpu}
        monkeypatch.setattr(timing, "time", SimpleNamespace(get_clock_info=info, **clocks))

    def __call__(self) -> float:
        return 0.01

    def run(self) -> None:
        share = self.share(self.runs)
        self.runs += 1
        self.cpu += self.seconds
        self.wall += self.seconds / share


def test_a_round_repeats_short_runs_together(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 1e-5)
    found = one_round(machine.run, 0.02, machine, 1)  # type: ignore[arg-type]
    assert set(found) == {Repetition(0.01, 1.0, 0.01)}
    assert len(found) == pytest.approx(40, abs=1)  # 0.02 s of 0.5 ms each
    assert machine.runs == 3 + 50 * len(found)  # 3 to warm up


def test_a_round_has_three_repetitions_of_a_long_run(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 2.0)
    assert one_round(machine.run, 0.02, machine, 1) == [Repetition(2000.0, 1.0, 0.01)] * 3  # type: ignore[arg-type]


def test_a_disturbed_round_takes_longer_but_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    half = Machine(monkeypatch, 1e-3, lambda i: 0.5 if i % 2 else 1.0)
    found = one_round(half.run, 0.02, half, 1)  # type: ignore[arg-type]
    assert sum(r.cpu_share == 1.0 for r in found) == pytest.approx(20, abs=1)
    assert len(found) == pytest.approx(40, abs=2)
    never = Machine(monkeypatch, 1e-3, lambda i: 0.5)
    found = one_round(never.run, 0.02, never, 1)  # type: ignore[arg-type]
    assert len(found) == pytest.approx(100, abs=1)  # ten times 0.02 s, 2 ms of wall time each
    assert set(found) == {Repetition(2.0, 0.5, 0.01)}


def test_rounds_are_interleaved_and_runs_prepared_once() -> None:
    order: list[str] = []

    def preparing(name: str) -> Callable[[], Callable[[], object]]:
        def prepare() -> Callable[[], object]:
            order.append(f"prepare {name}")
            return lambda: None

        return prepare

    found: dict[str, list[Any]] = {"a": [], "b": [[CLEAN]], "c": [[CLEAN]] * 3}
    interleaved(
        {name: preparing(name) for name in "abc"},
        found,
        rounds=3,
        min_run_time=1e-5,
        threads=1,
        before_round=lambda key: order.append(f"before {key}"),
        after_round=lambda done, n, key: order.append(f"{done} {n} {key}"),
    )
    expected = ["before a", "prepare a", "0 0 a", "before a", "1 0 a", "before b", "prepare b", "1 1 b"]
    assert order == [*expected, "before a", "2 0 a", "before b", "2 1 b"]
    assert [len(rounds) for rounds in found.values()] == [3, 3, 3]


# --- whole networks, on the real clock --------------------------------------------------------------------------


class Watched(nn.Module):
    """Remembers the modes it ran in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[bool, bool]] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add((self.training, torch.is_grad_enabled()))
        return x


X = torch.rand(2, 3)


def test_time_module_runs_in_eval_mode_without_grad() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), Watched()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = time_module(model, (X,), min_run_time=1e-5, rounds=2)
    assert 0 < found.median_ms <= found.p95_ms
    assert found.n >= 6  # two rounds of three, fewer than ten
    assert model[1].seen == {(False, False)}
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_time_module_takes_any_function() -> None:
    seen: set[bool] = set()
    assert time_module(lambda x: seen.add(torch.is_grad_enabled()), (X,), min_run_time=1e-5).median_ms > 0
    assert seen == {False}
    assert torch.is_grad_enabled()


def test_time_modules_keeps_the_order_and_repeats_what_stands_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def by_name(run: Callable[[], Any], *_: Any) -> list[Repetition]:
        calls.append(run())
        return [Repetition(float(len(calls)), 1.0, 0.01)]

    monkeypatch.setattr(timing, "one_round", by_name)
    names = [lambda: "a", lambda: "b"]
    found = time_modules([names[0], names[1], names[0]], (), rounds=3)
    assert calls == ["a", "b", "a"] * 3
    assert [t.median_ms for t in found] == [4, 5, 6]
    assert time_modules([], ()) == []


def test_whole_networks_on_onnx_runtime() -> None:
    found = time_module(nn.Linear(3, 2), (X,), runtime="onnxruntime", rounds=1, min_run_time=1e-4)
    assert found.median_ms > 0


def test_settings_are_checked_before_anything_runs() -> None:
    with pytest.raises(ConfigurationError, match="runtime='tensorrt'"):
        time_module(pytest.fail, ("ran",), runtime="tensorrt")
    with pytest.raises(ConfigurationError, match="threads=0"):
        time_modules([pytest.fail], ("ran",), threads=0)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not pin threads")
def test_one_thread_is_pinned_and_all_is_put_back() -> None:
    import gc

    before = os.sched_getaffinity(0), torch.get_num_threads(), gc.isenabled()
    seen: set[tuple[int, int, bool]] = set()

    def look() -> None:
        seen.add((len(os.sched_getaffinity(0)), torch.get_num_threads(), gc.isenabled()))

    time_module(look, (), rounds=1, min_run_time=1e-5)
    assert seen == {(1, 1, False)}
    seen.clear()
    time_module(look, (), rounds=1, min_run_time=1e-5, threads=2)
    assert seen == {(len(before[0]), 2, False)}
    with pytest.raises(ZeroDivisionError):
        time_module(lambda: 1 / 0, ())
    assert (os.sched_getaffinity(0), torch.get_num_threads(), gc.isenabled()) == before
