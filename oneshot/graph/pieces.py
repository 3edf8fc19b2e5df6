"""Groups of which any choice leaves something of every piece."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["never_empty"]


def never_empty(groups: Sequence[Sequence[int]], pieces: Iterable[frozenset[int]]) -> list[list[int]]:
    """The groups, divided until every piece holds the whole of one: of a group at least one unit is always kept.

    ``pieces``: units that are read together, the channels of a slice say. Smaller pieces are settled first, each by the
    group it has most of.

    >>> never_empty([[1, 2, 3, 4]], [frozenset({1, 2}), frozenset({3, 4})])
    [[1, 2], [3, 4]]
    >>> never_empty([[1, 2, 3, 4]], [frozenset({1, 2, 3})])  # 4 has to stay then, or 1, 2 or 3 could not be relied on
    [[1, 2, 3], [4]]
    """
    found = {number: list(group) for number, group in enumerate(groups)}
    group_of = {unit: number for number, group in found.items() for unit in group}
    for piece in sorted(set(pieces), key=lambda p: (len(p), sorted(p))):
        parts: dict[int, int] = {}
        for unit in piece:
            if unit in group_of:
                parts[group_of[unit]] = parts.get(group_of[unit], 0) + 1
        if not parts or any(count == len(found[number]) for number, count in parts.items()):
            continue
        number = min(parts, key=lambda n: (-parts[n], n))
        other = len(found)
        found[other] = [unit for unit in found[number] if unit not in piece]
        found[number] = [unit for unit in found[number] if unit in piece]
        group_of.update(dict.fromkeys(found[other], other))
    return list(found.values())
