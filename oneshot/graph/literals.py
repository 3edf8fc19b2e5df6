"""The numbers in the code of a network, as they are once some positions of its dimensions are gone.

A table from the name of a function or method to what becomes of its arguments. A slice becomes the slice of what is
left of it, the sizes of a ``view`` those of its result, and so on.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx

from ..errors import UnsupportedModelError
from .operators import Value

__all__ = ["REWRITES", "Call", "Flags", "Site"]

Flags: TypeAlias = Callable[[Value, int], Tensor | None]
"""Which positions of a dimension are left, bool of its size; None if all of them are."""


class Call(NamedTuple):
    """What a node of a graph got and returned in a run, with ``Value``s in the place of tensors."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any


class Site:
    """A node that may be changed, what it got in the run, and which positions are left of that.

    ``stale``: whether a node gives a number that was computed from sizes that become smaller.
    """

    def __init__(
        self,
        node: fx.Node,
        call: Call,
        flags: Flags,
        integers: Mapping[int, Tensor],
        stale: Callable[[fx.Node], bool] = lambda _: False,
    ) -> None:
        self.node, self.call, self.flags, self.integers, self.stale = node, call, flags, integers, stale

    @property
    def source(self) -> Any:
        """The first argument, a Value if that is a tensor."""
        return self.call.args[0] if self.call.args else self.call.kwargs.get("input")

    @property
    def source_node(self) -> Any:
        return self.node.args[0] if self.node.args else self.node.kwargs["input"]

    def given(self, place: int, name: str, default: Any = None) -> Any:
        """An argument of the run."""
        return self.call.args[place] if len(self.call.args) > place else self.call.kwargs.get(name, default)

    def change(self, place: int, name: str, value: Any) -> None:
        if len(self.node.args) > place:
            self.node.update_arg(place, value)
        else:
            self.node.update_kwarg(name, value)

    def replace(self, function: Callable[..., Any], *args: Any) -> None:
        self.node.op, self.node.target = "call_function", function
        self.node.args, self.node.kwargs = args, {}

    def size(self, value: Value, dim: int) -> int:
        """Of a dimension, once positions are gone."""
        flags = self.flags(value, dim)
        return value.shape[dim] if flags is None else int(flags.sum())

    def left(self, flags: Tensor, positions: Sequence[int]) -> list[int]:
        """The new places of those of some positions that are left; UnsupportedModelError if none is."""
        ranks = (flags.cumsum(0) - 1).tolist()
        found = [ranks[p] for p in positions if flags[p]]
        if positions and not found:
            raise UnsupportedModelError(
                f"the code takes positions {_short(positions)} of {len(flags)} in '{self.node.format_node()}', and all "
                "of them are removed; keep one of them, or exclude the layer that makes them"
            )
        return found


def _short(positions: Sequence[int]) -> str:
    return f"{list(positions[:6])}{' and others' if len(positions) > 6 else ''}"


# --- parts of a dimension -------------------------------------------------------------------------------------------


def _getitem(site: Site) -> None:
    """``x[...]``: ints, slices and vectors, by the dimension that each of them is of."""
    source = site.source
    if not isinstance(source, Value):
        return
    index, raw = site.call.args[1], site.node.args[1]
    entries = index if isinstance(index, tuple) else (index,)
    new = list(raw) if isinstance(raw, tuple) else [raw] if not isinstance(index, tuple) else list(index)
    widths = [_width(entry) for entry in entries]
    dim = 0
    changed = False
    for place, (entry, width) in enumerate(zip(entries, widths, strict=True)):
        flags = site.flags(source, dim) if width == 1 else None
        if flags is not None:
            new[place] = _entry(site, entry, dim, flags)
            changed = True
        dim += len(source.shape) - sum(widths) if entry is Ellipsis else width
    if changed:
        site.node.update_arg(1, tuple(new))


def _width(entry: Any) -> int:
    """How many dimensions an entry of an index is of; an ellipsis counts as 0."""
    if entry is None or entry is Ellipsis or isinstance(entry, bool):
        return 0
    return len(entry.shape) if isinstance(entry, Value) and entry.dtype is torch.bool else 1


def _entry(site: Site, entry: Any, dim: int, flags: Tensor) -> Any:
    if isinstance(entry, slice):
        return _slice(site, entry, dim, flags)
    tensor = site.integers.get(entry.number) if isinstance(entry, Value) else torch.as_tensor(entry)
    if tensor is None or tensor.dim() > 1:
        raise UnsupportedModelError(
            f"'{site.node.format_node()}' indexes a dimension that is cut by something else than a constant vector"
        )
    tensor = tensor.cpu()
    positions = tensor.nonzero().flatten() if tensor.dtype is torch.bool else tensor % len(flags)
    if tensor.dim() == 0:
        return site.left(flags, [int(positions)])[0]
    # A list also where a slice would do: it stays a copy, into which the code may write.
    return site.left(flags, positions.tolist())


def _slice(site: Site, entry: slice, dim: int, flags: Tensor) -> slice:
    places = site.left(flags, range(len(flags))[entry])
    if not places or places == list(range(places[0], places[-1] + 1)):
        return slice(places[0], places[-1] + 1) if places else slice(0, 0)
    # With steps. On its own, since a list beside other lists in one index means something else.
    with site.node.graph.inserting_before(site.node):
        index: Any = (*[slice(None)] * dim, places)
        taken = site.node.graph.call_function(operator.getitem, (site.source_node, index))
    site.node.update_arg(0, taken)
    return slice(None)


