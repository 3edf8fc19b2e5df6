"""Which dimensions of which parameters must be cut together, found by following what runs.

Every index of every dimension of every parameter is labelled, the operators of one run are followed in their order
(``dimension_rules``), and what came out as one unit is cut or kept as one. What the code of a network says in numbers
(``x[:, :8]``, ``split([32, 32])``) cannot be seen in a run: a group is a proposal until a cut of it has been tried.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .dimension_rules import Given, is_product, rule_for
from .labels import Label, Labelled, Labels, dims_of
from .operators import Junction, Operator, Program
from .pieces import never_empty
from .trace import Condition
from .units import Atoms

__all__ = ["Dimension", "Dimensions", "Group", "Number", "Widened", "find_dimensions"]


class Dimension(NamedTuple):
    """One dimension of a parameter or buffer, by its name."""

    name: str
    dim: int

    def __str__(self) -> str:
        return f"{self.name}[{self.dim}]"


Members: TypeAlias = Mapping[Dimension, Tensor]


@dataclass(frozen=True)
class Group:
    """Dimensions that are cut together.

    ``members``: for each of them the indices that belong to each unit, int64 of shape (units, m). ``columns``: those
    that a product sums over, at which zeros are the same as absence. ``label``: unique in its network.
    """

    label: str
    units: int
    members: Members
    columns: frozenset[Dimension]

    def indices(self, dimension: Dimension, kept: Tensor) -> Tensor:
        """The indices of a member that belong to the units ``kept``, sorted."""
        return self.members[dimension][kept].flatten().sort().values


class Number(NamedTuple):
    """A size that an operator at ``path`` was given as a number: of dimension ``dim`` of a tensor with ``label``."""

    path: str
    size: int
    label: Label
    dim: int


@dataclass(frozen=True)
class Product:
    """An operator that sums products, with the labels of its tensors, by the number of their value."""

    operator: Operator
    labelled: Mapping[int, Labelled]


@dataclass(frozen=True)
class Widened:
    """A choice, ``label``, between outputs of different ``widths`` (option -> size along ``dim``), padded to one width.

    ``labels``: of the result, that vary along ``dim``.
    """

    label: str
    when: Condition
    widths: Mapping[int, int]
    dim: int
    labels: tuple[Label, ...]

    def lacking(self, place: int) -> frozenset[int]:
        """The options whose output has no such index."""
        return frozenset(option for option, width in self.widths.items() if width <= place)


@dataclass(frozen=True)
class Dimensions:
    """What was found: groups that may be cut, and why other dimensions may not.

    ``numbers``: sizes that the code of a network hands to operators. ``unit_of``: atom -> its unit, counted through the
    groups, or -1. ``products``: what multiplies and sums, in the first program. ``widened``: choices between outputs of
    different widths.
    """

    groups: tuple[Group, ...]
    frozen: Mapping[Dimension, str]
    numbers: tuple[Number, ...]
    unit_of: Atoms
    products: tuple[Product, ...] = ()
    widened: tuple[Widened, ...] = ()

    def renumbered(self, kept: Mapping[str, Tensor]) -> dict[str, dict[int, int]]:
        """Path -> number -> the same number once only the ``kept`` units (group label -> flags) are left.

        A number that stands for dimensions of which one changes and another one does not is taken to be the former;
        one that would have to become two different ones is left out.
        """
        starts = np.cumsum([0, *(group.units for group in self.groups)])
        alive = np.ones(starts[-1] + 1, bool)  # the last one stands for all that is not in a group
        for group, start in zip(self.groups, starts, strict=False):
            if group.label in kept:
                alive[start : start + group.units] = kept[group.label].numpy()
        found: dict[str, dict[int, set[int]]] = {}
        for path, size, label, dim in self.numbers:
            rows = np.moveaxis(alive[self.unit_of[label.numpy()]], dim, 0).reshape(label.shape[dim], -1)
            found.setdefault(path, {}).setdefault(size, set()).add(int(rows.any(1).sum()))
        changed = {path: {n: new - {n} for n, new in of.items()} for path, of in found.items()}
        sure = {path: {n: min(new) for n, new in of.items() if len(new) == 1} for path, of in changed.items()}
        return {path: numbers for path, numbers in sure.items() if numbers}


def find_dimensions(
    programs: Sequence[Program], model: nn.Module, exclude: Mapping[Dimension, str], *, literals: bool = False
) -> Dimensions:
    """The groups of a model, from the programs of its runs (one in eval mode, one in train mode, say).

    ``exclude``: dimensions to keep, with the reason. ``literals``: ``model`` is a graph of ``graph_of``, whose numbers
    will be rewritten to those of the cut network: slices, indices and the pieces of a split then need not stay. Of each
    piece something is left, whatever is cut.

    >>> from oneshot.graph import trace_operators
    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> found = find_dimensions([trace_operators(net, (torch.ones(2, 4),))], net, {})
    >>> [(group.label, group.units, [str(d) for d in group.members]) for group in found.groups]
    [('0', 6, ['0.weight[0]', '0.bias[0]', '2.weight[1]'])]
    >>> found.frozen[Dimension("2.weight", 0)]
    'an output of the network'
    """
    finder = Finder(model, literals)
    for program in programs:
        finder.follow(program)
        finder.products = finder.products or finder.followed
    for dimension, reason in exclude.items():
        finder.freeze(dimension, reason)
    finder.labels.settle_grids()
    return finder.found()


class Finder:
    """Follows programs; parameters have the same labels in all of them."""

    def __init__(self, model: nn.Module, literals: bool = False) -> None:
        self.labels = Labels()
        self.literals = literals
        self.carried: list[Label] = []
        self.names: list[Dimension] = []
        self.starts: list[int] = []
        self.sizes: list[int] = []
        self.of_name: dict[str, Labelled] = {}
        self.numbers: list[Number] = []
        self.products: list[Product] = []
        self.widened: list[Widened] = []
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() or tensor.is_complex():
                self.of_name[name] = self._labelled(name, tensor)

    def _labelled(self, name: str, tensor: Tensor) -> Labelled:
        found = []
        for d, size in enumerate(tensor.shape):
            if size > 1:
                atoms = self.labels.units.fresh(size)
                self.names.append(Dimension(name, d))
                self.starts.append(int(atoms[0]))
                self.sizes.append(size)
                found.append(torch.from_numpy(atoms).reshape([-1 if i == d else 1 for i in range(tensor.dim())]))
        return Labelled(tuple(tensor.shape), tuple(found), weight=True)

    def follow(self, program: Program) -> dict[int, Labelled]:
        """The labels of every value of a program, by its number."""
        self.followed: list[Product] = []
        known = {number: self.of_name[name] for number, name in program.parameters.items() if name in self.of_name}
        for value in program.values:
            if value.maker == "input":
                known[value.number] = Labelled(value.shape, fixed="an input of the network")
        for step in program.steps:
            if isinstance(step, Operator):
                results = self._applied(step, known, program)
            else:
                results = self._joined(step, known, program)
            numbers = [v.number for v in step.outputs] if isinstance(step, Operator) else [step.output]
            known.update(zip(numbers, results, strict=False))
            if isinstance(step, Operator) and is_product(step.name):
                of_step = [value.number for value in (*step.inputs, *step.outputs)]
                self.followed.append(Product(step, {n: known[n] for n in of_step if n in known}))
        for number in program.outputs:
            if number in known:
                self.labels.freeze(known[number].labels, "an output of the network")
        return known

    def _applied(self, step: Operator, known: Mapping[int, Labelled], program: Program) -> list[Labelled]:
        if not any(value.number in known and known[value.number].labels for value in step.inputs):
            sources = [known[value.number].fixed for value in step.inputs if value.number in known]
            fixed = next((source for source in sources if source), "")
            return [Labelled(value.shape, fixed=fixed) for value in step.outputs]
        # What stands in the graph itself has no path; numbers inside of its layers are out of reach.
        given = Given(self.labels, step, known, program.integers, self.literals and not step.path)
        results = rule_for(step.name)(given)
        if self.literals:
            self.carried += [label for result in results for label in result.labels]
        given_numbers = {n for n in pytree.tree_leaves((step.args, step.kwargs)) if type(n) is int and n > 1}
        for result in results:
            self.numbers += [
                Number(step.path, result.shape[d], label, d)
                for label in result.labels
                for d in dims_of(label)
                if result.shape[d] in given_numbers
            ]
        return [*results, *(Labelled(value.shape) for value in step.outputs[len(results) :])]

    def _joined(self, step: Junction, known: Mapping[int, Labelled], program: Program) -> list[Labelled]:
        shape = program.values[step.output].shape
        ways = {n: known.get(n, Labelled(program.values[n].shape)) for n in step.options.values()}
        differing = [d for d, n in enumerate(shape) if any(way.shape[d] != n for way in ways.values())]
        widths = {k: ways[n].shape[d] for d in differing for k, n in step.options.items()}
        for d in differing:
            ways = {n: self._padded(way, d, shape[d]) for n, way in ways.items()}
        joined = self.labels.pointwise(list(ways.values()), f"a choice, {step.label}")
        for d in differing:
            along = tuple(label for label in joined.labels if d in dims_of(label))
            self.widened.append(Widened(step.label, step.when, widths, d, along))
        return [joined]

    def _padded(self, way: Labelled, dim: int, width: int) -> Labelled:
        """Zeros behind the indices of ``dim``: units of nothing, until they meet those of a wider option."""
        if way.shape[dim] == width:
            return way
        labels = list(way.labels)
        if dim not in way.varying():
            # Of the network's input, say: nothing can be cut of what there is, but there is no more than that.
            labels.append(torch.zeros([n if d == dim else 1 for d, n in enumerate(way.shape)], dtype=torch.int64))
            longer = [len(labels) - 1]
        else:
            longer = [i for i, label in enumerate(labels) if dim in dims_of(label)]
        for i in longer:
            shape = [width - n if d == dim else n for d, n in enumerate(labels[i].shape)]
            new = torch.from_numpy(self.labels.units.fresh(math.prod(shape))).reshape(shape)
            labels[i] = torch.cat([labels[i], new], dim)
        shape_after = tuple(width if d == dim else n for d, n in enumerate(way.shape))
        return Labelled(shape_after, tuple(labels), fixed=way.fixed)

    def freeze(self, dimension: Dimension, reason: str) -> None:
        if dimension in self.names:
            self.labels.units.freeze(self._atoms(self.names.index(dimension)), reason)

    def _atoms(self, place: int) -> Atoms:
        return np.arange(self.starts[place], self.starts[place] + self.sizes[place])

    # ---- what came out -----------------------------------------------------------------------------------------

    def found(self) -> Dimensions:
        units = self.labels.units
        self._freeze_whole_dimensions()
        # A dimension that nothing ran over belongs to a layer that is never called: it stays.
        frozen, members = self._frozen(), self._members()
        columns = self._columns()
        found: list[Group] = []
        taken: set[str] = set()
        unit_of = np.full(len(units.parents), -1)
        count = 0
        optional = self._optional()
        for roots in never_empty(members.alike(), self._pieces(set(members.roots.tolist()))):
            dimensions = {self.names[place]: torch.from_numpy(rows) for place, rows in members.of(roots).items()}
            masked = frozenset(d for d in dimensions if d in columns)
            if not masked or (len(roots) < 2 and roots[0] not in optional):
                reason = "one unit, which has to stay" if masked else "nothing that runs sums over it"
                frozen.update({d: reason for d in dimensions if d not in frozen})
                continue
            found.append(Group(_label(dimensions, masked, taken), len(roots), dimensions, masked))
            unit_of[roots] = np.arange(count, count + len(roots))
            count += len(roots)
        searchable = {d for group in found for d in group.members}
        left = {d: why for d, why in frozen.items() if d not in searchable}
        return Dimensions(
            tuple(found),
            left,
            tuple(self.numbers),
            unit_of[units.roots(np.arange(len(unit_of)))],
            tuple(self.products),
            tuple(self.widened),
        )

    def _frozen(self) -> dict[Dimension, str]:
        """The dimensions of which something is frozen, with the reason of its first index."""
        units, frozen = self.labels.units, {}
        for place, dimension in enumerate(self.names):
            codes = units.frozen[units.roots(self._atoms(place))]
            if codes.any():
                frozen[dimension] = units.texts[codes[codes > 0][0] - 1]
        return frozen

    def _members(self) -> _Members:
        """Of every unit that may be cut, the indices of each dimension."""
        sizes = np.asarray(self.sizes, np.int64)
        places = np.repeat(np.arange(len(sizes)), sizes)
        indices = np.concatenate([np.arange(n) for n in self.sizes]) if self.sizes else np.zeros(0, np.int64)
        roots = self.labels.units.roots(np.repeat(np.asarray(self.starts, np.int64), sizes) + indices)
        free = self.labels.units.frozen[roots] == 0
        return _Members.of_atoms(roots[free], places[free], indices[free])

    def _pieces(self, members: Container[int]) -> set[frozenset[int]]:
        """The units of every tensor of the runs all of whose units could be cut."""
        found = {frozenset(np.unique(self.labels.units.roots(label.numpy())).tolist()) for label in self.carried}
        return {piece for piece in found if all(root in members for root in piece)}

    def _freeze_whole_dimensions(self) -> None:
        """A unit that is the whole of some dimension cannot be cut: it would be empty."""
        units = self.labels.units
        for place in range(len(self.names)):
            roots = units.roots(self._atoms(place))
            if bool((roots == roots[0]).all()):
                units.freeze(roots[:1], f"one unit is the whole of {self.names[place]}")

    def _optional(self) -> set[int]:
        """The units that only the wider options of a choice have: these may go even where there is one of them."""
        found: set[int] = set()
        for widened in self.widened:
            for label in widened.labels:
                of_places = np.moveaxis(self.labels.units.roots(label.numpy()), widened.dim, 0)
                found.update(np.unique(of_places[min(widened.widths.values()) :]).tolist())
        return found

    def _columns(self) -> set[Dimension]:
        starts = np.asarray(self.starts)
        atoms = np.unique(np.concatenate(self.labels.summed)) if self.labels.summed else np.zeros(0, np.int64)
        return {self.names[i] for i in np.unique(np.searchsorted(starts, atoms, side="right") - 1)}


class _Members(NamedTuple):
    """The units by their roots, ascending: where the places and indices of each begin, and how many there are."""

    roots: Atoms
    begin: Atoms
    length: Atoms
    places: Atoms
    indices: Atoms

    @staticmethod
    def of_atoms(roots: Atoms, places: Atoms, indices: Atoms) -> _Members:
        """From the root, the place of the dimension and the index of every atom."""
        order = np.lexsort((indices, places, roots))
        found, begin, length = np.unique(roots[order], return_index=True, return_counts=True)
        return _Members(found, begin, length, places[order], indices[order])

    def alike(self) -> list[list[int]]:
        """The units that have equally many indices of the same dimensions, in the order of the first of each."""
        groups: dict[bytes, list[int]] = {}
        for root, begin, length in zip(self.roots.tolist(), self.begin.tolist(), self.length.tolist(), strict=True):
            groups.setdefault(self.places[begin : begin + length].tobytes(), []).append(root)
        return list(groups.values())

    def of(self, roots: Sequence[int]) -> dict[int, Atoms]:
        """Place -> indices of each unit, of shape (units, m), of units that are alike."""
        rows = np.searchsorted(self.roots, np.asarray(roots))
        atoms = self.begin[rows][:, None] + np.arange(self.length[rows[0]])
        places, indices = self.places[atoms[0]], self.indices[atoms]
        return {int(place): np.ascontiguousarray(indices[:, places == place]) for place in np.unique(places)}


def _label(dimensions: Mapping[Dimension, Tensor], columns: frozenset[Dimension], taken: set[str]) -> str:
    """The path of the first layer that makes these units, and a number where it makes several groups of them."""
    makers = [d for d in dimensions if d not in columns and d.name.rpartition(".")[2] == "weight"]
    name = (makers or list(dimensions))[0].name
    path = name.rpartition(".")[0] or name
    label, count = path, 1
    while label in taken:
        count += 1
        label = f"{path}:{count}"
    taken.add(label)
    return label
