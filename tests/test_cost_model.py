"""A cost as a function of the decisions: its expectation by enumeration, its gradient by the closed form."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_spaces import architectures, random_space
from torch import Tensor, nn

import oneshot
from oneshot import (
    BinaryGates,
    CostModel,
    LatencyTable,
    LayerChoice,
    Softmax,
    count_params,
    decisions,
    draw,
    set_sampler,
)
from oneshot.cost import Term, price
from oneshot.cost.model import terms_of_any
from oneshot.errors import UnsupportedModelError
from oneshot.export import arch_of
from oneshot.graph import Condition
from oneshot.mutables import Sampler


def space(*sizes: int) -> nn.Module:
    """Labels 'l0', 'l1', ... with so many options each."""
    return nn.Sequential(*(LayerChoice([nn.Identity() for _ in range(n)], f"l{i}") for i, n in enumerate(sizes)))


def random_probabilities(model: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        label: torch.randn(len(d.options), dtype=torch.float64, generator=generator).softmax(0)
        for label, d in decisions(model).items()
    }


def expectation(costs: Mapping[tuple[int, ...], float], p: Mapping[str, Tensor]) -> float:
    """sum_o C(o) prod_l p_l(o_l), by enumeration."""
    rows = [row.tolist() for row in p.values()]
    return math.fsum(c * math.prod(row[o] for row, o in zip(rows, key, strict=True)) for key, c in costs.items())


def leaf(rng: random.Random) -> nn.Module:
    n = rng.randint(0, 3)
    return nn.Sequential(nn.Linear(3, n), nn.Linear(n, 3)) if n else nn.Identity()


# --- expectation ------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_expected_params_are_the_sum_over_all_rebuilt_networks(seed: int) -> None:
    model = random_space(seed, leaf)
    costs = {
        tuple(choices.values()): sum(p.numel() for p in oneshot.fixed(model, arch_of(model, choices)).parameters())
        for choices in architectures(model)
    }
    p = random_probabilities(model, seed)
    assert float(count_params(model).expected(p)) == pytest.approx(expectation(costs, p), rel=1e-9)


@st.composite
def conditions(draw: st.DrawFn, sizes: tuple[int, ...]) -> Condition:
    labels = draw(st.sets(st.integers(0, len(sizes) - 1), max_size=3))
    return {f"l{i}": draw(st.frozensets(st.integers(0, sizes[i] - 1), min_size=1)) for i in labels}


SIZES = (2, 3, 1, 3)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-20, 20), conditions(SIZES)), max_size=8), st.integers(0, 1000))
def test_a_cost_is_the_sum_of_the_terms_that_hold(terms: list[tuple[int, Condition]], seed: int) -> None:
    model = space(*SIZES)
    cost = CostModel("c", "u", [Term(float(value), when) for value, when in terms], model)
    costs = {}
    for choices in architectures(model):
        due = sum(v for v, when in terms if all(choices[label] in options for label, options in when.items()))
        costs[tuple(choices.values())] = due
        assert cost.of(choices) == due
    p = random_probabilities(model, seed)
    assert float(cost.expected(p)) == pytest.approx(expectation(costs, p), rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(st.lists(conditions(SIZES), max_size=5))
def test_a_value_due_under_any_condition_is_due_once(anywhere: list[Condition]) -> None:
    model = space(*SIZES)
    cost = CostModel("c", "u", terms_of_any(7.0, anywhere), model)
    for choices in architectures(model):
        due = any(all(choices[label] in options for label, options in when.items()) for when in anywhere)
        assert cost.of(choices) == 7 * due


def test_places_that_add_nothing_are_no_terms() -> None:
    inside = [{"a": frozenset(range(i, 40))} for i in range(1, 40)]
    assert terms_of_any(3.0, inside) == [Term(3.0, {"a": frozenset(range(1, 40))})]
    assert terms_of_any(3.0, [*inside, {}]) == [Term(3.0, {})]
    with pytest.raises(UnsupportedModelError, match=r"in 17 places .* at most 16"):
        terms_of_any(3.0, [{f"l{i}": frozenset({0})} for i in range(17)])


def test_expectation_by_hand() -> None:
    # 10 always, 4 or 6 by a, 5 if a = 1 and b = 0
    a, b = frozenset({1}), frozenset({0})
    terms = [Term(10, {}), Term(4, {"l0": b}), Term(6, {"l0": a}), Term(5, {"l0": a, "l1": b})]
    cost = CostModel("c", "u", terms, space(2, 2))
    p = {"l0": torch.tensor([0.25, 0.75]), "l1": torch.tensor([0.4, 0.6])}
    # 10 + (0.25 * 4 + 0.75 * 6) + 0.75 * 0.4 * 5 = 17
    assert float(cost.expected(p)) == pytest.approx(17.0)
    assert [cost.of({"l0": i, "l1": j}) for i in (0, 1) for j in (0, 1)] == [14, 14, 21, 16]
    assert (cost.fixed, cost.table) == (10.0, {"l0": [4.0, 6.0], "l1": [0.0, 0.0]})


def test_expectation_follows_the_precision_of_the_probabilities() -> None:
    cost = CostModel("c", "u", [Term(1 / 3, {"l0": frozenset({0})})], space(2))
    for dtype in (torch.float32, torch.float64, torch.float32):
        half = torch.full((2,), 0.5, dtype=dtype)
        assert cost.expected({"l0": half}).dtype == dtype
        assert torch.equal(cost.expected({"l0": half}), torch.tensor(1 / 3, dtype=dtype) * 0.5)


def test_a_model_without_choices_has_one_cost() -> None:
    cost = count_params(nn.Linear(3, 2))
    assert (cost.of({}), float(cost.expected({}))) == (8.0, 8.0)


# --- gradient ---------------------------------------------------------------------------------------------------

TIMES = {"one": 1.5, "two": 0.25, "three": 4.0, "four": 2.5}


def priced() -> tuple[nn.Module, CostModel]:
    """Two choices priced by a latency table, with random alphas in float64."""
    choice = {name: nn.Linear(3, 3) for name in TIMES}
    other = {name: nn.Linear(3, 3) for name in ("two", "four")}
    model = nn.Sequential(LayerChoice(choice, label="a"), LayerChoice(other, label="b")).double()
    with torch.no_grad():
        for i, decision in enumerate(decisions(model).values()):
            decision.alpha.copy_(torch.randn(len(decision.options), generator=torch.Generator().manual_seed(i)))
    table = LatencyTable.read({**TIMES, "fixed": 0.5})
    return model, price(model, (torch.rand(1, 3, dtype=torch.float64),), table)


@pytest.mark.parametrize("sampler", [Softmax(), BinaryGates("all"), BinaryGates(2)], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_gradient_of_an_expected_latency_is_the_closed_form(sampler: Sampler, seed: int) -> None:
    """dE/dalpha_i = p_i (t_i - sum_k p_k t_k); with two paths the same with q, the softmax of the pair's alphas."""
    model, cost = priced()
    set_sampler(model, sampler)
    draw(model, torch.Generator().manual_seed(seed))
    cost.expected({label: d.probabilities() for label, d in decisions(model).items()}).backward()
    for decision in decisions(model).values():
        times = torch.tensor([TIMES[name] for name in decision.options], dtype=torch.float64)
        taken = torch.ones_like(times)
        if sampler == BinaryGates(2):
            taken = torch.zeros_like(times)
            taken[list(decision.drawn.involved)] = 1
        p = taken * decision.alpha.detach().exp()
        p = p / p.sum()
        expected = p * (times - (p * times).sum())
        assert torch.allclose(decision.alpha.grad, expected, rtol=0, atol=1e-12)
        assert int((decision.alpha.grad != 0).sum()) == int(taken.sum())


