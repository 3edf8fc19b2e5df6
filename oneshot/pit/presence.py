"""Channels that only some architectures have: those of the wider candidates of a choice between different widths.

In the search the outputs of narrower candidates are padded with zeros. In the network of a narrower one these channels
are gone, and so are the columns of what reads them: a convolution or a linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import prod

import numpy as np
from torch import nn

from ..errors import UnsupportedModelError
from ..graph import Condition, intersect, tensor_conditions
from ..graph.dimensions import Dimensions, Group, Widened
from ..graph.units import Atoms

__all__ = ["Presence", "cases", "holds", "presence_of"]

Presence = Mapping[str, Sequence[Condition]]
"""Label of an axis -> conditions of what makes its channels: they are there while any of them holds."""

_MOST_CASES = 4096


def presence_of(found: Dimensions, network: nn.Module) -> dict[str, list[Condition]]:
    """Of the groups that some architectures lack. UnsupportedModelError where more than their readers would have to go.

    Every parameter that has such a channel, but for what sums over it, must belong to candidates that are wide enough.
    """
    conditions = _by_name(network)
    starts = np.cumsum([0, *(group.units for group in found.groups)])
    presence: dict[str, list[Condition]] = {}
    for widened in found.widened:
        for place, units in _lacked(found, widened):
            where = f"{widened.label}: its candidates have outputs of different widths, {_widths(widened)}"
            if (units < 0).any():
                raise UnsupportedModelError(f"{where}, and {_why_frozen(found)}. Give them one width")
            group = found.groups[int(np.searchsorted(starts, units[0], side="right")) - 1]
            if group.label not in presence:
                presence[group.label] = _makers(group, conditions)
            outside = [
                when
                for when in _makers(group, conditions)
                if _together(when, widened.when, {widened.label: widened.lacking(place)})
            ]
            if outside:
                raise UnsupportedModelError(
                    f"{where}; channel {place} of the wider ones meets {_named(group, conditions, outside)}, which "
                    "would have to lose it. Only a convolution or a linear layer may follow, perhaps after functions "
                    "that keep zeros. Give the candidates one width"
                )
    return presence


def _by_name(network: nn.Module) -> dict[str, list[Condition]]:
    names = {id(tensor): name for name, tensor in (*network.named_parameters(), *network.named_buffers())}
    return {names[id(tensor)]: conditions for tensor, conditions in tensor_conditions(network)}


def _lacked(found: Dimensions, widened: Widened) -> Iterator[tuple[int, Atoms]]:
    """The places that some option lacks, with their units."""
    for label in widened.labels:
        of_places = np.moveaxis(found.unit_of[label.numpy()], widened.dim, 0).reshape(label.shape[widened.dim], -1)
        for place, units in enumerate(of_places):
            if widened.lacking(place):
                yield place, units
    if not widened.labels:
        yield min(widened.widths.values()), np.full(1, -1)


def _makers(group: Group, conditions: Mapping[str, list[Condition]]) -> list[Condition]:
    """The conditions of the parameters that have a row of these channels."""
    rows = dict.fromkeys(d.name for d in group.members if d not in group.columns)
    found: list[Condition] = []
    for name in rows:
        found += [when for when in conditions.get(name, [{}]) if when not in found]
    return found


def _named(group: Group, conditions: Mapping[str, list[Condition]], wanted: Sequence[Condition]) -> str:
    rows = dict.fromkeys(d.name for d in group.members if d not in group.columns)
    return ", ".join([name for name in rows if any(when in wanted for when in conditions.get(name, [{}]))][:3])


def _together(*conditions: Condition) -> bool:
    both: Condition | None = {}
    for when in conditions:
        both = None if both is None else intersect(both, when)
    return both is not None


def _widths(widened: Widened) -> str:
    return ", ".join(f"{width} for option {option}" for option, width in widened.widths.items())


def _why_frozen(found: Dimensions) -> str:
    reasons = dict.fromkeys(found.frozen.values())
    return f"what reads them cannot be cut ({'; '.join(list(reasons)[:2]) or 'no weight that sums over them'})"


def holds(presence: Sequence[Condition], choices: Mapping[str, int]) -> bool:
    """Whether one of these conditions holds in an architecture."""
    return any(all(choices[label] in options for label, options in when.items()) for when in presence)


def cases(
    when: Condition, presence: Mapping[int, Sequence[Condition]], sizes: Mapping[str, int]
) -> list[tuple[Condition, frozenset[int]]]:
    """Disjoint conditions that together are ``when``, each with the axes (of ``presence``) that are absent in it.

    ``sizes``: label -> number of its options. UnsupportedModelError for more than 4,096 cases.

    >>> wide = {7: [{"a": frozenset({1})}]}
    >>> [(dict(when), sorted(absent)) for when, absent in cases({}, wide, {"a": 3})]
    [({'a': frozenset({0, 2})}, [7]), ({'a': frozenset({1})}, [])]
    """
    labels = sorted({label for conditions in presence.values() for condition in conditions for label in condition})
    options = [sorted(when.get(label, frozenset(range(sizes[label])))) for label in labels]
    if prod(len(of_label) for of_label in options) > _MOST_CASES:
        raise UnsupportedModelError(
            f"the widths of one layer depend on the decisions {labels}, which have more than {_MOST_CASES} "
            "combinations; give the candidates of these choices one width"
        )
    found: list[tuple[Condition, frozenset[int]]] = []
    of_pattern: dict[frozenset[int], set[int]] = {}
    for of_all in product(*options):
        choices = dict(zip(labels, of_all, strict=True))
        absent = frozenset(axis for axis, conditions in presence.items() if not holds(conditions, choices))
        if len(labels) == 1:
            of_pattern.setdefault(absent, set()).add(of_all[0])
        else:
            found.append(({**when, **{label: frozenset({k}) for label, k in choices.items()}}, absent))
    found += [({**when, labels[0]: frozenset(chosen)}, absent) for absent, chosen in of_pattern.items()]
    return found or [(when, frozenset())]
