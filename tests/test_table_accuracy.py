"""What a table says of its own error, on layers whose times are known."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_times import Takes, by_clock
from random_spaces import architectures, n_architectures, random_space
from torch import nn

import oneshot.cost.timing
from oneshot import CostModel, LatencyTable, LayerChoice, count_params, fixed, measure_table, price
from oneshot.cost import Term, Timing, cost_range
from oneshot.cost.timing import Repetition
from oneshot.errors import ConfigurationError
from oneshot.export import accuracy, table_error
from oneshot.export.accuracy import agreement, fit_calibration, stratified
from search_spaces.mobilenet import MobileNet

X = torch.rand(2, 3)


def space() -> nn.Module:
    """81 architectures of 10 to 90 ms."""
    blocks = [LayerChoice([nn.Identity(), Takes(k), Takes(3 * k)]) for k in (1.0, 3.0, 9.0, 13.0)]
    return nn.Sequential(Takes(4.0), *blocks, Takes(6.0))


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oneshot.cost.timing, "one_round", by_clock)


def exact(model: nn.Module) -> LatencyTable:
    return measure_table(model, X, cache=False, progress=False)


# --- a table against networks -----------------------------------------------------------------------------------


def test_an_exact_table_has_no_error() -> None:
    model = space()
    found = table_error(model, X, exact(model), n=20, rounds=1)
    assert len(found.networks) == 20
    for judged in (found.uncalibrated, found.calibrated):
        assert (judged.n, judged.within_10_percent) == (10, 1.0)
        assert judged.mape == pytest.approx(0, abs=1e-9)
        assert judged.spearman == pytest.approx(1)
    assert (found.scale, found.offset) == (pytest.approx(1), pytest.approx(0, abs=1e-6))


@pytest.mark.parametrize(("scale", "offset"), [(1.25, 3.0), (0.5, -1.0), (2.0, 8.0)])
def test_a_calibration_is_recovered_and_judged_on_the_other_half(scale: float, offset: float) -> None:
    """The table is exact, distorted by the inverse: (ms - offset) / scale, its fixed part 10 ms too."""
    model = space()
    wrong = exact(model).calibrated(1 / scale, -offset / scale)
    found = table_error(model, X, wrong, n=20, rounds=1)
    assert (found.scale, found.offset) == (pytest.approx(scale), pytest.approx(offset, abs=1e-6))
    held_out = [n for n in found.networks if n.held_out]
    errors = [abs((n.timing.median_ms - offset) / scale / n.timing.median_ms - 1) for n in held_out]
    assert found.uncalibrated.mape == pytest.approx(np.mean(errors))
    assert found.calibrated.mape == pytest.approx(0, abs=1e-9)
    # The calibrated table is one: it prices every network of the space as it is.
    truth, calibrated = price(model, (X,), exact(model)), price(model, (X,), found.table)
    for choices in architectures(model):
        assert calibrated.of(choices) == pytest.approx(truth.of(choices))


def test_a_calibration_never_brings_the_fixed_part_below_0() -> None:
    """Without fixed layers, and predictions that are 3 ms too long: the best line would start at -3 ms."""
    model = nn.Sequential(*(LayerChoice([Takes(k), Takes(3 * k)]) for k in (1.0, 2.0, 4.0, 8.0)))
    found = table_error(model, X, exact(model).calibrated(0.7, 3.0), n=16, rounds=1)
    assert found.table.fixed == 0
    assert found.scale * (0.7 * 0 + 3) + found.offset == pytest.approx(0, abs=1e-9)


def test_networks_are_different_sorted_and_take_turns_in_calibrating() -> None:
    model = space()
    found = table_error(model, (X,), exact(model), n=9, rounds=1, seed=3)
    assert [n.held_out for n in found.networks] == [False, True] * 4 + [False]
    predicted = [n.predicted_ms for n in found.networks]
    assert predicted == sorted(predicted)
    assert len({tuple(n.choices.values()) for n in found.networks}) == 9
    assert predicted[0] < 10 + 80 / 9
    assert predicted[-1] > 90 - 80 / 9
    assert table_error(model, X, exact(model), n=9, rounds=1, seed=3) == found
    assert table_error(model, X, exact(model), n=9, rounds=1, seed=4) != found


def test_without_calibration_all_networks_judge() -> None:
    model = space()
    table = exact(model).calibrated(2.0, 0.0)
    found = table_error(model, X, table, n=5, rounds=1, calibrate=False)
    assert (found.table, found.scale, found.offset) == (table, 1.0, 0.0)
    assert found.calibrated == found.uncalibrated
    assert (found.uncalibrated.mape, found.uncalibrated.n) == (pytest.approx(1.0), 5)
    assert all(n.held_out for n in found.networks)


def test_the_report_shows_every_network() -> None:
    model = space()
    text = str(table_error(model, X, exact(model).calibrated(0.5, 0.0), n=6, rounds=1))
    assert text.count("| held out") == text.count("| calibrates") == 3
    assert "as measured: MAPE 50.0%, 0% within 10 %, Spearman 1.000 (3 networks)" in text
    assert "MAPE 0.0%, 100% within 10 %, Spearman 1.000 (3 networks)" in text


def test_runtime_and_threads_are_those_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []

    def timed(modules: list[nn.Module], args: Any, *, runtime: str, threads: int, **_: Any) -> list[Timing]:
        seen.append((runtime, threads))
        return [Timing(1.0 + i, 2.0, 0.1, 5) for i in range(len(modules))]

    monkeypatch.setattr(accuracy, "time_modules", timed)
    model = space()
    plain = exact(model)
    rows = {"by_place": plain.by_place, "fixed": plain.fixed}
    other = LatencyTable(**rows, runtime={"runtime": "onnxruntime 1.31, exported by torch 2.13", "threads": "4"})
    told = LatencyTable(**rows, runtime={"runtime": "a phone", "threads": "many"})
    for table in (plain, other, told, LatencyTable(**rows)):
        table_error(model, X, table, n=6)
    table_error(model, X, other, n=6, runtime="torch", threads=2)
    assert seen == [("torch", 1), ("onnxruntime", 4), ("torch", 1), ("torch", 1), ("torch", 2)]


def test_networks_may_be_built_otherwise() -> None:
    model, built = space(), []

    def build(given: nn.Module, choices: Any) -> nn.Module:
        built.append((given is model, dict(choices)))
        return nn.Sequential(fixed(given, choices), Takes(100.0))

    found = table_error(model, X, exact(model), n=6, rounds=1, build=build)
    assert built == [(True, n.choices) for n in found.networks]
    assert found.offset == pytest.approx(100)


def test_a_space_that_is_too_small() -> None:
    model = nn.Sequential(LayerChoice([Takes(1), Takes(2), Takes(3)]))
    message = r"table_error\(n=20, calibrate=True\): the space gave 3 different networks, at least 4 are needed"
    with pytest.raises(ConfigurationError, match=message):
        table_error(model, X, exact(model))
    assert table_error(model, X, exact(model), calibrate=False, rounds=1).uncalibrated.n == 3
    with pytest.raises(ConfigurationError, match="gave 1 different networks, at least 2"):
        table_error(model, X, exact(model), calibrate=False, n=1)


# --- agreement and calibration ----------------------------------------------------------------------------------


def test_agreement_by_hand() -> None:
    # errors 10 %, 20 %, 0, 11 %; ranks 2 1 3 4 against 1 2 3 4: 1 - 6 * 2 / (4 * 15) = 0.8
    found = agreement([1.1, 0.8, 3.0, 4.44], [1.0, 1.0000001, 3.0, 4.0])
    assert found.mape == pytest.approx((0.1 + 0.2 + 0 + 0.11) / 4, abs=1e-6)
    assert (found.within_10_percent, found.spearman, found.n) == (0.5, pytest.approx(0.8), 4)


def test_agreement_of_equal_numbers_has_no_rank() -> None:
    for predicted, measured in (([1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [2.0, 2.0])):
        assert math.isnan(agreement(predicted, measured).spearman)


POSITIVE = st.floats(0.01, 100)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(POSITIVE, min_size=3, max_size=8, unique=True), fixed_ms=st.floats(0, 10), seed=st.integers(0, 999)
)
def test_the_fit_is_the_least_relative_squares(rows: list[float], fixed_ms: float, seed: int) -> None:
    """Against numpy's unconstrained solution where that is allowed; and never worse than its neighbours."""
    rng = np.random.default_rng(seed)
    predicted = np.array(rows) + fixed_ms
    measured = (1.5 * predicted + 0.2) * rng.uniform(0.8, 1.25, len(rows))
    matrix = np.stack([predicted / measured, 1 / measured], axis=1)
    free, *_ = np.linalg.lstsq(matrix, np.ones(len(rows)), rcond=None)

    def loss(scale: float, offset: float) -> float:
        return float((((scale * predicted + offset) / measured - 1) ** 2).sum())

    try:
        scale, offset = fit_calibration(predicted.tolist(), measured.tolist(), fixed_ms)
    except ConfigurationError:
        assert free[0] <= 1e-9  # the best scale is not above 0
        return
    if free[0] > 1e-6 and free[0] * fixed_ms + free[1] > 1e-6:
        assert loss(scale, offset) == pytest.approx(loss(*free), rel=1e-6, abs=1e-9)
    rest = scale * fixed_ms + offset
    assert rest >= -1e-9
    for s, r in itertools.product((0.99, 1.0, 1.01), (0.0, 0.99 * rest, 1.01 * rest)):
        assert loss(scale, offset) <= loss(s * scale, r - s * scale * fixed_ms) + 1e-9


