"""The best architecture under budgets, against looking at every architecture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import oneshot.cost.decode
from oneshot import CostModel, LayerChoice, Repeat, count_params
from oneshot.cost import Term, best_under_budget, cost_range
from oneshot.errors import ConfigurationError, InfeasibleTargetError, UnsupportedModelError

Problem = tuple[dict[str, list[float]], dict[str, CostModel], dict[str, float]]


def space(sizes: Sequence[int]) -> nn.Module:
    """Labels 'l0', 'l1', ... with so many options each."""
    return nn.Sequential(*(LayerChoice([nn.Identity() for _ in range(n)], f"l{i}") for i, n in enumerate(sizes)))


def cost_of(values: Sequence[Sequence[float]], name: str = "c", fixed: float = 0.0) -> CostModel:
    """A cost without products: one row of values for each label."""
    terms = [Term(v, {f"l{i}": frozenset({o})}) for i, row in enumerate(values) for o, v in enumerate(row)]
    return CostModel(name, "u", [Term(fixed, {}), *terms], space([len(row) for row in values]))


def architectures(log_p: Mapping[str, Sequence[float]]) -> list[dict[str, int]]:
    options = itertools.product(*(range(len(row)) for row in log_p.values()))
    return [dict(zip(log_p, o, strict=True)) for o in options]


def score(log_p: Mapping[str, Sequence[float]], choices: Mapping[str, int]) -> float:
    return math.fsum(row[choices[label]] for label, row in log_p.items())


def meets(costs: Mapping[str, CostModel], budget: Mapping[str, float], choices: Mapping[str, int]) -> bool:
    return all(costs[name].of(choices) <= limit for name, limit in budget.items())


# What an option costs: many equal numbers, or small ones next to large ones, as a BatchNorm next to a convolution.
WHOLE = st.sampled_from(
    [st.integers(0, 3), st.integers(0, 20), st.sampled_from([0, 1, 7, 10**5, 10**5 + 1, 3 * 10**5])]
)
BROKEN = st.just(st.sampled_from([0.0, 0.1, 0.2, 0.30000000000000004, 1 / 3, 0.7, 12.125, 3e3]))


@st.composite
def problems(draw: st.DrawFn, kinds: st.SearchStrategy[st.SearchStrategy[float]]) -> Problem:
    """Up to six decisions with one to three costs, nested ones among them; each budget is met exactly by one arch."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    labels = {f"l{i}": n for i, n in enumerate(sizes)}
    model = space(sizes)
    conditions = st.sets(st.sampled_from(list(labels)), min_size=2, max_size=3).flatmap(
        lambda chosen: st.fixed_dictionaries(
            {k: st.frozensets(st.integers(0, labels[k] - 1), min_size=1) for k in sorted(chosen)}
        )
    )
    costs = {}
    for name in ("x", "y", "z")[: draw(st.integers(1, 3))]:
        values = draw(kinds)
        terms = [Term(float(draw(values)), {})]
        for label, n in labels.items():
            common = float(draw(values))
            terms += [Term(common + float(draw(values)), {label: frozenset({o})}) for o in range(n)]
        signs = st.sampled_from([1.0, 1.0, -1.0])
        terms += [Term(draw(signs) * float(draw(values)), draw(conditions)) for _ in range(draw(st.integers(0, 3)))]
        costs[name] = CostModel(name, "u", terms, model)
    logits = st.sampled_from([st.integers(-4, 4).map(lambda i: i / 2), st.floats(-5, 5, width=32)])
    log_p = {}
    for label, n in labels.items():
        row = draw(st.lists(draw(logits), min_size=n, max_size=n))
        log_p[label] = torch.tensor(row, dtype=torch.float64).log_softmax(0).tolist()
    met = {label: draw(st.integers(0, n - 1)) for label, n in labels.items()}
    return log_p, costs, {name: cost.of(met) for name, cost in costs.items()}


def check(problem: Problem) -> None:
    log_p, costs, budget = problem
    best = max(score(log_p, c) for c in architectures(log_p) if meets(costs, budget, c))
    got = best_under_budget(log_p, costs, budget)
    assert meets(costs, budget, got), (got, budget)
    assert score(log_p, got) == pytest.approx(best, abs=1e-8)


# --- against enumeration ----------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(problems(WHOLE))
def test_best_with_whole_costs_and_ties_at_the_budget(problem: Problem) -> None:
    check(problem)


@settings(max_examples=60, deadline=None)
@given(problems(BROKEN))
def test_best_with_costs_that_are_rounded(problem: Problem) -> None:
    check(problem)


@settings(max_examples=40, deadline=None)
@given(problems(WHOLE), st.sampled_from([0.0, 0.5, 1.0]))
def test_budgets_that_may_be_out_of_reach(problem: Problem, below: float) -> None:
    log_p, costs, _ = problem
    archs = architectures(log_p)
    # the least of every cost by itself, or below it: with several costs perhaps no arch has them all
    budget = {name: min(cost.of(c) for c in archs) - below for name, cost in costs.items()}
    if any(meets(costs, budget, c) for c in archs):
        check((log_p, costs, budget))
        return
    with pytest.raises(InfeasibleTargetError) as caught:
        best_under_budget(log_p, costs, budget)
    for name, cost in costs.items():
        low, high = min(cost.of(c) for c in archs), max(cost.of(c) for c in archs)
        assert f"{name}: budget {budget[name]:.15g}, reachable {low:.15g} to {high:.15g} u" in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(problems(WHOLE) | problems(BROKEN))
