"""Which of several networks another one beats: a pure function."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import ConfigurationError

__all__ = ["dominated"]


def dominated(values: Sequence[Sequence[float]]) -> list[bool]:
    """Row by row: whether another row is no worse in every column and better in at least one.

    In every column less is better (negate an accuracy). Of equal rows none dominates the other. NaN is worse than any
    number, infinity included, and as bad as NaN. ConfigurationError for rows of different length.

    >>> dominated([(10, 0.3), (20, 0.2), (30, 0.2), (30, 0.1)])  # the third is beaten by the second
    [False, False, True, False]
    """
    lengths = sorted({len(row) for row in values})
    if len(lengths) > 1:
        raise ConfigurationError(f"dominated: rows with {lengths} columns; all rows need the same ones")
    ranked = [[(math.isnan(value), 0.0 if math.isnan(value) else value) for value in row] for row in values]
    return [
        any(other != row and all(b <= a for a, b in zip(row, other, strict=True)) for other in ranked) for row in ranked
    ]
