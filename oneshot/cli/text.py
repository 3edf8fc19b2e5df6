"""A report as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..cost import (
    Cost,
    CostModel,
    PeakMemory,
)
from ..cost.decode import MOST_ENUMERATED
from .report import Layer, Report, named

__all__ = ["as_json", "as_text"]


def as_json(report: Report) -> dict[str, Any]:
    return {
        "format": "oneshot-cost",
        "version": 1,
        "model": report.model,
        "hardware": report.hardware,
        "input": [{"shape": list(shape), "dtype": dtype} for shape, dtype in report.inputs],
        "architectures": report.architectures,
        "costs": {cost.name: _cost_as_json(report, cost) for cost in report.costs},
        "notes": list(report.notes),
    }


def _cost_as_json(report: Report, cost: Cost) -> dict[str, Any]:
    low, high = report.ranges[cost.name]
    head = {"unit": cost.unit, "fixed": None, "minimum": low, "maximum": high}
    head["largest_is_found"] = report.largest_is_found(cost)
    if isinstance(cost, PeakMemory):
        return {**head, "choices": None, "joint": None, "layers": None}
    layers = None
    if report.layers is not None:
        rows = [row for row in report.layers if cost.name in row.values]
        layers = [{"path": row.path, "when": row.when, "value": row.values[cost.name]} for row in rows]
    return {
        **head,
        "fixed": cost.fixed,
        "choices": {k: dict(zip(names, cost.table[k], strict=True)) for k, names in report.options.items()},
        "joint": [{"when": named(term.when, report.options), "value": term.value} for term in cost.products],
        "layers": layers,
    }


def as_text(report: Report) -> str:
    shapes = "; ".join("x".join(map(str, shape)) + f" {dtype}" for shape, dtype in report.inputs)
    parts = [f"{report.model} on {shapes}"]
    additive = report.additive()
    if report.layers is not None and additive:
        parts.append(_layers_as_text(report.layers, additive))
    if report.options and additive:
        parts.append(_choices_as_text(report.options, additive))
    parts += [_ranges_as_text(report), *("\n".join(lines) for lines in [report.notes] if lines)]
    return "\n\n".join(parts)


def _layers_as_text(layers: Sequence[Layer], costs: Sequence[CostModel]) -> str:
    rows = [
        [row.path or "(network)", _condition(row.when), *(_cell(row.values.get(c.name), c.unit) for c in costs)]
        for row in layers
    ]
    return _aligned(["layer", "when", *(cost.name for cost in costs)], rows, 2)


def _condition(when: Mapping[str, list[str]]) -> str:
    """A condition as text.

    >>> _condition({"block3": ["k5e6", "k7e6"], "block4": ["skip"]}), _condition({})
    ('block3=k5e6|k7e6, block4=skip', 'always')
    """
    return ", ".join(f"{label}={'|'.join(names)}" for label, names in when.items()) or "always"


def _choices_as_text(options: Mapping[str, list[str]], costs: Sequence[CostModel]) -> str:
    rows = [
        [label, name, *(_cell(cost.table[label][k], cost.unit) for cost in costs)]
        for label, names in options.items()
        for k, name in enumerate(names)
    ]
    joint = [
        f"+ joint terms: {cost.name} has {len(cost.products)} that depend on several choices at once, such as "
        f"{_cell(cost.products[0].value, cost.unit)} {cost.unit} while "
        f"{_condition(named(cost.products[0].when, options))}"
        for cost in costs
        if cost.products
    ]
    return "\n".join([_aligned(["choice", "option", *(cost.name for cost in costs)], rows, 2), *joint])


def _ranges_as_text(report: Report) -> str:
    """What all architectures reach, and how many they are."""
    head = ["fixed", "minimum", "maximum"] if report.options else ["total"]
    rows = []
    for cost in report.costs:
        low, high = report.ranges[cost.name]
        fixed = cost.fixed if isinstance(cost, CostModel) else None
        values = [fixed, low, high] if report.options else [low]
        rows.append([cost.name, cost.unit, *(_cell(value, cost.unit) for value in values)])
    lines = [_aligned(["cost", "unit", *head], rows, 2)]
    lines += [
        f"{cost.name}: the maximum is the largest found among more than {MOST_ENUMERATED:,} architectures"
        for cost in report.costs
        if report.largest_is_found(cost)
    ]
    n, size = report.architectures, len(report.options)
    many = f"{n:,}" if n < 10**12 else f"{float(n):.4g}"
    lines.append(f"choices: {size}, architectures: {many}" if size else "no choices: one architecture")
    return "\n".join(lines)


def _cell(value: float | None, unit: str) -> str:
    """A number to be read: ms to 4 digits, all else as it is counted.

    >>> [_cell(ms, "ms") for ms in (123.456, 0.0123456, 23456.7)], _cell(3504872.0, "MAC"), _cell(None, "MAC")
    (['123.5', '0.01235', '23,457'], '3,504,872', '-')
    """
    if value is None:
        return "-"
    if unit != "ms":
        return f"{value:,.0f}" if value.is_integer() else f"{value:,.2f}"
    if value == 0 or abs(value) < 1e-6:
        return f"{value:.4g}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]], n_texts: int) -> str:
    """A table: the first ``n_texts`` columns to the left, numbers to the right."""
    every = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < n_texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in every
    ]
    return "\n".join(line.rstrip() for line in lines)
