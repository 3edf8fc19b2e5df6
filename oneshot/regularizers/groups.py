"""Groups of weights, and their norms: what a group lasso is about, whatever a group means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ..errors import ConfigurationError

__all__ = [
    "Family",
    "check_family",
    "check_index",
    "group_largest",
    "group_norms",
    "group_sizes",
    "group_sums",
    "inside",
    "of_elements",
    "spread",
    "zero_groups",
]


@final
@dataclass(frozen=True)
class Family:
    """Groups of one kind; no two of them share an element.

    name: what an error calls it ("conv1.weight: output channels"). index: parameter name, as in
    ``model.named_parameters()`` -> int64 tensor, broadcastable to the parameter's shape: the number of the group of
    each element, -1 for none. n: the groups are 0, ..., n - 1. A group may have elements in several parameters.
    """

    name: str
    index: Mapping[str, Tensor]
    n: int


def group_sizes(family: Family, parameters: Mapping[str, Tensor]) -> Tensor:
    """(n,) int64: how many elements each group has, n_g.

    >>> rows = Family("w: rows", {"w": torch.tensor([[0], [1]])}, 2)
    >>> group_sizes(rows, {"w": torch.zeros(2, 5)}).tolist()
    [5, 5]
    """
    sizes: Tensor | None = None
    for name, index in _index(family, parameters):
        each = torch.full_like(index, parameters[name].numel() // max(index.numel(), 1))
        found = _gather(each, index, family.n)
        sizes = found if sizes is None else sizes + found.to(sizes.device)
    return sizes if sizes is not None else torch.zeros(family.n, dtype=torch.int64)


def group_norms(family: Family, parameters: Mapping[str, Tensor]) -> Tensor:
    """(n,) ||w_g||_2 of each group, differentiable; the gradient of a group of zeros is exactly 0.

    Where a square would overflow or vanish, each group is divided by its largest number first. Half precision is
    computed in float32.

    >>> rows = Family("w: rows", {"w": torch.tensor([[0], [1]])}, 2)
    >>> group_norms(rows, {"w": torch.tensor([[3.0, 4.0], [0.0, 0.0]])}).tolist()
    [5.0, 0.0]
    """
    total = _squares(family, parameters, None)
    with torch.no_grad():
        limits = torch.finfo(total.dtype)
        small = total < limits.tiny / limits.eps
        extreme = total > limits.max / 4
        if bool(small.any()):  # zeros, or squares that vanished
            sizes = group_sums(family, {name: parameters[name].detach().abs() for name in family.index})
            extreme = extreme | (small & (sizes.to(small.device) > 0))
    scale = None
    if bool(extreme.any()):
        largest = group_largest(family, parameters)
        scale = torch.where(largest == 0, torch.ones_like(largest), largest)
        total = _squares(family, parameters, scale)
    none = total == 0  # not the square root of 0: its slope is infinite
    norms = torch.where(none, torch.zeros_like(total), torch.where(none, torch.ones_like(total), total).sqrt())
    return norms if scale is None else norms * scale


def group_sums(family: Family, values: Mapping[str, Tensor]) -> Tensor:
    """(n,) the sum of the values of each group; ``values`` have the shapes of the parameters."""
    total: Tensor | None = None
    for name, index in _index(family, values):
        found = _gather(_sum_to(values[name], index.shape), index, family.n)
        total = found if total is None else total + found.to(total.device)
    return total if total is not None else torch.zeros(family.n)


def zero_groups(family: Family, parameters: Mapping[str, Tensor]) -> Tensor:
    """(n,) bool: whether every element of the group is exactly 0."""
    return group_largest(family, parameters) == 0


def spread(values: Tensor, index: Tensor, outside: float) -> Tensor:
    """The value of the group of each element, shaped as ``index``; ``outside`` for elements of no group."""
    known = index >= 0
    found = values[torch.where(known, index, torch.zeros_like(index))]
    return found if bool(known.all()) else torch.where(known, found, torch.full_like(found, outside))


def of_elements(name: str, parameters: Mapping[str, Tensor]) -> Family:
    """The family in which every element is a group of its own."""
    index, n = {}, 0
    for key, parameter in parameters.items():
        numbers = torch.arange(n, n + parameter.numel(), device=parameter.device)
        index[key], n = numbers.view(parameter.shape), n + parameter.numel()
    return Family(name, index, n)


def inside(fine: Family, coarse: Family, parameters: Mapping[str, Tensor]) -> bool | None:
    """Whether each group of ``fine`` that meets groups of ``coarse`` lies in one of them; None if none meet.

    >>> w = {"w": torch.zeros(2, 3)}
    >>> rows, elements = Family("rows", {"w": torch.tensor([[0], [1]])}, 2), of_elements("elements", w)
    >>> inside(elements, rows, w), inside(rows, elements, w)
    (True, False)
    """
    pairs = []
    for name in fine.index.keys() & coarse.index.keys():
        shape = parameters[name].shape
        first, second = (family.index[name].expand(shape).flatten().cpu() for family in (fine, coarse))
        both = (first >= 0) & (second >= 0)
        pairs.append(first[both] * coarse.n + second[both])
    met, counts = torch.cat(pairs).unique(return_counts=True) if pairs else (torch.zeros(0), torch.zeros(0))
    if not len(met):
        return None
    sizes = group_sizes(fine, parameters).cpu()
    return bool((sizes[met.long() // coarse.n] == counts).all())


def check_family(family: Family, parameters: Mapping[str, Tensor]) -> None:
    """ConfigurationError unless the family fits the parameters: names, shapes, and a use for every group."""
    if not family.index:
        raise ConfigurationError(f"groups {family.name!r}: no parameter is in them")
    for name, index in family.index.items():
        if name not in parameters:
            raise ConfigurationError(f"groups {family.name!r}: the model has no parameter {name!r}")
        check_index(f"groups {family.name!r}", name, index, parameters[name])
        if int(index.max()) >= family.n:
            raise ConfigurationError(
                f"groups {family.name!r}: the index of {name} has the group {int(index.max())}, but n={family.n} means "
                f"0 to {family.n - 1}"
            )
    empty = (group_sizes(family, parameters) == 0).nonzero().flatten().tolist()
    if empty:
        raise ConfigurationError(
            f"groups {family.name!r}: n={family.n}, but no element is in group {empty[0]}; number them without gaps"
        )


def check_index(where: str, name: str, index: object, parameter: Tensor) -> None:
    """ConfigurationError unless ``index`` can say the group of each element of ``parameter``."""
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        got = f"dtype {index.dtype}" if isinstance(index, Tensor) else type(index).__name__
        raise ConfigurationError(f"{where}: the index of {name} is {got}, an int64 tensor is needed")
    shape, allowed = tuple(index.shape), tuple(parameter.shape)
    aligned = (1,) * (len(allowed) - len(shape)) + shape
    if len(shape) > len(allowed) or any(a not in (1, b) for a, b in zip(aligned, allowed, strict=True)):
        raise ConfigurationError(
            f"{where}: the index of {name} has shape {shape}, which does not broadcast to {allowed}"
        )
    if not index.numel() or int(index.min()) < -1:
        least = int(index.min()) if index.numel() else "nothing"
        raise ConfigurationError(
            f"{where}: the index of {name} holds {least}; allowed are groups from 0 on, -1 for none"
        )


def _index(family: Family, parameters: Mapping[str, Tensor]) -> Sequence[tuple[str, Tensor]]:
    """Each parameter's index, with as many dimensions as the parameter, on its device."""
    found = []
    for name, index in family.index.items():
        parameter = parameters[name]
        shape = (1,) * (parameter.dim() - index.dim()) + tuple(index.shape)
        found.append((name, index.to(parameter.device).view(shape)))
    return found


