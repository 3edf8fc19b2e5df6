"""What a search found, beside what was asked for and what a measurement says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, final

from ..cost import Timing

__all__ = ["ReportRow", "SearchReport"]


class ReportRow(NamedTuple):
    """A cost of the found network in its unit. ``target`` and ``measured`` are None where there is none."""

    name: str
    unit: str
    target: float | None
    predicted: float
    measured: Timing | None

    @property
    def error(self) -> float | None:
        """(predicted - measured median) / measured median."""
        if self.measured is None or not self.measured.median_ms > 0:
            return None
        return self.predicted / self.measured.median_ms - 1


@final
@dataclass(frozen=True)
class SearchReport:
    """The found architecture with its costs; ``str(report)`` is a table.

    >>> print(SearchReport({"a": "k3"}, (ReportRow("params", "parameters", 1000.0, 914.0, None),)))
    cost    unit        target  predicted  measured  p95  error
    params  parameters    1000        914
    """

    arch: Mapping[str, Any]
    rows: tuple[ReportRow, ...]
    notes: str = ""

    def __str__(self) -> str:
        table = [("cost", "unit", "target", "predicted", "measured", "p95", "error")]
        for row in self.rows:
            target = "" if row.target is None else _number(row.target)
            cells = ("", "", "")
            if row.measured is not None and row.error is not None:
                cells = (_number(row.measured.median_ms), _number(row.measured.p95_ms), f"{100 * row.error:+.1f} %")
            table.append((row.name, row.unit, target, _number(row.predicted), *cells))
        widths = [max(len(cells[i]) for cells in table) for i in range(7)]
        lines = [
            "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
            for cells in table
        ]
        return "\n".join([*(line.rstrip() for line in lines), *([self.notes] if self.notes else [])])


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) < 1e15 and value == int(value) else f"{value:.4g}"
