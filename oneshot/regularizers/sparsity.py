"""How many weights are exactly zero, and how many whole kernels, channels, rows and columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import final

from torch import nn

from ..errors import ConfigurationError
from .groups import Family, zero_groups
from .layer_groups import GROUPINGS
from .patterns import weights_of

__all__ = ["SparsityReport", "SparsityRow", "sparsity"]


@final
@dataclass(frozen=True)
class SparsityRow:
    """Shares of exact zeros in [0, 1]; None for what a parameter does not have: a bias has no kernels."""

    name: str
    shape: tuple[int, ...]
    elements: float
    kernels: float | None
    output_channels: float | None
    input_channels: float | None
    rows: float | None
    columns: float | None


@final
@dataclass(frozen=True)
class SparsityReport:
    """One row per parameter, and their total: zeros of all / number of all. ``print`` shows it as a table."""

    rows: tuple[SparsityRow, ...]
    total: SparsityRow

    def __getitem__(self, name: str) -> SparsityRow:
        for row in self.rows:
            if row.name == name:
                return row
        known = ", ".join(row.name for row in self.rows)
        raise ConfigurationError(f"sparsity: no parameter {name!r}; there are {known}")

    def __str__(self) -> str:
        head = ["parameter", "shape", *(name.replace("_", " ") for name in _SHARES)]
        lines = [head, *(_cells(row) for row in (*self.rows, self.total))]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        aligned = [
            [
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            for line in lines
        ]
        return "\n".join("  ".join(cells) for cells in aligned)


_SHARES = tuple(field.name for field in fields(SparsityRow) if field.name not in ("name", "shape"))


def sparsity(model: nn.Module) -> SparsityReport:
    """Shares of exact zeros of every weight of a model: of elements, and of whole groups.

    Kernels, output and input channels of convolutions; rows (output features) and columns (input features) of linear
    layers. A shared parameter counts once, alphas do not.

    >>> import torch
    >>> net = nn.Linear(3, 4, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[0.0, 0, 0], [1, 4, 0], [1, 2, 0], [0, 0, 0]]))
    >>> row = sparsity(net)["weight"]
    >>> round(row.elements, 3), row.rows, round(row.columns, 3), row.kernels
    (0.667, 0.5, 0.333, None)
    """
    weights = weights_of(model)
    if not weights:
        raise ConfigurationError(f"sparsity: this {type(model).__name__} has no weights")
    found = {name: {"elements": (int((w == 0).sum()), w.numel())} for name, w in weights.items()}
    names = {id(w): name for name, w in weights.items()}
    for layer in model.modules():
        for kind in _SHARES[1:]:
            for attribute, index in GROUPINGS[kind].index(layer).items():
                name = names.get(id(getattr(layer, attribute)))  # None: computed from others, no parameter itself
                if name is not None:
                    family = Family(kind, {name: index}, int(index.max()) + 1)
                    found[name][kind] = (int(zero_groups(family, weights).sum()), family.n)
    total: dict[str, tuple[int, int]] = {}
    for counts in found.values():
        for kind, (zero, n) in counts.items():
            before = total.get(kind, (0, 0))
            total[kind] = (before[0] + zero, before[1] + n)
    rows = tuple(_row(name, tuple(weights[name].shape), counts) for name, counts in found.items())
    return SparsityReport(rows, _row("total", (), total))


def _row(name: str, shape: tuple[int, ...], counts: Mapping[str, tuple[int, int]]) -> SparsityRow:
    shares = {kind: zero / n if n else 0.0 for kind, (zero, n) in counts.items()}
    return SparsityRow(name, shape, shares["elements"], *(shares.get(kind) for kind in _SHARES[1:]))


def _cells(row: SparsityRow) -> list[str]:
    shares = (getattr(row, kind) for kind in _SHARES)
    shape = " x ".join(map(str, row.shape)) or "-"
    return [row.name, shape, *("-" if share is None else f"{share:.1%}" for share in shares)]
