"""What a layer costs whose widths no table row holds: measured at a grid of widths, interpolated between them.

With axes a_1 < ... < a_n and x between a_i and a_(i+1), let w = (x - a_i) / (a_(i+1) - a_i). On three axes,
    cost(x, y, z) = sum over the 8 corners of the cell of prod(w or 1 - w, per axis) * (value at the corner),
the multilinear interpolation. It is continuous, exact at the grid points, and differentiable inside a cell, so a
width may be a relaxed number of channels that is learned.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, final

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from ..errors import ConfigurationError, UnknownCostError
from ..files import atomic_write
from .table import _load, _milliseconds, _shown

__all__ = ["GridError", "WidthGrid"]

_FORMAT, _VERSION = "oneshot-width-grid", 1
_KEYS = ("format", "version", "unit", "runtime", "in_channels", "out_channels", "kernel", "values")
_LARGEST = 2**24  # the integers that float32 can tell apart

CostOf = Callable[[int, int, int], float]


@final
@dataclass(frozen=True)
class GridError:
    """How far a grid is from the truth at ``n`` points off it; the errors are |grid - truth| / truth.

    ``worst``: (in_channels, out_channels, kernel) of the largest error, with what the grid and the truth say there.

    >>> str(GridError(50, 0.031, 0.25, (24, 48, 3), 1.0, 0.8, 0.96))
    '50 points off the grid: error 3.1 % on average, at most 25.0 % at (24, 48, 3): 1 ms, not 0.8; 96 % within 10 %'
    """

    n: int
    mean: float
    maximum: float
    worst: tuple[int, int, int]
    worst_grid_ms: float
    worst_true_ms: float
    within_10_percent: float

    def __str__(self) -> str:
        return (
            f"{self.n} points off the grid: error {self.mean:.1%} on average, at most {self.maximum:.1%} at "
            f"{self.worst}: {self.worst_grid_ms:.4g} ms, not {self.worst_true_ms:.4g}; "
            f"{self.within_10_percent:.0%} within 10%"
        ).replace("%", " %")


@final
@dataclass(frozen=True, eq=False)
class WidthGrid:
    """Milliseconds of one layer over its widths, ``values[i, o, k]`` at in_channels[i], out_channels[o], kernel[k].

    ``out_channels``: None for a layer that has as many as in_channels, a depthwise convolution; the axis then has
    one entry. The axes ascend; ``values`` may be given as nested lists and becomes a float64 tensor. ``runtime``:
    where the numbers come from, free text by name.

    >>> grid = WidthGrid((8, 16), (8, 16), (3,), [[[1.0], [2.0]], [[3.0], [6.0]]])
    >>> width = torch.tensor(12.0, requires_grad=True)
    >>> latency_ms = grid.at(width, 16, 3)  # half way between 2 and 6
    >>> latency_ms.backward()
    >>> latency_ms.item(), width.grad.item()  # (6 - 2) ms in 8 channels
    (4.0, 0.5)
    """

    in_channels: Sequence[int]
    out_channels: Sequence[int] | None
    kernel: Sequence[int]
    values: Tensor
    runtime: Mapping[str, str] = field(default_factory=dict)
    source: str = "the width grid"

    def __post_init__(self) -> None:
        for name in ("in_channels", "out_channels", "kernel"):
            if name != "out_channels" or self.out_channels is not None:
                object.__setattr__(self, name, _axis(getattr(self, name), name, self.source))
        object.__setattr__(self, "values", _values(self.values, self.shape, self.source))
        if not all(type(text) is str for pair in self.runtime.items() for text in pair):
            raise ConfigurationError(
                f"{self.source}: 'runtime' is a mapping of texts to texts, {{'device': 'Pixel 4'}}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Points per axis, (n_in, n_out, n_kernel); n_out is 1 where out_channels follows in_channels."""
        return len(self.in_channels), 1 if self.out_channels is None else len(self.out_channels), len(self.kernel)

    # --- what a layer costs ---

    def at(self, in_channels: float | Tensor, out_channels: float | Tensor | None, kernel: float | Tensor) -> Tensor:
        """Milliseconds at these widths, by the equation at the top of this file.

        The three are numbers or tensors and broadcast; the result has their common shape, and is differentiable in
        every tensor of them. At a grid point, where the two cells have two slopes, the gradient is that of the cell
        above (at the last point, of the cell below). An axis of one point has slope 0.

        Args:
            out_channels: None, or the same numbers as in_channels, where it follows in_channels.

        Raises:
            UnknownCostError: a width outside the grid, or none (NaN): there is no extrapolation.
            ConfigurationError: the shapes do not broadcast, or out_channels is not in_channels where it must be.
        """
        given = {"in_channels": in_channels, "kernel": kernel}
        if out_channels is not None:
            given["out_channels"] = out_channels
        elif self.out_channels is not None:
            raise ConfigurationError(f"{self.source}: at: out_channels is None; only a tied grid does not need it")
        widths = _broadcast(given, self.source)
        tied = widths.pop("out_channels", None) if self.out_channels is None else None
        if tied is not None and not torch.equal(tied, widths["in_channels"]):
            raise ConfigurationError(
                f"{self.source}: out_channels {_listed(tied)} and in_channels {_listed(widths['in_channels'])} differ; "
                "this grid prices layers with as many out_channels as in_channels. Give None, or fill a grid with an "
                "axis of out_channels"
            )
        cells = [self._cell("in_channels", widths["in_channels"]), self._cell("kernel", widths["kernel"])]
        if self.out_channels is not None:
            cells.insert(1, self._cell("out_channels", widths["out_channels"]))
        values = self.values.to(widths["kernel"])
        return _multilinear(values if self.out_channels is not None else values[:, 0], cells)

    def _cell(self, name: str, x: Tensor) -> _Cell:
        points: Sequence[int] = getattr(self, name)
        outside = ~((x >= points[0]) & (x <= points[-1]))  # so that NaN is outside
        if outside.any():
            raise UnknownCostError(
                f"{self.source}: {name} {_listed(x[outside])} is outside the grid, {points[0]} to {points[-1]}; "
                "nothing is extrapolated. Keep the layer inside, or fill a grid that reaches as far"
            )
        axis = torch.tensor(points, dtype=x.dtype, device=x.device)
        if len(points) == 1:
            first = torch.zeros_like(x, dtype=torch.int64)
            return _Cell(first, first, (x - axis[0]) * 0)
        below = (torch.searchsorted(axis, x.detach().contiguous(), right=True) - 1).clamp(max=len(points) - 2)
        return _Cell(below, below + 1, (x - axis[below]) / (axis[below + 1] - axis[below]))

    # --- where the numbers come from ---

    @classmethod
    def fill(
        cls,
        cost_of: CostOf,
        in_channels: Sequence[int],
        out_channels: Sequence[int] | None,
        kernels: Sequence[int],
        progress: bool | None = None,
        runtime: Mapping[str, str] | None = None,
    ) -> WidthGrid:
        """Ask ``cost_of(in_channels, out_channels, kernel)``, in milliseconds, at every point of the grid.

        Args:
            cost_of: builds and times the layer, or predicts it.
            in_channels, out_channels, kernels: the axes, in any order; out_channels None: as many as in_channels.
            progress: a bar over the points; None: on a terminal only.
            runtime: where the numbers come from, kept with them.

        >>> WidthGrid.fill(lambda i, o, k: i * o * k * k / 1000, [8, 4], None, [3, 1]).at(6, None, 1)  # (16 + 64) / 2
        tensor(0.0400, dtype=torch.float64)
        """
        ins, ks = _axis(in_channels, "in_channels", "fill", sort=True), _axis(kernels, "kernel", "fill", sort=True)
        outs = None if out_channels is None else _axis(out_channels, "out_channels", "fill", sort=True)
        points = [(i, i if o is None else o, k) for i in ins for o in (outs or (None,)) for k in ks]
        bar = tqdm(points, "width grid", disable=None if progress is None else not progress, leave=False)
        values = [_priced(cost_of, point) for point in bar]
        shaped = torch.tensor(values, dtype=torch.float64).reshape(len(ins), -1, len(ks))
        return cls(ins, outs, ks, shaped, runtime or {})

    def error(self, cost_of: CostOf, n: int = 50, seed: int = 0, *, multiple_of: int = 1) -> GridError:
        """Compare with ``cost_of`` at ``n`` different random points off the grid and inside it (all, if fewer).

        Points have whole numbers of channels, multiples of ``multiple_of`` (8, say, where a search keeps to those: a
        runtime may take another, slower or faster way for other numbers). Kernels are odd if all of the grid are, or
        even if all are.

        Raises:
            ConfigurationError: the grid holds every such point, or the truth is not a number of ms > 0.
        """
        if n < 1:
            raise ConfigurationError(f"error: n is {n}; at least one point is needed")
        if multiple_of < 1:
            raise ConfigurationError(f"error: multiple_of is {multiple_of}; at least 1 is needed")
        points = self._off_grid(n, seed, multiple_of)
        if not points:
            raise ConfigurationError(
                f"{self.source}: every such width from the first to the last point is on the grid, so there is "
                "nothing to interpolate and no error to measure"
            )
        compared = []
        for point in points:
            truth, guess = _priced(cost_of, point), self.at(*point).item()
            if truth == 0:
                raise ConfigurationError(f"error: cost_of{point} is 0 ms; an error relative to it has no meaning")
            compared.append((abs(guess - truth) / truth, point, guess, truth))
        errors = [error for error, *_ in compared]
        maximum, worst, guess, truth = max(compared)
        share = sum(error <= 0.1 for error in errors) / len(errors)
        return GridError(len(errors), sum(errors) / len(errors), maximum, worst, guess, truth, share)

    def _off_grid(self, n: int, seed: int, multiple_of: int) -> list[tuple[int, int, int]]:
        step = 2 if len({k % 2 for k in self.kernel}) == 1 else 1
        tied, ks = self.out_channels is None, _span(self.kernel, step)
        ins = [width for width in _span(self.in_channels) if width % multiple_of == 0]
        outs = [width for width in _span(self.out_channels or (0,)) if width % multiple_of == 0]
        total, on_grid = (
            len(ins) * len(outs) * len(ks),
            set(product(self.in_channels, self.out_channels or (0,), self.kernel)),
        )
        # Enough of them to have n left when all that are on the grid have been thrown away.
        drawn = Random(seed).sample(range(total), min(total, n + math.prod(self.shape)))
        points = [(ins[d // len(ks) // len(outs)], outs[d // len(ks) % len(outs)], ks[d % len(ks)]) for d in drawn]
        off = [point for point in points if point not in on_grid][:n]
        return [(i, i if tied else o, k) for i, o, k in off]

    # --- files ---

    @classmethod
    def read(cls, source: Mapping[str, Any] | str | Path) -> WidthGrid:
        """From a mapping, or a JSON or YAML file, of this form; ConfigurationError names what is wrong with it.

            format: oneshot-width-grid
            version: 1
            unit: ms
            runtime: {device: Pixel 4}     # texts, may be left out
            in_channels: [8, 16]           # ascending
            out_channels: [8, 16, 32]      # or null: as many as in_channels
            kernel: [3]
            values: [[[0.1], [0.2], [0.3]], [[0.2], [0.4], [0.6]]]   # by in_channels, out_channels, kernel

        >>> grid = WidthGrid.fill(lambda i, o, k: i / 8, [8, 16], None, [3])
        >>> WidthGrid.read(grid.as_dict()).at(12, None, 3).item()
        1.5
        """
        if isinstance(source, Mapping):
            return cls._from(source, "the width grid")
        path = Path(source)
        if not path.is_file():
            raise ConfigurationError(f"width grid {str(path)!r}: there is no such file")
        return cls._from(_load(path), str(path))

    @classmethod
    def _from(cls, data: Any, source: str) -> WidthGrid:
        if not isinstance(data, Mapping):
            raise ConfigurationError(
                f"{source}: a mapping with the keys {', '.join(_KEYS)} is needed, got {_shown(data)}"
            )
        head = tuple(data.get(key) for key in ("format", "version", "unit"))
        if head != (_FORMAT, _VERSION, "ms") or isinstance(head[1], bool):
            format_, version, unit = map(_shown, head)
            raise ConfigurationError(
                f"{source}: format {format_}, version {version}, unit {unit}; this library reads {_FORMAT!r}, version "
                f"{_VERSION}, unit 'ms'"
            )
        wrong = [_shown(key) for key in data if key not in _KEYS]
        wrong += [f"no {key}" for key in _KEYS if key not in data and key != "runtime"]
        if wrong:
            raise ConfigurationError(f"{source}: keys: {', '.join(wrong[:5])}; a width grid has {', '.join(_KEYS)}")
        runtime = data.get("runtime") or {}
        if not isinstance(runtime, Mapping):
            raise ConfigurationError(f"{source}: 'runtime' is {_shown(runtime)}; a mapping of texts is needed")
        return cls(data["in_channels"], data["out_channels"], data["kernel"], data["values"], dict(runtime), source)

    def as_dict(self) -> dict[str, Any]:
        """The form that ``read`` takes, JSON-ready."""
        axes = {name: getattr(self, name) for name in ("in_channels", "out_channels", "kernel")}
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "unit": "ms",
            "runtime": dict(self.runtime),
            **{name: None if points is None else list(points) for name, points in axes.items()},
            "values": self.values.tolist(),
        }

    def write(self, path: str | Path) -> None:
        """Write it, as JSON or YAML by the file's ending, atomically."""
        path, data = Path(path), self.as_dict()
        if path.suffix == ".json":
            text = json.dumps(data, indent=2) + "\n"
        else:
            text = yaml.safe_dump(data, sort_keys=False, default_flow_style=None)
        atomic_write(path, lambda file: file.write(text.encode()))


class _Cell(NamedTuple):
    """Of one axis: index of the point below, index of the point above, and the weight of the one above."""

    below: Tensor
    above: Tensor
    weight: Tensor


def _multilinear(values: Tensor, cells: Sequence[_Cell]) -> Tensor:
    total = torch.zeros_like(cells[0].weight)
    for corner in product((False, True), repeat=len(cells)):
        sides = list(zip(corner, cells, strict=True))
        weights = [cell.weight if above else 1 - cell.weight for above, cell in sides]
        total = (
            total
            + math.prod(weights[1:], start=weights[0])
            * values[tuple(cell.above if above else cell.below for above, cell in sides)]
        )
    return total


def _broadcast(given: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """Tensors of one shape, one floating type and one device: those of the tensors among them, else float64."""
    tensors = [x for x in given.values() if isinstance(x, Tensor)]
    floats = [x.dtype for x in tensors if x.is_floating_point()]
    dtype = torch.float32 if floats else torch.float64  # half precision cannot tell 2049 channels from 2048
    for other in floats:
        dtype = torch.promote_types(dtype, other)
    device = tensors[0].device if tensors else None
    try:
        widths = [torch.as_tensor(x, device=device).to(dtype) for x in given.values()]
        return dict(zip(given, torch.broadcast_tensors(*widths), strict=True))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"{source}: at: {', '.join(given)} are no numbers of shapes that broadcast: {error}"
        ) from error


def _listed(x: Tensor) -> str:
    numbers = [f"{number:.15g}" for number in x.detach().flatten()[:3].tolist()]
    return ", ".join(numbers) + (", ..." if x.numel() > 3 else "")


def _axis(points: Any, name: str, source: str, *, sort: bool = False) -> tuple[int, ...]:
    if not isinstance(points, Sequence) or isinstance(points, str) or not points:
        raise ConfigurationError(f"{source}: {name} is {_shown(points)}; a list of at least one whole number is needed")
    for point in points:
        if not isinstance(point, int) or isinstance(point, bool) or not 0 < point < _LARGEST:
            raise ConfigurationError(
                f"{source}: {name} has {_shown(point)}; whole numbers from 1 to 2**24 - 1 are needed"
            )
    points = sorted(points) if sort else points
    for one, other in pairwise(points):
        if one >= other:
            what = "stands twice" if one == other else f"stands before {other}; the points ascend"
            raise ConfigurationError(f"{source}: {name}: {one} {what}")
    return tuple(points)


def _values(values: Any, shape: tuple[int, int, int], source: str) -> Tensor:
    nested = values.tolist() if isinstance(values, Tensor) else values
    numbers: list[float] = []
    for row in _items(nested, shape[0], "values", "in_channels", source):
        for column in _items(row, shape[1], "a row of values", "out_channels", source):
            for number in _items(column, shape[2], "a column of values", "kernel", source):
                numbers.append(_milliseconds(number, f"values/{len(numbers)}", source))
    return torch.tensor(numbers, dtype=torch.float64).reshape(shape)


def _items(values: Any, n: int, what: str, axis: str, source: str) -> Sequence[Any]:
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != n:
        got = f"{len(values)} items" if isinstance(values, list | tuple) else _shown(values)
        raise ConfigurationError(f"{source}: {what}: {got}, where the axis {axis} has {n} points (a tied one has 1)")
    return values


def _priced(cost_of: CostOf, point: tuple[int, int, int]) -> float:
    return _milliseconds(cost_of(*point), f"cost_of{point}", "the given function")


def _span(points: Sequence[int], step: int = 1) -> range:
    return range(points[0], points[-1] + 1, step)
