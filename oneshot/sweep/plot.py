"""The picture of a front; the one file that needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigurationError
from ..files import atomic_write

__all__ = ["plot_front"]


def plot_front(
    path: str | os.PathLike[str], points: Sequence[tuple[float, float, bool]], *, x_label: str, y_label: str
) -> None:
    """Write a scatter plot of (x, y, dominated), with a line through what is not dominated."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError("plot: matplotlib is not installed: pip install 'oneshot-nas[plot]'") from error
    figure = Figure(figsize=(6, 4), layout="constrained")
    known = sorted(figure.canvas.get_supported_filetypes())
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in known:
        raise ConfigurationError(f"plot: {str(path)!r} ends in {kind!r}; allowed are {known}")
    axes = figure.subplots()
    front = sorted((x, y) for x, y, is_dominated in points if not is_dominated)
    beaten = [(x, y) for x, y, is_dominated in points if is_dominated]
    axes.plot([x for x, _ in front], [y for _, y in front], "o-", label="front")
    if beaten:
        axes.plot([x for x, _ in beaten], [y for _, y in beaten], "o", color="0.7", label="dominated")
        axes.legend()
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    atomic_write(path, lambda file: figure.savefig(file, format=kind))
