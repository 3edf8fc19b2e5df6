"""Evolution and feasible draws against enumeration of small spaces."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from oneshot import CostModel, LayerChoice, count_peak_memory
from oneshot.cost import Term
from oneshot.errors import ConfigurationError, InfeasibleTargetError
from oneshot.trainers.evolution import EvolutionarySearch, crossed, mutated
from oneshot.trainers.feasible import Candidate, FeasibleSpace, best_of


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def priced(table: dict[str, list[float]], products: tuple[Term, ...] = ()) -> tuple[dict[str, int], CostModel]:
    """A cost with this table, of a network of identities with these labels."""
    net = nn.Sequential(*(LayerChoice([nn.Identity() for _ in row], label=label) for label, row in table.items()))
    terms = [Term(v, {label: frozenset({i})}) for label, row in table.items() for i, v in enumerate(row)]
    return {label: len(row) for label, row in table.items()}, CostModel("macs", "MAC", [*terms, *products], net)


def everything(sizes: dict[str, int]) -> list[dict[str, int]]:
    return [dict(zip(sizes, key, strict=True)) for key in itertools.product(*map(range, sizes.values()))]


def random_table(rng: random.Random) -> dict[str, list[float]]:
    labels = "abcd"[: rng.randint(1, 4)]
    return {label: [float(rng.randint(0, 9)) for _ in range(rng.randint(1, 4))] for label in labels}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_finds_the_optimum_when_it_may_look_at_everything(seed: int) -> None:
    """Every feasible architecture is scored exactly once, no other one is, and the best of them is returned."""
    rng = random.Random(seed)
    sizes, cost = priced(random_table(rng))
    costs = sorted(cost.of(c) for c in everything(sizes))
    limit = rng.choice(costs)
    feasible = [c for c in everything(sizes) if cost.of(c) <= limit]
    scores = {tuple(c.values()): rng.choice([0.0, 1.0, rng.random(), math.nan]) for c in everything(sizes)}
    space = FeasibleSpace(sizes, {"macs": cost}, {"macs": limit})
    population = rng.randint(1, 9)
    search = EvolutionarySearch(
        space,
        generator(seed),
        population=population,
        generations=math.ceil(len(feasible) / population) + rng.randint(0, 2),
        parents=rng.randint(1, 5),
        mutation=rng.random(),
    )
    asked = []

    def score(choices: dict[str, int]) -> float:
        asked.append(tuple(choices.values()))
        return scores[asked[-1]]

    best = search.run(score)
    assert sorted(asked) == sorted(tuple(c.values()) for c in feasible)
    numbers = [scores[key] for key in asked if not math.isnan(scores[key])]
    assert (best is None) == (not numbers)
    assert best is None or best.score == max(numbers)
    assert search.ask() is None


def large(limit: float, n: int = 9) -> tuple[FeasibleSpace, CostModel]:
    """3^9 = 19,683 architectures of costs 0 to 2 per label: too many to be enumerated."""
    sizes, cost = priced({f"l{i}": [0.0, 1.0, 2.0] for i in range(n)})
    return FeasibleSpace(sizes, {"macs": cost}, {"macs": limit}), cost


def test_exhausts_a_tiny_feasible_part_of_a_large_space_and_stops() -> None:
    """At most 2 in sum over 9 labels: 1 + 9 + (9 * 8 / 2 + 9) = 55 of 19,683."""
    space, cost = large(2.0)
    search = EvolutionarySearch(space, generator(), population=10, generations=20)
    best = search.run(lambda choices: float(choices["l3"] * 3 - choices["l8"]))
    assert len({tuple(c.choices.values()) for c in search.candidates}) == len(search.candidates) == 55
    assert all(cost.of(c.choices) <= 2 for c in search.candidates)
    assert best is not None
    assert best.choices == {**dict.fromkeys(space.sizes, 0), "l3": 2}


def test_one_by_one_through_a_large_space_with_products() -> None:
    """Against enumeration, for a cost whose decisions depend on one another and are negative in part."""
    table = {f"l{i}": [0.0, 1.0 + i, 7.0] for i in range(4)}
    products = (
        Term(-5.0, {"l0": frozenset({1}), "l3": frozenset({1, 2})}),
        Term(9.0, {"l1": frozenset({0}), "l2": frozenset({0})}),
    )
    sizes, cost = priced(table, products)
    for limit in (-1.0, 4.0, 9.0, 12.5):
        feasible = [c for c in everything(sizes) if cost.of(c) <= limit]
        if not feasible:
            with pytest.raises(InfeasibleTargetError):
                FeasibleSpace(sizes, {"macs": cost}, {"macs": limit})
            continue
        space = FeasibleSpace(sizes, {"macs": cost}, {"macs": limit})
        assert list(space.each()) == feasible


def test_all_of_a_space_whose_limits_the_solver_has_to_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two limits at once: 4 labels with options of costs (0, 0), (1, 9) and (9, 1)."""
    table = {f"l{i}": [0.0, 1.0, 9.0] for i in range(4)}
    sizes, one = priced(table)
    _, other = priced({label: [0.0, 9.0, 1.0] for label in table})
    limits = {"one": 11.0, "other": 19.0}
    feasible = [c for c in everything(sizes) if one.of(c) <= 11 and other.of(c) <= 19]
    assert len(feasible) > 10
    # As if they were too many to be listed: rejection, then the solver, then one by one.
    monkeypatch.setattr("oneshot.trainers.feasible.MOST_ENUMERATED", 5)
    for draws in (1000, 0):
        monkeypatch.setattr("oneshot.trainers.feasible._MOST_DRAWS", draws)
        space = FeasibleSpace(sizes, {"one": one, "other": other}, limits)
        assert list(space.each()) == feasible
        search = EvolutionarySearch(space, generator(), population=7, generations=9)
        search.run(lambda choices: 0.0)
        assert space.every() is None
        assert sorted(space.key(c.choices) for c in search.candidates) == [space.key(c) for c in feasible]


