"""Temperature: its ends, its course and what is refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oneshot.errors import ConfigurationError
from oneshot.mutables.temperature import Temperature

temperatures = st.floats(1e-3, 1e3)


@given(start=temperatures, end=temperatures, kind=st.sampled_from(["linear", "exponential"]), f=st.floats(0, 1))
def test_both_ends_are_reached_exactly_and_nothing_is_outside(start: float, end: float, kind: str, f: float) -> None:
    course = Temperature(start, end, kind)  # type: ignore[arg-type]
    assert course.at(0.0) == course.at(0) == start
    assert course.at(1.0) == course.at(1) == end
    low, high = sorted((start, end))
    assert low * (1 - 1e-12) <= course.at(f) <= high * (1 + 1e-12)


def test_the_course_by_hand() -> None:
    assert [Temperature(10.0, 0.0625, "linear").at(k / 4) for k in range(5)] == [
        10.0,
        10.0 - 9.9375 / 4,
        10.0 - 9.9375 / 2,
        10.0 - 3 * 9.9375 / 4,
        0.0625,
    ]
    falling = Temperature(8.0, 0.5, "exponential")
    for k, wanted in enumerate([8.0, 4.0, 2.0, 1.0, 0.5]):  # the same factor in every quarter
        assert math.isclose(falling.at(k / 4), wanted, rel_tol=1e-15)
    assert [Temperature(2.0).at(f) for f in (0, 0.3, 1)] == [2.0, 2.0, 2.0]


def test_a_floor_stops_the_fall_and_nothing_else() -> None:
    free, stopped = Temperature(8.0, 0.125, "exponential"), Temperature(8.0, 0.125, "exponential", floor=1.5)
    for k in range(11):
        assert stopped.at(k / 10) == max(free.at(k / 10), 1.5)
    assert (stopped.at(0), stopped.at(1)) == (8.0, 1.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), r"start=0\.0"),
        ((-1.0,), r"start=-1\.0"),
        ((math.nan,), "start=nan"),
        ((math.inf,), "start=inf"),
        (("1",), "start='1'"),
        ((True,), "start=True"),
        ((1.0, 0.0, "linear"), r"end=0\.0"),
        ((1.0, math.inf, "linear"), "end=inf"),
        ((1.0, 0.5), "'constant' needs no end"),
        ((1.0, None, "linear"), "'linear' needs an end"),
        ((1.0, 0.5, "cosine"), "kind='cosine'.* allowed are 'constant', 'linear' and 'exponential'"),
        ((1.0, 0.5, "linear", -0.1), r"floor=-0\.1"),
        ((1.0, 0.5, "linear", 2.0), r"floor=2\.0"),
        ((1.0, 0.5, "linear", math.nan), "floor=nan"),
    ],
)
def test_what_cannot_work_is_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Temperature(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_only_fractions(fraction: float) -> None:
    with pytest.raises(ConfigurationError, match="from 0 to 1"):
        Temperature(1.0, 0.5, "linear").at(fraction)