def test_a_fit_that_would_make_the_fixed_part_negative() -> None:
    # 0.5 and 2 ms for rows of 1 and 2 ms: the line is 1.5 * ms - 1. Through 0: s = (2 + 1) / (2^2 + 1^2)
    assert fit_calibration([1.0, 2.0], [0.5, 2.0], 0.0) == (pytest.approx(0.6), pytest.approx(0, abs=1e-12))


def test_predictions_without_relation_are_an_error() -> None:
    with pytest.raises(ConfigurationError, match="predicted to take 1 to 3 ms take 1 to 3 ms, without relation"):
        fit_calibration([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], 0.0)


# --- which networks ---------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 60))
def test_architectures_are_different_and_as_many_as_there_are(seed: int, n: int) -> None:
    model = random_space(seed, lambda rng: nn.Linear(3, 3, bias=rng.random() < 0.5))
    cost = count_params(model)
    found = stratified(cost, n, random.Random(0))
    assert len(found) == len({tuple(sorted(choices.items())) for choices in found}) == min(n, n_architectures(model))
    every = list(architectures(model))
    assert all(choices in every for choices in found)


def test_there_is_one_network_in_each_part_of_the_range() -> None:
    # 2^10 sums of powers of 2: 0 to 1023, each once; random ones would be in the middle
    model = nn.Sequential(*(LayerChoice([nn.Identity(), nn.Identity()], label=str(i)) for i in range(10)))
    cost = CostModel("ms", "ms", [Term(2.0**i, {str(i): frozenset({1})}) for i in range(10)], model)
    assert cost_range(cost) == (0, 1023)
    found = stratified(cost, 32, random.Random(0))
    assert sorted(int(cost.of(choices) // 32) for choices in found) == list(range(32))


# --- the bench --------------------------------------------------------------------------------------------------


def by_weights(run: Any, *_: Any) -> list[Repetition]:
    """A microsecond for each weight, and 1 ms for a run."""
    return [Repetition(1.0 + sum(p.numel() for p in run.func.parameters()) / 1e3, 1.0, 0.01)]


def bench() -> Any:
    path = Path(__file__).parent.parent / "examples" / "bench_latency_table.py"
    spec = importlib.util.spec_from_file_location("bench_latency_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_bench_says_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(oneshot.cost.timing, "one_round", by_weights)
    assert bench().main(["--networks", "10", "--runtime", "torch", "--out", str(tmp_path / "bench.json")]) == 0
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert [network["held_out"] for network in figures["networks"]] == [False, True] * 5
    one = pytest.approx(1)
    assert figures["calibrated"] == {"mape": pytest.approx(0), "within_10_percent": 1, "spearman": one, "n": 5}
    assert figures["repeated"] == {"mean_deviation": 0, "range": 0}
    assert LatencyTable.read(figures["table"]).fixed == pytest.approx(figures["table"]["fixed"])
    printed = capsys.readouterr().out
    assert "one network measured 10 times: 0.0% from its median on average, 0.0% from the fastest" in printed
    assert "| calibrated  | 0.0% | 100%        | 1.000    |        5 |" in printed


def test_the_bench_fails_where_the_table_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[int, int] = {}

    def a_third_is_slow(run: Any, *_: Any) -> list[Repetition]:
        (one,) = by_weights(run)
        nth = seen.setdefault(id(run.func), len(seen)) if isinstance(run.func, MobileNet) else 0
        return [one._replace(ms=one.ms * (3 if nth % 3 == 1 else 1))]

    monkeypatch.setattr(oneshot.cost.timing, "one_round", a_third_is_slow)
    assert bench().main(["--networks", "10", "--runtime", "torch"]) == 1
    assert "at most 10% wanted" in capsys.readouterr().err