def test_a_limit_on_peak_memory() -> None:
    """4 numbers enter, and 4, 40 or 400 come out: 4 bytes of each of both."""
    net = nn.Sequential(
        LayerChoice([nn.Sequential(nn.Linear(4, n), nn.Linear(n, 4)) for n in (4, 40, 400)], label="a"),
        LayerChoice([nn.Sequential(nn.Linear(4, n), nn.Linear(n, 4)) for n in (4, 40, 400)], label="b"),
    )
    peak = count_peak_memory(net, (torch.zeros(1, 4),))
    space = FeasibleSpace({"a": 3, "b": 3}, {"peak_memory": peak}, {"peak_memory": 44 * 4})
    search = EvolutionarySearch(space, generator(), population=4, generations=4)
    best = search.run(lambda choices: choices["a"] + choices["b"])
    assert (best, len(search.candidates)) == (Candidate({"a": 1, "b": 1}, 2.0), 4)


def test_an_infeasible_limit_is_told_at_once_with_what_can_be_reached() -> None:
    with pytest.raises(InfeasibleTargetError, match=r"macs: budget -1, reachable 0 to 18 MAC"):
        large(-1.0)


def test_beats_random_search_at_equal_evaluations() -> None:
    """A separable score over 3^9: evolution ends above the mean best of as many uniform draws, over 10 seeds."""
    space, _ = large(18.0)
    weights = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0, 5.0]

    def score(choices: dict[str, int]) -> float:
        return sum(w * (o == 1) for w, o in zip(weights, choices.values(), strict=True))

    found, drawn = [], []
    for seed in range(10):
        best = EvolutionarySearch(space, generator(seed), population=20, generations=8).run(score)
        assert best is not None
        found.append(best.score)
        source = generator(1000 + seed)
        drawn.append(max(score(space.draw(source) or {}) for _ in range(160)))
    assert sum(found) / 10 > sum(drawn) / 10 + 2
    assert max(found) == sum(weights)


def test_the_same_generator_state_gives_the_same_search_and_another_one_another() -> None:
    def run(seed: int) -> list[Candidate]:
        search = EvolutionarySearch(large(9.0)[0], generator(seed), population=6, generations=4, parents=3)
        search.run(lambda choices: float(sum(choices.values())))
        return search.candidates

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize("stop", [0, 1, 5, 6, 7, 17, 24])
def test_a_stopped_search_goes_on_where_it_was(stop: int) -> None:
    """Stopped after any number of scores, in the middle of a generation or between two; 4 generations of 6."""

    def new(seed: int) -> EvolutionarySearch:
        return EvolutionarySearch(large(9.0)[0], generator(seed), population=6, generations=4, parents=3)

    def score(choices: dict[str, int]) -> float:
        return math.sin(sum((i + 1) * o for i, o in enumerate(choices.values())))

    whole, first, second = new(1), new(1), new(99)
    whole.run(score)
    for _ in range(stop):
        first.tell(score(first.ask() or {}))
    second.load_state_dict(first.state_dict())
    second.run(score)
    assert second.candidates == whole.candidates
    assert len(whole.candidates) == 24
    assert second.state_dict()["generation"] == 4


