"""Sizes of dimensions as functions of the masks: n = c + sum_a m_a s_a, with s_a the size of axis a."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..graph.dimensions import Dimension, Dimensions
from ..graph.labels import Label
from ..graph.units import Atoms
from .mask_set import MaskSet
from .presence import Presence

__all__ = ["Form", "Sizes", "form_matrix"]


class Form(NamedTuple):
    """``constant`` indices that stay, and (axis, indices of each of its units) for the others.

    >>> Form(2, ((0, 3),)).at([4])
    14
    """

    constant: int
    parts: tuple[tuple[int, int], ...] = ()

    def at(self, sizes: Sequence[int]) -> int:
        """The size of the dimension where the axes have these sizes."""
        return self.constant + sum(count * sizes[axis] for axis, count in self.parts)

    def without(self, absent: Collection[int]) -> Form:
        """Where these axes are not there."""
        return self._replace(parts=tuple(part for part in self.parts if part[0] not in absent)) if absent else self


class Sizes:
    """The sizes of all dimensions of a network. Axes are numbered as in ``MaskSet``, those of channels first.

    ``full``: what the axes had at first, as in ``found``; the network of ``shapes`` may have lost units since.
    ``presence``: number of an axis that some architectures lack -> conditions under which it is there; ``options``:
    label of a choice -> number of its options.
    """

    def __init__(
        self,
        masks: MaskSet,
        shapes: Mapping[str, tuple[int, ...]],
        found: Dimensions,
        presence: Presence,
        options: Mapping[str, int],
    ) -> None:
        self.shapes, self.unit_of = shapes, found.unit_of
        self.options = options
        self.presence = {i: presence[a.label] for i, a in enumerate(masks.channels) if a.label in presence}
        self.full, self.lowest = masks.made_with(), masks.lowest()
        self.n_axes, self.n_channels = masks.n_axes, len(masks.channels)
        axis_of = masks.axis_of.cpu().numpy()
        now = masks.full()
        self.of_dimension = {d: self._form(axis_of[place.numpy()], now) for d, place in masks.places(shapes).items()}
        numbers = {axis.label: i for i, axis in enumerate(masks.channels)}
        axes = [np.full(group.units, numbers.get(group.label, self.n_axes)) for group in found.groups]
        self.axis_of_unit: Atoms = np.concatenate([*axes, np.full(1, self.n_axes)])  # unit -1: of no group

    def of(self, name: str, dim: int) -> Form:
        """Of a dimension of a parameter or buffer."""
        return self.of_dimension.get(Dimension(name, dim), Form(self.shapes[name][dim]))

    def along(self, label: Label, dim: int) -> Form:
        """Of a dimension of any tensor, by a label that varies along it."""
        units = np.moveaxis(self.unit_of[label.numpy()], dim, 0)
        if bool((units == units[:1]).all()):  # they have become one along it: heads, of (heads, size of a head)
            return Form(label.shape[dim])
        return self._form(self.axis_of_unit[units.reshape(len(units), -1)[:, 0]], self.full)

    def _form(self, axes: Atoms, units: Sequence[int]) -> Form:
        """From the axis of each index, ``n_axes`` for none; ``units``: how many each axis has there."""
        constant, parts = 0, []
        for axis, count in zip(*np.unique(axes, return_counts=True), strict=True):
            if axis == self.n_axes:
                constant = int(count)
            else:
                parts.append((int(axis), int(count) // units[axis]))
        return Form(constant, tuple(parts))


def form_matrix(forms: Sequence[Form], n_axes: int) -> tuple[Tensor, Tensor]:
    """c of shape (forms,) and m of shape (forms, axes), float64.

    >>> form_matrix([Form(2, ((1, 3),))], 2)
    (tensor([2.], dtype=torch.float64), tensor([[0., 3.]], dtype=torch.float64))
    """
    constants = torch.tensor([form.constant for form in forms], dtype=torch.float64)
    matrix = torch.zeros(len(forms), n_axes, dtype=torch.float64)
    for row, form in enumerate(forms):
        for axis, count in form.parts:
            matrix[row, axis] = count
    return constants, matrix
