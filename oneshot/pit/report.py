"""What of a network is searched, what goes together, and what is frozen and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .mask_set import MaskSet
from .search_space import SearchSpace

__all__ = ["AxisRow", "PITReport", "report_of"]


@dataclass(frozen=True)
class AxisRow:
    """One mask: what it decides, of which size, what is left of it now, and the dimensions that follow it."""

    label: str
    kind: str
    size: int
    kept: int
    members: tuple[str, ...]


@dataclass(frozen=True)
class PITReport:
    """The masks of a network, its frozen dimensions with their reasons, and what its costs can be.

    ``costs``: name -> (smallest, now, largest). ``as_graph``: the export is a ``torch.fx`` graph, because numbers in
    the code of the network change with its masks. ``str(report)`` is a table, ``report.as_dict()`` is JSON-ready.
    """

    masks: tuple[AxisRow, ...]
    frozen: Mapping[str, str]
    costs: Mapping[str, tuple[float, float, float]]
    as_graph: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {
            "masks": [vars(row) | {"members": list(row.members)} for row in self.masks],
            "frozen": dict(self.frozen),
            "as_graph": self.as_graph,
            "costs": {
                name: dict(zip(("smallest", "now", "largest"), n, strict=True)) for name, n in self.costs.items()
            },
        }

    def __str__(self) -> str:
        rows = [("mask", "kind", "kept", "of", "dimensions that go together")]
        rows += [(r.label, r.kind, str(r.kept), str(r.size), _shortened(r.members)) for r in self.masks]
        lines = _table(rows)
        if self.frozen:
            by_reason: dict[str, list[str]] = {}
            for dimension, reason in self.frozen.items():
                by_reason.setdefault(reason, []).append(dimension)
            lines += [
                "",
                *_table([("frozen because of", "dimensions"), *((w, _shortened(d)) for w, d in by_reason.items())]),
            ]
        costs = [["cost", "smallest", "now", "largest"]]
        costs += [[name, *(f"{n:,.0f}" for n in numbers)] for name, numbers in self.costs.items()]
        lines += ["", *_table(costs)]
        if self.as_graph:
            lines += ["", "exported as a torch.fx graph: numbers in the code change with the masks"]
        return "\n".join(lines)


def report_of(space: SearchSpace, masks: MaskSet, costs: Mapping[str, tuple[float, float, float]]) -> PITReport:
    """The report of a search space with its masks as they are now."""
    decisions = masks.decisions()
    rows = []
    for axis in space.channels:
        members = tuple(str(d) for d in axis.dimensions)
        size = masks[axis.label].made_with
        rows.append(AxisRow(axis.label, "channels", size, len(decisions[axis.label]), members))
    for kernel in space.kernels:
        members = tuple(str(d) for d in kernel.positions)
        sides = len(next(iter(kernel.positions.values())))
        label = kernel.kernel_label
        rows.append(AxisRow(label, "kernel size", sides, decisions[label], members))
        if kernel.dilated:
            label = kernel.dilation_label
            largest = 2 ** (len(masks[label].alpha) - 1)
            rows.append(AxisRow(label, "dilation", largest, decisions[label], members))
    return PITReport(tuple(rows), {str(d): why for d, why in space.frozen.items()}, costs, space.as_graph)


def _shortened(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