def test_range_of_a_cost(problem: Problem) -> None:
    log_p, costs, _ = problem
    for cost in costs.values():
        every = [cost.of(c) for c in architectures(log_p)]
        assert cost_range(cost) == pytest.approx((min(every), max(every)), rel=1e-12, abs=1e-12)


def test_nested_space_by_enumeration() -> None:
    """A depth with choices in its blocks: the cost of a block is due only if the depth reaches it."""
    blocks = [LayerChoice([nn.Linear(4, 4), nn.Linear(4, 9), nn.Identity()], label=f"op{i}") for i in range(3)]
    model = nn.Sequential(Repeat(blocks, depth=(0, 3), label="depth"), nn.Linear(4, 2))
    cost = count_params(model)
    log_p = {"depth": [-4.0, -3.0, -0.4, -0.5], **{f"op{i}": [-0.9 - i / 8, -0.3 + i / 8, -3.0] for i in range(3)}}
    for limit in sorted({cost.of(c) for c in architectures(log_p)}):
        check((log_p, {"params": cost}, {"params": limit}))


# --- hard cases -------------------------------------------------------------------------------------------------


def test_a_crowd_just_above_the_budget() -> None:
    """512 architectures within a tolerance of 1e-6 of the budget, all more probable than the only one that meets it."""
    n = 9
    cost = cost_of([[10**6, 10**6 + 1]] * n)
    log_p = {f"l{i}": [-5.0, -0.1] for i in range(n)}
    assert best_under_budget(log_p, {"c": cost}, {"c": n * 10**6}) == dict.fromkeys(log_p, 0)
    with pytest.raises(InfeasibleTargetError, match=r"budget 8999999\.5, reachable 9000000 to 9000009 u"):
        best_under_budget(log_p, {"c": cost}, {"c": n * 10**6 - 0.5})


def test_ties_of_decimal_numbers() -> None:
    """0.1 + 1.3 and 0.7 + 0.7 differ as floats; for who wrote the table both are 1.4, and meet a budget of 1.4."""
    n = 10
    cost = cost_of([[0.1, 0.7, 1.3]] * n)
    tenths = cost_of([[1, 7, 13]] * n)
    log_p = {f"l{i}": [-2.0 - i / 7, -1.0, -0.1 * i] for i in range(n)}
    for limit in (10, 16, 70, 100, 124):
        got = best_under_budget(log_p, {"c": cost}, {"c": limit / 10})
        expected = best_under_budget(log_p, {"c": tenths}, {"c": limit})
        assert (cost.of(got), tenths.of(got) <= limit) == (tenths.of(got) / 10, True)
        assert score(log_p, got) == pytest.approx(score(log_p, expected), abs=1e-8)


def test_nothing_fits_by_less_than_the_tolerance() -> None:
    cost = cost_of([[0.1, 0.7, 1.3]] * 12, fixed=1e6)
    log_p = {f"l{i}": [-2.0, -1.0, -0.1] for i in range(12)}
    low, _ = cost_range(cost)
    assert best_under_budget(log_p, {"c": cost}, {"c": low}) == dict.fromkeys(log_p, 0)
    with pytest.raises(InfeasibleTargetError, match=r"reachable 1000001\.2 to"):
        best_under_budget(log_p, {"c": cost}, {"c": low - 1e-5})


def test_a_large_option_that_leaves_room_for_no_small_one() -> None:
    """The large option is worth more than all small ones together, and with it every small one is too much."""
    n = 10
    cost = cost_of([[0, 8 * 10**6], *([[0, 1]] * n)], fixed=123.0)
    log_p = {"l0": [-50.0, -0.1], **{f"l{i + 1}": [-2.0, -0.2] for i in range(n)}}
    got = best_under_budget(log_p, {"c": cost}, {"c": 123 + 8 * 10**6})
    assert got == {"l0": 1, **{f"l{i + 1}": 0 for i in range(n)}}
    got = best_under_budget(log_p, {"c": cost}, {"c": 123 + 8 * 10**6 + 3})
    assert got["l0"] == 1
    assert sum(got.values()) == 1 + 3


def test_a_space_of_the_size_of_the_paper() -> None:
    """21 decisions of 7 options where cost and gain are proportional: the best fills the budget to the last unit."""
    values = [[float((i + 1) * o) for o in range(7)] for i in range(21)]
    cost = cost_of(values)
    log_p = {f"l{i}": [-(1386.0 - v) / 1000 for v in row] for i, row in enumerate(values)}
    for limit in (0, 1, 500, 777, 1385):  # all: 6 * (1 + ... + 21) = 1386
        got = best_under_budget(log_p, {"c": cost}, {"c": limit})
        assert cost.of(got) == limit


