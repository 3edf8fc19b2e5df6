"""What a network costs, by layer and by choice."""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cost import Cost, CostModel, LatencyTable, PeakMemory, cost_range, count_peak_memory, counted_cost, latency_on
from ..cost.decode import MOST_ENUMERATED
from ..cost.hardware import is_predicted
from ..errors import ConfigurationError, UnknownCostError
from ..graph import Condition, trace_calls
from ..mutables import Mutable, decisions

__all__ = ["Layer", "Report", "named", "report_of"]


@dataclass(frozen=True)
class Layer:
    """What a module costs, by name of the cost, while every label is decided for one of the options in ``when``."""

    path: str
    when: Mapping[str, list[str]]
    values: Mapping[str, float]


@dataclass(frozen=True)
class Report:
    """``options``: what is decided, by label; ``ranges``: the smallest and largest cost, by name."""

    model: str
    hardware: str | None
    inputs: Sequence[tuple[tuple[int, ...], str]]
    options: Mapping[str, list[str]]
    costs: Sequence[Cost]
    ranges: Mapping[str, tuple[float, float]]
    layers: Sequence[Layer] | None
    notes: Sequence[str]

    @property
    def architectures(self) -> int:
        return math.prod(len(names) for names in self.options.values())

    def largest_is_found(self, cost: Cost) -> bool:
        return isinstance(cost, PeakMemory) and self.architectures > MOST_ENUMERATED

    def additive(self) -> list[CostModel]:
        return [cost for cost in self.costs if isinstance(cost, CostModel)]


def report_of(
    model: nn.Module,
    arguments: argparse.Namespace,
    names: Sequence[str],
    inputs: Sequence[tuple[tuple[int, ...], str]],
    missing: Mapping[str, float],
) -> Report:
    args = _tensors(model, inputs)
    costs: list[Cost] = []
    notes: list[str] = []
    for name in names:
        if name == "latency":
            latency, notes = _latency(model, args, arguments.hardware, missing)
            costs.append(latency)
        else:
            costs.append(count_peak_memory(model, args) if name == "peak_memory" else counted_cost(name, model, args))
    open_choices = {k: d for k, d in decisions(model).items() if d.members[0].decided is None}
    options = {label: [str(option) for option in d.options] for label, d in open_choices.items()}
    return Report(
        model=arguments.model,
        hardware=arguments.hardware,
        inputs=inputs,
        options=options,
        costs=costs,
        ranges={cost.name: cost_range(cost) for cost in costs},
        layers=_layers(model, args, costs, options) if arguments.layers else None,
        notes=notes,
    )


def _tensors(model: nn.Module, inputs: Sequence[tuple[tuple[int, ...], str]]) -> tuple[Tensor, ...]:
    device = next(model.parameters(), torch.empty(0)).device
    generator = torch.Generator().manual_seed(0)
    try:
        tensors = [
            torch.zeros(shape, dtype=torch.int64)
            if dtype == "int64"
            else torch.rand(shape, generator=generator, dtype=torch.float32)
            for shape, dtype in inputs
        ]
    except RuntimeError as error:
        raise ConfigurationError(f"--input: {[shape for shape, _ in inputs]} cannot be made: {error}") from error
    return tuple(tensor.to(device) for tensor in tensors)


def _latency(
    model: nn.Module, args: tuple[Tensor, ...], hardware: str, missing: Mapping[str, float]
) -> tuple[CostModel, list[str]]:
    """The latency by what ``--hardware`` names, and what is to be said about it."""
    if missing and not is_predicted(hardware):
        raise ConfigurationError(f"--missing is for nn-Meter's predictors, and {hardware!r} is none of them")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            cost, found = latency_on(hardware, model, args, missing=missing or None)
        except UnknownCostError as error:
            hint = "\non the command line: --missing KERNEL=MS,..." if is_predicted(hardware) else ""
            raise UnknownCostError(f"{error}{hint}") from error
    if isinstance(found, LatencyTable):
        facts = ", ".join(f"{name} {value}" for name, value in found.runtime.items())
        notes = [f"latency_ms by {found.source}{': ' if facts else ''}{facts}"]
    else:
        notes = [f"latency_ms by nn-Meter, {found.hardware}", *found.report().splitlines()]
    return cost, [*notes, *(str(warning.message) for warning in caught)]


def _layers(
    model: nn.Module, args: Sequence[Any], costs: Sequence[Cost], options: Mapping[str, list[str]]
) -> list[Layer]:
    """The terms of all costs that add up, by path and condition, in the order in which the network runs."""
    values: dict[str, dict[frozenset[tuple[str, frozenset[int]]], dict[str, list[float]]]] = {}
    calls = trace_calls(model, args, lambda m: not isinstance(m, Mutable) and next(m.children(), None) is None)
    orders = [_ran([call.path for call in calls])]
    for cost in costs:
        if isinstance(cost, CostModel):
            orders.append([term.path for term in cost.terms])
            for term in cost.terms:
                when = frozenset((k, chosen) for k, chosen in term.when.items() if len(chosen) < len(options[k]))
                values.setdefault(term.path, {}).setdefault(when, {}).setdefault(cost.name, []).append(term.value)
    return [
        Layer(path, named(dict(when), options), {name: math.fsum(terms) for name, terms in row.items()})
        for path in _merged(orders)
        for when, row in values.get(path, {}).items()
    ]


def _ran(leaves: Sequence[str]) -> list[str]:
    """Paths in the order of their first run; a module that contains some of them stands after the last of these.

    >>> _ran(["a.x", "b", "a.y", "b"])
    ['a.x', 'b', 'a.y', 'a', '']
    """
    places: dict[str, tuple[int, int]] = {}
    for at, leaf in enumerate(dict.fromkeys(leaves)):
        names = leaf.split(".")
        places |= {".".join(names[:depth]): (at, -depth) for depth in range(len(names) + 1)}
    return sorted(places, key=places.__getitem__)


def _merged(orders: Sequence[Sequence[str]]) -> list[str]:
    """All names once; one that is not known yet stands after the one before it.

    >>> _merged([["a", "b", "c"], ["a", "x", "c", "y"]])
    ['a', 'x', 'b', 'c', 'y']
    """
    merged: list[str] = []
    for order in orders:
        at = 0
        for name in order:
            if name in merged:
                at = merged.index(name)
            else:
                merged.insert(at, name)
            at += 1
    return merged


def named(when: Condition, options: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """A condition with the names of the options, in the order of the labels."""
    return {label: [names[o] for o in sorted(when[label])] for label, names in options.items() if label in when}