def _squares(family: Family, parameters: Mapping[str, Tensor], scale: Tensor | None) -> Tensor:
    """(n,) sum of (w / scale_g)^2 of each group, in float32 at least, on the device of the first parameter."""
    total: Tensor | None = None
    dtype = _dtype(family, parameters)
    for name, index in _index(family, parameters):
        parameter = parameters[name].to(dtype)
        if scale is not None:
            parameter = parameter / spread(scale.to(parameter.device), index, 1.0)
        found = _gather(_sum_to(parameter.square(), index.shape), index, family.n)
        total = found if total is None else total + found.to(total.device)
    return total if total is not None else torch.zeros(family.n)


def _dtype(family: Family, parameters: Mapping[str, Tensor]) -> torch.dtype:
    dtype = torch.float32
    for name in family.index:
        dtype = torch.promote_types(dtype, parameters[name].dtype)
    return dtype


def _sum_to(values: Tensor, shape: torch.Size) -> Tensor:
    """The sum over the dimensions in which ``shape`` has 1."""
    dims = [d for d, (have, want) in enumerate(zip(values.shape, shape, strict=True)) if have != want]
    return values.sum(dims, keepdim=True) if dims else values


def _gather(values: Tensor, index: Tensor, n: int) -> Tensor:
    """(n,) the sum of the values of each group; those of -1 go to a last place that is cut off."""
    places = torch.where(index < 0, torch.full_like(index, n), index).flatten()
    return values.new_zeros(n + 1).index_add(0, places, values.flatten())[:n]


@torch.no_grad()
def group_largest(family: Family, parameters: Mapping[str, Tensor]) -> Tensor:
    """(n,) the largest absolute number of each group, in float32 at least."""
    found = _index(family, parameters)
    largest = torch.zeros(family.n + 1, dtype=_dtype(family, parameters), device=found[0][1].device)
    for name, index in found:
        values = parameters[name].detach().abs()
        dims = [d for d, (have, want) in enumerate(zip(values.shape, index.shape, strict=True)) if have != want]
        values = (values.amax(dims, keepdim=True) if dims else values).flatten().to(largest)
        places = torch.where(index < 0, torch.full_like(index, family.n), index).flatten().to(largest.device)
        largest = largest.scatter_reduce(0, places, values, "amax")
    return largest[: family.n]