def test_children_come_from_the_best_of_all_generations() -> None:
    """Without mutation, crossovers of two parents have no option that both lack."""
    space, _ = large(18.0)
    search = EvolutionarySearch(space, generator(3), population=8, generations=2, parents=2, mutation=0.0)
    for _ in range(8):
        choices = search.ask() or {}
        search.tell(float(sum(choices.values())))
    parents = sorted(search.candidates, key=lambda c: -c.score)[:2]
    search.ask()
    mixes = [
        all(choices[label] in (parents[0].choices[label], parents[1].choices[label]) for label in space.sizes)
        for choices in search.pending
    ]
    # Half of the 8 would be mutations, which without mutation are duplicates of their parent: these are random.
    assert mixes[:4] == [True] * 4
    assert len(search.pending) == 8


def test_mutation_draws_every_decision_anew_with_its_probability() -> None:
    """Of 3 options the new one differs in 2 of 3 cases: 0.3 * 2 / 3 = 0.2 of the decisions change."""
    sizes = {f"l{i}": 3 for i in range(5000)}
    child = mutated(dict.fromkeys(sizes, 1), sizes, 0.3, generator())
    counts = Counter(child.values())
    assert counts[1] / 5000 == pytest.approx(0.8, abs=0.03)  # more than five standard deviations of 0.0057
    assert counts[0] / 5000 == pytest.approx(0.1, abs=0.03)


def test_crossover_takes_each_decision_from_either_parent() -> None:
    labels = [f"l{i}" for i in range(5000)]
    child = crossed(dict.fromkeys(labels, 0), dict.fromkeys(labels, 7), generator())
    counts = Counter(child.values())
    assert set(counts) == {0, 7}
    assert counts[0] / 5000 == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize(("n_labels", "limit"), [(2, 2.0), (9, 18.0)])
def test_draws_are_uniform_over_what_is_feasible(n_labels: int, limit: float) -> None:
    """Enumerated (9 architectures, of which 0 0, 0 1, 1 0, 1 1, 0 2, 2 0 keep the limit) and by rejection."""
    space, _ = large(limit, n_labels)
    source = generator()
    n = 3000
    drawn = [space.draw(source) or {} for _ in range(n)]
    if n_labels == 2:
        counts = Counter(tuple(c.values()) for c in drawn)
        assert set(counts) == {(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0)}
        assert all(abs(count / n - 1 / 6) < 0.035 for count in counts.values())  # five deviations of 0.0068
    else:
        counts = Counter(c["l0"] for c in drawn)
        assert all(abs(counts[o] / n - 1 / 3) < 0.044 for o in range(3))


def test_a_score_that_is_no_number_is_never_the_best() -> None:
    assert best_of([Candidate({"a": 0}, math.nan), Candidate({"a": 1}, -5.0)]) == Candidate({"a": 1}, -5.0)
    assert best_of([Candidate({"a": 0}, math.nan)]) is None
    assert best_of([]) is None


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"population": 0}, "population=0"),
    ({"generations": 2.0}, "generations=2.0"),
    ({"parents": True}, "parents=True"),
    ({"mutation": 1.5}, "mutation=1.5"),
    ({"mutation": math.nan}, "mutation=nan"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=str)
def test_wrong_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        EvolutionarySearch(FeasibleSpace({"a": 2}), generator(), **changes)


def test_wrong_spaces_and_a_score_that_nobody_asked_for() -> None:
    sizes, cost = priced({"a": [1.0, 2.0]})
    with pytest.raises(ConfigurationError, match=r"sizes=\{\}"):
        FeasibleSpace({})
    with pytest.raises(ConfigurationError, match="the costs of this run are"):
        FeasibleSpace(sizes, {"macs": cost}, {"params": 1.0})
    with pytest.raises(ConfigurationError, match="a finite number is needed"):
        FeasibleSpace(sizes, {"macs": cost}, {"macs": math.nan})
    with pytest.raises(ConfigurationError, match="no architecture waits"):
        EvolutionarySearch(FeasibleSpace(sizes), generator()).tell(1.0)
