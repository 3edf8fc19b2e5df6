"""Which numbers of a run were computed from the sizes of tensors, and from which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from torch import fx

from .literals import Call
from .operators import Value

__all__ = ["Origins", "size_origins"]

Origins: TypeAlias = frozenset[tuple[Value, int]]
"""Dimensions of tensors."""


def size_origins(graph: fx.Graph, calls: Mapping[fx.Node, Call]) -> dict[fx.Node, Origins]:
    """For every node that gives a number or a shape, the dimensions whose sizes it was computed from.

    ``x.shape[1] // 4`` comes from dimension 1 of x.
    """
    found: dict[fx.Node, Origins] = {}
    shapes: dict[fx.Node, Value] = {}
    for node in graph.nodes:
        call = calls.get(node)
        if call is None or isinstance(call.output, Value):
            continue
        source = call.args[0] if call.args else None
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if isinstance(source, Value) and (name == "size" or (name == "getattr" and call.args[1] == "shape")):
            dim = call.kwargs.get("dim", call.args[1] if name == "size" and len(call.args) > 1 else None)
            if dim is None:
                shapes[node] = source
            found[node] = _dimensions(source, slice(None) if dim is None else dim)
        elif name == "getitem" and node.args[0] in shapes and isinstance(call.args[1], int | slice):
            found[node] = _dimensions(shapes[node.args[0]], call.args[1])
        else:
            found[node] = frozenset().union(*(found.get(n, frozenset()) for n in node.all_input_nodes))
    return found


def _dimensions(value: Value, index: int | slice) -> Origins:
    dims = range(len(value.shape))[index]
    return frozenset((value, d) for d in ([dims] if isinstance(dims, int) else dims))