def test_gradient_through_a_product_is_the_derivative_of_the_enumeration() -> None:
    inner = LayerChoice([nn.Linear(3, 3), nn.Linear(3, 5)], label="inner")
    outer = LayerChoice([nn.Linear(3, 2), inner, nn.Identity()], label="outer")
    model = nn.Sequential(outer).double()
    cost = count_params(model)
    # outer 0: 8; outer 1: 12 or 20 by inner; outer 2: 0
    costs = {(0, 0): 8, (0, 1): 8, (1, 0): 12, (1, 1): 20, (2, 0): 0, (2, 1): 0}
    alpha = {label: torch.randn(len(d.options), dtype=torch.float64) for label, d in decisions(model).items()}

    def by_enumeration(at: Mapping[str, Tensor]) -> float:
        return expectation(costs, {label: at[label].softmax(0) for label in ("outer", "inner")})

    leaves = {label: value.clone().requires_grad_() for label, value in alpha.items()}
    cost.expected({label: value.softmax(0) for label, value in leaves.items()}).backward()
    for label, value in alpha.items():
        for i in range(value.numel()):
            step = torch.zeros_like(value)
            step[i] = 1e-6
            slope = by_enumeration({**alpha, label: value + step}) - by_enumeration({**alpha, label: value - step})
            assert float(leaves[label].grad[i]) == pytest.approx(slope / 2e-6, abs=1e-7)
