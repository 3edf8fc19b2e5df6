"""The points of a sweep: what each search is asked for, checked, and the name of its folder."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from ..errors import ConfigurationError

__all__ = ["Point", "flat_point", "folder_name", "points_of", "swept_costs"]

Point = dict[str, Any]  # {"targets": {cost: number}}, {"strength": number} or {"strength": {cost: number}}
_LENGTH = 48  # of the readable part of a folder's name


def points_of(
    targets: Iterable[float | Mapping[str, float]] | None,
    strengths: Iterable[float | Mapping[str, float]] | None,
    cost: str | None,
) -> list[Point]:
    """The keyword arguments of each search, in the given order, with plain floats.

    A number among the targets is for ``cost``; one among the strengths too, or without ``cost`` for all costs.

    >>> points_of([100, {"macs": 5e3}], None, "params")
    [{'targets': {'params': 100.0}}, {'targets': {'macs': 5000.0}}]
    """
    if (targets is None) == (strengths is None):
        raise ConfigurationError(
            "sweep: give targets=[...] or strengths=[...], and not both; the other one belongs into trainer_factory"
        )
    name, keyword, given = (
        ("targets", "targets", targets) if strengths is None else ("strengths", "strength", strengths)
    )
    if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
        raise ConfigurationError(f"sweep: {name}={given!r}; a list is needed, with one number or mapping per search")
    points = [{keyword: _value(entry, f"{name}[{i}]", cost, keyword)} for i, entry in enumerate(given)]
    if not points:
        raise ConfigurationError(f"sweep: {name} is empty; give at least one")
    texts = [_canonical(point) for point in points]
    twice = [i for i, text in enumerate(texts) if text in texts[:i]]
    if twice:
        i = twice[0]
        raise ConfigurationError(
            f"sweep: {name}[{i}] is {name}[{texts.index(texts[i])}] again, {texts[i]}; give it once"
        )
    return points


def swept_costs(points: Iterable[Point]) -> tuple[str, ...]:
    """The costs that the points name, in order of first appearance; () if one of them is for all costs."""
    values = [value for point in points for value in point.values()]
    if not all(isinstance(value, dict) for value in values):
        return ()
    return tuple(dict.fromkeys(name for value in values for name in value))


def flat_point(point: Point) -> dict[str, float]:
    """Column -> number, for a table.

    >>> flat_point({"targets": {"params": 100.0, "macs": 5e3}}), flat_point({"strength": 0.5})
    ({'targets params': 100.0, 'targets macs': 5000.0}, {'strength': 0.5})
    """
    flat: dict[str, float] = {}
    for keyword, value in point.items():
        flat.update({f"{keyword} {k}": v for k, v in value.items()} if isinstance(value, dict) else {keyword: value})
    return flat


def folder_name(point: Point) -> str:
    """What is asked for, readable, and 8 digits that tell it from every other point.

    >>> folder_name({"targets": {"params": 100.0}})
    'targets-params-100-2089835a'
    """
    words = "-".join(f"{name} {number:g}" for name, number in sorted(flat_point(point).items()))
    readable = re.sub(r"[^A-Za-z0-9._+-]+", "-", words)[:_LENGTH]
    return f"{readable}-{hashlib.sha256(_canonical(point).encode()).hexdigest()[:8]}"


def _canonical(point: Point) -> str:
    return json.dumps(point, sort_keys=True)


def _value(entry: Any, where: str, cost: str | None, keyword: str) -> float | dict[str, float]:
    if isinstance(entry, Mapping):
        if not entry:
            raise ConfigurationError(f"sweep: {where} is empty; give cost -> number")
        return {str(name): _number(number, f"{where}, {name}") for name, number in entry.items()}
    number = _number(entry, where)
    if cost is not None:
        return {cost: number}
    if keyword == "targets":
        raise ConfigurationError(
            f"sweep: {where} is {entry!r}, of which cost? Give cost='params', or {{'params': ...}}"
        )
    return number


def _number(given: Any, where: str) -> float:
    if not isinstance(given, Real) or isinstance(given, bool) or not math.isfinite(given) or given < 0:
        raise ConfigurationError(f"sweep: {where} is {given!r}; a finite number of at least 0 is needed")
    return float(given)
