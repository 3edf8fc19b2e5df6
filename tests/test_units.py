"""Disjoint sets of atoms against sets that are merged one pair at a time."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from oneshot.graph.units import Units

ATOMS = 12
atoms = st.lists(st.integers(0, ATOMS), min_size=1, max_size=6)


class Naive:
    """Every atom with the set it is in; what is united with atom 0 is frozen, but not one unit with it."""

    def __init__(self) -> None:
        self.sets = {a: {a} for a in range(1, ATOMS + 1)}
        self.reasons: dict[int, set[str]] = {a: set() for a in self.sets}

    def unite(self, a: int, b: int, reason: str) -> None:
        if a == 0 or b == 0:
            self.freeze(a, reason)
            self.freeze(b, reason)
            return
        both = self.sets[a] | self.sets[b]
        reasons = self.reasons[a] | self.reasons[b]
        for atom in both:
            self.sets[atom], self.reasons[atom] = both, reasons

    def freeze(self, a: int, reason: str) -> None:
        for atom in self.sets[a] if a else ():
            self.reasons[atom] = self.reasons[atom] | {reason}


steps = st.lists(
    st.one_of(
        st.tuples(st.just("unite"), atoms, atoms),
        st.tuples(st.just("freeze"), atoms, st.just([])),
    ),
    max_size=8,
)


@settings(deadline=None)
@given(steps)
def test_units_are_those_of_one_merge_after_the_other(steps: list[tuple[str, list[int], list[int]]]) -> None:
    units, naive = Units(), Naive()
    assert units.fresh(5).tolist() == [1, 2, 3, 4, 5]
    assert units.fresh(ATOMS - 5).tolist() == list(range(6, ATOMS + 1))
    for number, (kind, one, other) in enumerate(steps):
        reason = f"step {number}"
        if kind == "freeze":
            units.freeze(np.array(one), reason)
            for a in one:
                naive.freeze(a, reason)
        else:
            n = min(len(one), len(other))
            units.unite(np.array(one[:n]), np.array(other[:n]), reason)
            for a, b in zip(one[:n], other[:n], strict=True):
                naive.unite(a, b, reason)
    every = np.arange(1, ATOMS + 1)
    roots = dict(zip(every.tolist(), units.roots(every).tolist(), strict=True))
    for a in roots:
        assert {b for b in roots if roots[b] == roots[a]} == naive.sets[a]
    for a, reason, frozen in zip(roots, units.reasons(every), units.is_frozen(every), strict=True):
        assert (reason is not None) == frozen == bool(naive.reasons[a])
        assert reason is None or reason in naive.reasons[a]
    assert units.roots(np.array([0])).tolist() == [0]
    assert units.is_frozen(np.array([0])).tolist() == [True]


def test_shapes_are_broadcast() -> None:
    # Rows of a 2 x 3 grid are united with their first element: two units of three.
    units = Units()
    grid = units.fresh(6).reshape(2, 3)
    units.unite(grid, grid[:, :1], "rows")
    assert units.roots(grid).tolist() == [[1, 1, 1], [4, 4, 4]]


def test_the_first_reason_is_the_one_that_is_told() -> None:
    units = Units()
    atoms = units.fresh(4)
    units.freeze(atoms[:2], "first")
    units.freeze(atoms[1:3], "second")
    units.unite(atoms[2:3], np.array([0]), "third")
    assert units.reasons(atoms) == ["first", "first", "second", None]
    units.unite(atoms[3:], atoms[:1], "fourth")  # a unit is frozen with the one it joins
    assert units.reasons(atoms) == ["first", "first", "second", "first"]


def test_a_long_chain_is_one_unit() -> None:
    units = Units()
    atoms = units.fresh(1000)
    units.unite(atoms[:-1], atoms[1:], "neighbours")
    assert set(units.roots(atoms).tolist()) == {1}