def test_without_a_budget_it_is_the_argmax_and_the_first_of_equals() -> None:
    cost = cost_of([[5, 1, 1], [2, 3]])
    log_p = {"l0": [-1.0, -0.5, -0.5], "l1": [-0.1, -9.0]}
    assert best_under_budget(log_p, {"c": cost}, {}) == {"l0": 1, "l1": 0}
    assert best_under_budget(log_p, {"c": cost}, {"c": 3}) == {"l0": 1, "l1": 0}


def test_impossible_options_are_taken_only_when_nothing_else_fits() -> None:
    cost = cost_of([[5, 1], [5, 1]])
    log_p = {"l0": [0.0, -math.inf], "l1": [0.0, -800.0]}
    assert best_under_budget(log_p, {"c": cost}, {"c": 6}) == {"l0": 0, "l1": 1}
    assert best_under_budget(log_p, {"c": cost}, {"c": 2}) == {"l0": 1, "l1": 1}


def test_a_model_without_choices() -> None:
    cost = count_params(nn.Linear(2, 2))
    assert best_under_budget({}, {"params": cost}, {"params": 6}) == {}
    assert cost_range(cost) == (6.0, 6.0)
    with pytest.raises(InfeasibleTargetError, match="budget 5, reachable 6 to 6 parameters"):
        best_under_budget({}, {"params": cost}, {"params": 5})


def test_the_minimum_in_the_message_is_enough() -> None:
    """A minimum that was rounded down, or to 6 digits, could not be met."""
    cost = cost_of([[1 / 3], [2 / 7, 5.0]], fixed=1e6)
    log_p = {"l0": [0.0], "l1": [-1.0, -0.1]}
    with pytest.raises(InfeasibleTargetError, match=r"budget 1000000\.5, reachable 1000000\.61904762 to ") as caught:
        best_under_budget(log_p, {"c": cost}, {"c": 1000000.5})
    least = float(str(caught.value).split("reachable ")[1].split()[0])
    assert best_under_budget(log_p, {"c": cost}, {"c": least}) == {"l0": 0, "l1": 0}


def test_budgets_that_cannot_be_met_together() -> None:
    costs = {"x": cost_of([[0, 9]], "x"), "y": cost_of([[9, 0]], "y")}
    with pytest.raises(InfeasibleTargetError, match=r"x: budget 5, reachable 0 to 9 u(.|\n)*met together"):
        best_under_budget({"l0": [-0.1, -2.0]}, costs, {"x": 5, "y": 5})


# --- arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [math.nan, math.inf, -math.inf, "3", None, True, [3], 10**400])
def test_a_budget_that_is_no_number(limit: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"budget c=.*a finite number is needed"):
        best_under_budget({"l0": [-0.1, -2.0]}, {"c": cost_of([[0, 9]])}, {"c": limit})


def test_a_budget_of_an_unknown_cost() -> None:
    with pytest.raises(ConfigurationError, match=r"budget for 'latency': the costs of this run are \['c'\]"):
        best_under_budget({"l0": [-0.1, -2.0]}, {"c": cost_of([[0, 9]])}, {"latency": 3})


def test_a_cost_of_another_model() -> None:
    with pytest.raises(ConfigurationError, match=r"decisions \{'l0': 3, 'l1': 1\}.*the model \{'l0': 2\}"):
        best_under_budget({"l0": [-0.1, -2.0]}, {"c": cost_of([[0, 9, 9], [0]])}, {"c": 3})


@pytest.mark.parametrize("row", [[math.nan, 0.0], [-math.inf, -math.inf]])
def test_log_probabilities_that_say_nothing(row: list[float]) -> None:
    with pytest.raises(ConfigurationError, match="log probabilities of 'l0'"):
        best_under_budget({"l0": row}, {"c": cost_of([[0, 9]])}, {"c": 3})


# --- the solver -------------------------------------------------------------------------------------------------


def test_when_the_cuts_are_used_up_the_budget_is_still_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oneshot.cost.decode, "_MOST_CUTS", 0)
    cost = cost_of([[1, 5, 9], [1, 5, 9]])
    log_p = {"l0": [-3.0, -2.0, -0.1], "l1": [-3.0, -2.0, -0.1]}
    assert cost.of(best_under_budget(log_p, {"c": cost}, {"c": 11.0})) <= 11.0
    assert best_under_budget(log_p, {"c": cost}, {"c": 2}) == {"l0": 0, "l1": 0}
    with pytest.raises(InfeasibleTargetError):
        best_under_budget(log_p, {"c": cost}, {"c": 1.9})


def test_a_solver_that_fails_is_asked_again_and_then_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def failing(*args: Any, options: Mapping[str, Any], **kwargs: Any) -> Any:
        asked.append(options["presolve"])
        return SimpleNamespace(status=4, x=None, message="Solve error")

    monkeypatch.setattr(oneshot.cost.decode, "milp", failing)
    with pytest.raises(
        UnsupportedModelError, match=r"the integer program of 2 variables .* was not solved: Solve error"
    ):
        best_under_budget({"l0": [-2.0, -0.1]}, {"c": cost_of([[1, 5]])}, {"c": 3})
    assert asked == [True, False]
