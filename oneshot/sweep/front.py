"""The networks of a sweep side by side: table, files, and the best one within limits."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from ..errors import ConfigurationError, InfeasibleTargetError, OneshotError
from ..files import atomic_write
from ..loggers import markdown_table
from .domination import dominated
from .plot import plot_front
from .points import Point, flat_point

__all__ = ["Front", "FrontRow", "json_number"]


@final
@dataclass(frozen=True)
class FrontRow:
    """One search: what it was asked for, and the network that it kept.

    ``costs``: hard ones, in their units, of the exported network; ``metrics``: as ``evaluate`` of the trainer names
    them. ``dominated``: another row is no worse in the metric and in every cost compared, and better in one of them.
    ``folder``: checkpoints, log and ``arch.json``. ``failure``: why there is no network; then there are no numbers,
    and ``dominated`` is None.
    """

    point: Point
    folder: Path
    costs: Mapping[str, float]
    metrics: Mapping[str, float]
    dominated: bool | None = None
    failure: OneshotError | None = None

    @property
    def error(self) -> str | None:
        return None if self.failure is None else f"{type(self.failure).__name__}: {self.failure}"


@final
class Front:
    """The rows of a sweep, in the order of its points, each marked as dominated or not.

    Args:
        rows: one per search.
        monitor: the metric that is compared, with ``larger_is_better``.
        costs: the costs that are compared; smaller is better.

    >>> rows = [FrontRow({"strength": s}, Path(f"s{s}"), {"params": n}, {"acc": a})
    ...         for s, n, a in ((0.1, 900, 0.9), (0.2, 500, 0.8), (0.3, 600, 0.7))]
    >>> front = Front(rows, monitor="acc", larger_is_better=True, costs=("params",))
    >>> print(front)
    | strength | params | acc | dominated | folder |
    | -------: | -----: | --: | --------- | ------ |
    |      0.1 |    900 | 0.9 | False     | s0.1   |
    |      0.2 |    500 | 0.8 | False     | s0.2   |
    |      0.3 |    600 | 0.7 | True      | s0.3   |
    >>> front.best({"params": 700}).costs["params"]
    500
    """

    def __init__(self, rows: Sequence[FrontRow], *, monitor: str, larger_is_better: bool, costs: Sequence[str]) -> None:
        self.monitor, self.larger_is_better, self.costs = monitor, larger_is_better, tuple(costs)
        found = [row for row in rows if row.failure is None]
        flags = iter(dominated([[self._loss(row), *(row.costs[name] for name in self.costs)] for row in found]))
        self.rows = tuple(replace(row, dominated=next(flags) if row.failure is None else None) for row in rows)

    @property
    def found(self) -> tuple[FrontRow, ...]:
        """The rows with a network."""
        return tuple(row for row in self.rows if row.failure is None)

    @property
    def front(self) -> tuple[FrontRow, ...]:
        """The rows with a network that no other one dominates."""
        return tuple(row for row in self.found if not row.dominated)

    def best(self, limits: Mapping[str, float] | None = None) -> FrontRow:
        """The row that is best in the metric, of those within the limits (cost -> largest value).

        Of equals the one that is cheaper, in the order of ``costs``. InfeasibleTargetError if no row keeps the limits.
        """
        limits = {} if limits is None else dict(limits)
        known = list(dict.fromkeys(name for row in self.found for name in row.costs))
        unknown = [name for name in limits if name not in known]
        if unknown:
            raise ConfigurationError(f"best: unknown costs {unknown}; the rows have {known}")
        judged = [row for row in self.found if not math.isnan(row.metrics[self.monitor])]
        fitting = [row for row in judged if all(row.costs[name] <= limit for name, limit in limits.items())]
        if not fitting:
            least = {name: min((row.costs[name] for row in judged), default=math.nan) for name in limits}
            raise InfeasibleTargetError(
                f"best: none of {len(self.rows)} rows keeps {limits}; the smallest values are {least}, of "
                f"{len(judged)} rows with a number for {self.monitor!r}. Sweep smaller targets or larger strengths"
            )
        return min(fitting, key=lambda row: (self._loss(row), *(row.costs[name] for name in self.costs)))

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """One line per row, floats exactly; what does not exist is empty. The old file stays until it is complete."""
        records = self._records()
        text = io.StringIO()
        writer = csv.DictWriter(text, list(records[0]) if records else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        atomic_write(path, lambda file: file.write(text.getvalue().encode("utf-8")))

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """The rows, and by what they are compared; a number that is not finite is a text, as in the logs."""
        data = {
            "format": "oneshot-front",
            "version": 1,
            "monitor": self.monitor,
            "larger_is_better": self.larger_is_better,
            "costs": list(self.costs),
            "rows": [
                {
                    "point": row.point,
                    "folder": row.folder.name,
                    "costs": {name: json_number(value) for name, value in row.costs.items()},
                    "metrics": {name: json_number(value) for name, value in row.metrics.items()},
                    "dominated": row.dominated,
                    "error": row.error,
                }
                for row in self.rows
            ],
        }
        text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        atomic_write(path, lambda file: file.write(text.encode("utf-8")))

    def plot(self, path: str | os.PathLike[str], *, cost: str | None = None) -> None:
        """A picture of the metric over ``cost`` (default: the first one compared); what is dominated is pale.

        The end of the path says the format (.png, .svg, .pdf). Needs ``pip install 'oneshot-nas[plot]'``.
        """
        name = self.costs[0] if cost is None and self.costs else cost
        known = list(dict.fromkeys(name for row in self.found for name in row.costs))
        if name not in known:
            raise ConfigurationError(f"plot: cost={name!r}; the rows have {known}")
        points = [(row.costs[name], row.metrics[self.monitor], bool(row.dominated)) for row in self.found]
        plot_front(path, points, x_label=name, y_label=self.monitor)

    def __str__(self) -> str:
        return markdown_table(self._records())

    def _loss(self, row: FrontRow) -> float:
        value = row.metrics[self.monitor]
        return -value if self.larger_is_better else value

    def _records(self) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        for row in self.rows:
            record: dict[str, Any] = {**flat_point(row.point), **row.costs, **row.metrics, "dominated": row.dominated}
            record["folder"] = row.folder.name
            if row.failure is not None:
                record["error"] = row.error
            records.append(record)
        return _aligned(records)


def _aligned(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every record with every column, None where it has none; a failed search, which has few, gives no order."""
    longest = max(records, key=len, default={})
    names = dict.fromkeys([*longest, *(name for record in records for name in record)])
    return [{name: record.get(name) for name in names} for record in records]


def json_number(value: float) -> float | str:
    """A number as JSON can hold it.

    >>> json_number(0.5), json_number(float("nan"))
    (0.5, 'nan')
    """
    return value if math.isfinite(value) else str(value)
