"""Indices of parameters that must be kept or removed together: disjoint sets of atoms, with the reasons of frozen ones.

An *atom* is one index of one dimension of one parameter or buffer. Atoms that were united are one *unit*.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Atoms", "Units"]

Atoms = NDArray[np.int64]


class Units:
    """Disjoint sets of atoms, each an integer. Atom 0 stands for what can never be removed.

    >>> units = Units()
    >>> a, b = units.fresh(3), units.fresh(3)
    >>> units.unite(a, b, "an addition")
    >>> units.freeze(b[:1], "a network output")
    >>> bool((units.roots(a) == units.roots(b)).all()), units.reasons(a)
    (True, ['a network output', None, None])
    """

    def __init__(self) -> None:
        self.parents: Atoms = np.zeros(1, np.int64)
        self.frozen: NDArray[np.int32] = np.ones(1, np.int32)  # of each root: 1 + the index of its reason, or 0
        self.texts = ["a fixed position"]

    def fresh(self, n: int) -> Atoms:
        """n new atoms."""
        start = len(self.parents)
        atoms = np.arange(start, start + n)
        self.parents = np.concatenate([self.parents, atoms])
        self.frozen = np.concatenate([self.frozen, np.zeros(n, np.int32)])
        return atoms

    def roots(self, atoms: Atoms) -> Atoms:
        """The representative of the unit of each atom, in the same shape."""
        roots: Atoms = self.parents[atoms]
        while True:
            above: Atoms = self.parents[roots]
            if np.array_equal(above, roots):
                return roots
            roots = above

    def unite(self, one: Atoms, other: Atoms, reason: str) -> None:
        """Make elements at one place one unit; what meets atom 0 is frozen for ``reason``. Shapes are broadcast."""
        one, other = np.broadcast_arrays(self.roots(one), self.roots(other))
        low, high = np.minimum(one, other).ravel(), np.maximum(one, other).ravel()
        self._freeze_roots(high[(low == 0) & (high != 0)], reason)
        differ = (low != high) & (low != 0)
        low, high = low[differ], high[differ]
        touched = np.unique(np.concatenate([low, high]))
        while len(low):
            # The larger root hangs below the smallest one it meets; what is left over is done in the next round.
            np.minimum.at(self.parents, high, low)
            one, other = self.roots(low), self.roots(high)
            low, high = np.minimum(one, other), np.maximum(one, other)
            differ = low != high
            low, high = low[differ], high[differ]
        marked = touched[self.frozen[touched] > 0]
        roots = self.roots(marked)
        free = self.frozen[roots] == 0
        self.frozen[roots[free]] = self.frozen[marked[free]]

    def freeze(self, atoms: Atoms, reason: str) -> None:
        """Keep these units for ever. The first reason given is the one that is reported."""
        self._freeze_roots(np.unique(self.roots(np.asarray(atoms, np.int64))), reason)

    def _freeze_roots(self, roots: Atoms, reason: str) -> None:
        new = roots[self.frozen[roots] == 0]
        if len(new):
            if reason not in self.texts:
                self.texts.append(reason)
            self.frozen[new] = 1 + self.texts.index(reason)

    def reasons(self, atoms: Atoms) -> list[str | None]:
        """Why each atom is frozen; None if it is not."""
        codes: Iterable[int] = self.frozen[self.roots(atoms)].ravel().tolist()
        return [self.texts[code - 1] if code else None for code in codes]

    def is_frozen(self, atoms: Atoms) -> NDArray[np.bool_]:
        """In the shape of ``atoms``."""
        return self.frozen[self.roots(atoms)] > 0