def _narrow(site: Site) -> None:
    dim, start, length = site.given(1, "dim"), site.given(2, "start"), site.given(3, "length")
    dim %= len(site.source.shape)
    flags = site.flags(site.source, dim)
    if flags is not None and isinstance(start, int):
        places = site.left(flags, range(len(flags))[start % len(flags) :][:length])
        site.change(2, "start", places[0] if places else 0)
        site.change(3, "length", len(places))


def _select(site: Site) -> None:
    dim = site.given(1, "dim") % len(site.source.shape)
    flags = site.flags(site.source, dim)
    if flags is not None:
        site.change(2, "index", _entry(site, site.given(2, "index"), dim, flags))


def _index_select(site: Site) -> None:
    dim = site.given(1, "dim") % len(site.source.shape)
    flags = site.flags(site.source, dim)
    if flags is not None:
        places = _entry(site, site.given(2, "index"), dim, flags)
        site.replace(operator.getitem, site.source_node, (*[slice(None)] * dim, places))


def _split(site: Site) -> None:
    """chunk, split, tensor_split: pieces of the lengths that are left."""
    dim = site.given(2, "dim", 0) % len(site.source.shape)
    if all(site.flags(piece, dim) is None for piece in site.call.output):
        return
    lengths = []
    for piece in site.call.output:
        flags = site.flags(piece, dim)
        if flags is not None:
            site.left(flags, range(len(flags)))  # raises where nothing is
        lengths.append(site.size(piece, dim))
    site.replace(torch.split, site.source_node, lengths, dim)


def _pad(site: Site) -> None:
    """A negative amount crops: as many positions as are left of those."""
    amounts, rank = list(site.given(1, "pad")), len(site.source.shape)
    if all(n >= 0 for n in amounts):
        return
    raw = site.node.args[1] if len(site.node.args) > 1 else site.node.kwargs["pad"]
    new = list(raw) if isinstance(raw, list | tuple) else list(amounts)
    for place, n in enumerate(amounts):
        flags = site.flags(site.source, rank - 1 - place // 2)
        if n < 0 and flags is not None:
            new[place] = -int((flags[:-n] if place % 2 == 0 else flags[n:]).sum())
    site.change(1, "pad", new)


# --- sizes ----------------------------------------------------------------------------------------------------------


def _sized(site: Site) -> None:
    """view, reshape, expand: a number for each dimension of the result."""
    node, call = site.node, site.call
    name = next((key for key in ("shape", "size") if key in node.kwargs), None)
    single = len(node.args) == 2 and not isinstance(call.args[1], int)
    raw: Any = node.kwargs[name] if name is not None else node.args[1] if single else node.args[1:]
    sizes = call.kwargs[name] if name is not None else call.args[1] if single else call.args[1:]
    if not isinstance(raw, list | tuple) or len(sizes) != len(call.output.shape):
        return  # the size of another tensor, or a view as another dtype
    new = tuple(_new_sizes(site, raw, sizes, 0))
    if name is not None:
        node.update_kwarg(name, new)
    else:
        node.args = (node.args[0], new) if single else (node.args[0], *new)


def _new_sizes(site: Site, raw: Sequence[Any], sizes: Sequence[int], first: int) -> list[Any]:
    """``sizes`` of the run for the dimensions from ``first`` on; ``raw``: as the code has them."""
    output = site.call.output
    new = []
    for d, (written, size) in enumerate(zip(raw, sizes, strict=True), first):
        changed = site.flags(output, d) is not None or (isinstance(written, fx.Node) and site.stale(written))
        new.append(site.size(output, d) if changed and size != -1 else written)
    return new


def _unflatten(site: Site) -> None:
    raw = site.node.args[2] if len(site.node.args) > 2 else site.node.kwargs["sizes"]
    if isinstance(raw, list | tuple):
        dim = site.given(1, "dim") % len(site.source.shape)
        site.change(2, "sizes", tuple(_new_sizes(site, raw, site.given(2, "sizes"), dim)))


def _conv(site: Site) -> None:
    """Groups are cut as wholes."""
    groups, out = site.given(6, "groups", 1), site.call.output
    if groups > 1 and site.flags(out, 1) is not None:
        site.change(6, "groups", groups * site.size(out, 1) // out.shape[1])


def _arithmetic(site: Site) -> None:
    """``x / x.shape[1] ** 0.5``: numbers that are no sizes stay what they were."""
    if not isinstance(site.call.output, Value):
        return
    for place, (argument, number) in enumerate(zip(site.node.args, site.call.args, strict=True)):
        if isinstance(argument, fx.Node) and isinstance(number, int | float) and site.stale(argument):
            site.node.update_arg(place, number)


def _group_norm(site: Site) -> None:
    out = site.call.output
    if site.flags(out, 1) is not None:
        site.change(1, "num_groups", site.given(1, "num_groups") * site.size(out, 1) // out.shape[1])


REWRITES: dict[str, Callable[[Site], None]] = {
    "getitem": _getitem,
    "narrow": _narrow,
    "select": _select,
    "index_select": _index_select,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk"), _split),
    "pad": _pad,
    **dict.fromkeys(("view", "reshape", "expand", "broadcast_to"), _sized),
    "unflatten": _unflatten,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv),
    "group_norm": _group_norm,
    **dict.fromkeys(("add", "sub", "mul", "div", "truediv", "pow"), _arithmetic),
}
