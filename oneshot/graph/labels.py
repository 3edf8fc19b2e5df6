"""Labelled dimensions of the tensors of a run, and what operators do to them.

A *label* of a tensor is an integer array of its rank, of size 1 along every dimension it does not vary along; its
values are atoms of ``Units``. An element of the tensor is there as long as every one of its labels is kept. Labels of
parameters are their own indices; movement of data moves the labels, pointwise operators unite them, and products
followed by a sum (convolutions, matrix products) end them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from .units import Atoms, Units

__all__ = ["Label", "Labelled", "Labels"]

Label: TypeAlias = Tensor
"""An int64 tensor of the rank of what it labels."""


@dataclass(frozen=True)
class Labelled:
    """The labels of one tensor. ``weight``: it is a parameter, or one whose elements were only moved.

    ``fixed``: what it is, if that is why dimensions without a label cannot be cut.
    """

    shape: tuple[int, ...]
    labels: tuple[Label, ...] = ()
    weight: bool = False
    fixed: str = ""

    def varying(self) -> set[int]:
        """The dimensions that some label varies along."""
        return {d for label in self.labels for d in dims_of(label)}

    def moved(self, function: Callable[[Label], Label], shape: Sequence[int]) -> Labelled:
        """The same function applied to every label."""
        return replace(self, labels=tuple(function(label) for label in self.labels), shape=tuple(shape))

    def aligned(self, rank: int) -> Labelled:
        """With dimensions of size 1 in front, as broadcasting has them."""
        extra = (1,) * (rank - len(self.shape))
        return self.moved(lambda s: s.reshape(extra + tuple(s.shape)), extra + self.shape)


def dims_of(label: Label) -> set[int]:
    """The dimensions along which a label varies."""
    return {d for d, size in enumerate(label.shape) if size > 1}


def atoms_of(label: Label) -> Atoms:
    atoms: Atoms = label.numpy()
    return atoms


@dataclass
class Labels:
    """What was found about the units so far, and the rules by which more is found.

    ``summed``: atoms of weights that a product sums over; at these places a mask is exact, since a zero there is the
    same as an absent column. ``grids``: labels that a ``view`` has split in rows and columns, which must stay
    rectangular.
    """

    units: Units = field(default_factory=Units)
    summed: list[Atoms] = field(default_factory=list)
    grids: list[tuple[Label, str]] = field(default_factory=list)

    # ---- bookkeeping -------------------------------------------------------------------------------------------

    def compact(self, labelled: Labelled, why: str = "") -> Labelled:
        """Labels with size 1 along what they are constant along. One that became a single unit cannot be cut."""
        found = []
        for label in labelled.labels:
            small = self._compact(label)
            if small.numel() > 1:
                found.append(small)
            elif small.numel() and int(small) != 0:
                self.units.freeze(atoms_of(small), f"{why}: nothing would be left".lstrip(": "))
        return replace(labelled, labels=tuple(found))

    def _compact(self, label: Label) -> Label:
        for d in range(label.dim()):
            if label.shape[d] > 1 and label.stride(d) == 0:
                label = label.narrow(d, 0, 1)
        roots = self.units.roots(atoms_of(label))
        for d in range(label.dim()):
            if label.shape[d] > 1 and bool((roots == roots.take([0], axis=d)).all()):
                label, roots = label.narrow(d, 0, 1), roots.take([0], axis=d)
        return label

    def freeze(self, labels: Sequence[Label], why: str) -> None:
        for label in labels:
            self.units.freeze(atoms_of(label), why)

    # ---- rules -------------------------------------------------------------------------------------------------

    def pointwise(self, operands: Sequence[Labelled], why: str) -> Labelled:
        """Elements at one place of all operands are one unit.

        A dimension that one operand labels, and another one has without a label, is frozen: nobody could cut that one.
        """
        rank = max(len(operand.shape) for operand in operands)
        operands = [self.compact(operand, why).aligned(rank) for operand in operands]
        shape = tuple(next((n for n in sizes if n != 1), 1) for sizes in zip(*(o.shape for o in operands), strict=True))
        for d in range(rank):
            unlabelled = [o for o in operands if o.shape[d] > 1 and d not in o.varying()]
            if unlabelled:
                varying = [s for o in operands for s in o.labels if d in dims_of(s)]
                reason = unlabelled[0].fixed or "a dimension that no weight has"
                self.freeze(varying, f"{why}: meets {reason}")
        return Labelled(shape, tuple(label for cluster in _clusters(operands) for label in self._united(cluster, why)))

    def _united(self, cluster: list[list[Label]], why: str) -> list[Label]:
        """The labels of the result, from those of each operand that share dimensions."""
        together = [labels for labels in cluster if labels]
        if len(together) == 1:
            return together[0]
        counts = {len(labels) for labels in together}
        same = all(dims_of(a) == dims_of(b) for labels in together for a, b in zip(together[0], labels, strict=False))
        if len(counts) > 1 or (counts != {1} and not same):
            self.freeze([label for labels in together for label in labels], f"{why} of dimensions split differently")
            return [label for labels in together for label in labels]
        result = []
        for labels in zip(*together, strict=True):
            if any(len({s.shape[d] for s in labels} - {1}) > 1 for d in range(labels[0].dim())):
                self.freeze(labels, f"{why} of dimensions of different sizes")
                result.append(labels[0])
                continue
            wide = torch.broadcast_tensors(*labels)
            for other in wide[1:]:
                self.units.unite(atoms_of(wide[0]), atoms_of(other), f"{why} with a fixed position")
            result.append(wide[0])
        return result

    def reduce(self, operand: Labelled, dims: Sequence[int], why: str | None) -> Labelled:
        """Labels after a reduction over ``dims``, kept as size 1.

        A label that is gone entirely is frozen for the reason ``why``, unless that is None; one that varies along
        other dimensions too is united along the reduced ones.
        """
        found = []
        shape = tuple(1 if d in dims else n for d, n in enumerate(operand.shape))
        for label in self.compact(operand).labels:
            reduced = dims_of(label) & set(dims)
            if not reduced:
                found.append(label)
            elif reduced == dims_of(label):
                if why is not None:
                    self.freeze([label], why)
            else:
                found.append(self.tied(label, reduced, why or "a sum"))
        return Labelled(shape, tuple(found))

    def tied(self, label: Label, dims: set[int], why: str) -> Label:
        """One unit along ``dims``; of size 1 there afterwards."""
        first = label
        for d in dims:
            first = first.narrow(d, 0, 1)
        self.units.unite(atoms_of(label), atoms_of(first.expand_as(label)), f"{why} over a fixed position")
        return first

    def contract(self, one: Labelled, other: Labelled, why: str) -> Labelled:
        """``one @ other``: (..., M, K) and (..., K, N) of equal rank."""
        left = one.moved(lambda s: s.unsqueeze(-1), (*one.shape, 1))
        right = other.moved(lambda s: s.unsqueeze(-3), (*other.shape[:-2], 1, *other.shape[-2:]))
        rank = max(len(left.shape), len(right.shape))
        summed = rank - 2
        product = self.pointwise([left, right], why)
        self.sum_over([left.aligned(rank), right.aligned(rank)], summed, why)
        result = self.reduce(product, [summed], None)
        return result.moved(lambda s: s.squeeze(-2), (*result.shape[:-2], *result.shape[-1:]))

    def sum_over(self, operands: Sequence[Labelled], dim: int, why: str) -> None:
        """Note where the labels that end here can be masked: in a weight. Where there is none, they are frozen."""
        operands = [self.compact(operand, why) for operand in operands]
        of_weights = [s for o in operands if o.weight for s in o.labels if dims_of(s) == {dim}]
        for label in of_weights:
            self.summed.append(atoms_of(label).ravel().copy())
        # One label of a weight along the sum is enough: the pointwise product has made the others one with it.
        if not of_weights:
            ending = [s for o in operands for s in o.labels if dims_of(s) == {dim}]
            self.freeze(ending, f"{why}: summed over without a weight to mask")

    def rectangular(self, before: Labelled, after: Labelled, why: str) -> None:
        """Note the labels that a view split over more dimensions than they had."""
        for old, new in zip(before.labels, after.labels, strict=True):
            if len(dims_of(new)) > len(dims_of(old)):
                self.grids.append((new, why))

    def settle_grids(self) -> None:
        """Whole rows of a grid are units where they are one already (heads, groups), else whole columns are."""
        changed = True
        while changed:
            before = self.units.parents.copy()
            for label, why in self.grids:
                self._settle(atoms_of(label).squeeze(), why)
            changed = not np.array_equal(before, self.units.parents)

    def _settle(self, grid: Atoms, why: str) -> None:
        while grid.ndim > 1:
            rows = self.units.roots(grid).reshape(grid.shape[0], -1)
            if bool((rows == rows[:, :1]).all()):
                return
            self.units.unite(grid, np.broadcast_to(grid[:1], grid.shape), why)
            grid = grid[0]


def _clusters(operands: Sequence[Labelled]) -> list[list[list[Label]]]:
    """The labels of all operands, grouped by shared dimensions; in each group by operand."""
    clusters: list[tuple[set[int], list[list[Label]]]] = []
    for place, operand in enumerate(operands):
        for label in operand.labels:
            dims = dims_of(label)
            joined: list[list[Label]] = [[] for _ in operands]
            joined[place].append(label)
            apart = []
            for other_dims, other in clusters:
                if other_dims & dims:
                    dims = dims | other_dims
                    joined = [b + a for a, b in zip(joined, other, strict=True)]
                else:
                    apart.append((other_dims, other))
            clusters = [*apart, (dims, joined)]
    return [labels for _, labels in clusters]
