"""A graph in which the numbers of the code are those of the network that is left after a cut."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..errors import OneshotError, UnsupportedModelError
from ..mutables import EveryPath
from .dimensions import Dimensions, Finder
from .fx_graph import graph_module, graph_of
from .labels import dims_of
from .literals import REWRITES, Call, Site
from .operators import Program, Value, _Recorder, plain_attention
from .size_origins import size_origins
from .trace import _Tracer, evaluated

__all__ = ["Rewriter", "graph_of", "rewritten"]


def rewritten(
    graph: fx.GraphModule, args: Sequence[Any], found: Dimensions, kept: Mapping[str, Tensor]
) -> fx.GraphModule:
    """``graph`` with the numbers of the network in which only the ``kept`` units are left.

    ``found``: of ``find_dimensions(..., literals=True)`` on this graph. ``kept``: label of a group -> flags of its
    units. Only the graph is changed; modules and parameters are those of ``graph``, to be cut by ``cut``.
    UnsupportedModelError where all positions that the code takes from a tensor are gone.

    >>> from .operators import trace_operators
    >>> from .dimensions import find_dimensions
    >>> class Half(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.a, self.b, self.c = nn.Linear(2, 6), nn.Linear(4, 3), nn.Linear(2, 3)
    ...     def forward(self, x):
    ...         x = self.a(x)
    ...         return self.b(x[:, :4]) + self.c(x[:, 4:])
    >>> graph, x = graph_of(Half()), (torch.ones(1, 2),)
    >>> found = find_dimensions([trace_operators(graph, x)], graph, {}, literals=True)
    >>> [(group.label, group.units) for group in found.groups]
    [('a', 4), ('a:2', 2)]
    >>> small = rewritten(graph, x, found, {"a": torch.tensor([True, False, False, True])})
    >>> [node.args[1][1] for node in small.graph.nodes if node.name.startswith("getitem")]
    [slice(0, 2, None), slice(2, 4, None)]
    """
    return Rewriter(graph, args, found)(kept)


class Rewriter:
    """``rewritten`` for many choices of what is kept: it remembers which units each number of the code is about."""

    def __init__(self, graph: fx.GraphModule, args: Sequence[Any], found: Dimensions) -> None:
        self.graph, self.found = graph, found
        program, self.calls = _recorded(graph, args)
        finder = Finder(graph, literals=True)
        self.known = finder.follow(program)
        self.integers = program.integers
        self.origins = size_origins(graph.graph, self.calls)
        self.starts = dict(zip(finder.names, finder.starts, strict=True))
        self.atoms = len(finder.labels.units.parents)

    def __call__(self, kept: Mapping[str, Tensor]) -> fx.GraphModule:
        alive = self._alive(kept)

        def flags(value: Value, dim: int) -> Tensor | None:
            left = np.ones(value.shape[dim], bool)
            for label in self.known[value.number].labels if value.number in self.known else ():
                if dim in dims_of(label):
                    left &= np.moveaxis(alive[label.numpy()], dim, 0).reshape(len(left), -1).any(1)
            return None if left.all() else torch.from_numpy(left)

        def stale(node: fx.Node) -> bool:
            # What also depends on a size that is not cut, that of the batch say, has to be computed anew.
            origins = self.origins.get(olds[node], frozenset())
            sure = all(value.number in self.known and d in self.known[value.number].varying() for value, d in origins)
            return sure and any(flags(value, d) is not None for value, d in origins)

        graph = copy.deepcopy(self.graph.graph)
        olds = dict(zip(graph.nodes, self.graph.graph.nodes, strict=True))
        for new, old in olds.items():
            call = self.calls.get(old)
            if call is not None:
                call = self._unflattened(new, call)
                rewrite = REWRITES.get(_name(new))
                if rewrite is not None:
                    rewrite(Site(new, call, flags, self.integers, stale))
        graph.lint()
        return graph_module(self.graph, graph)

    def _alive(self, kept: Mapping[str, Tensor]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        alive = np.ones(self.atoms, bool)
        for group in self.found.groups:
            gone = (
                ~kept[group.label].bool().cpu() if group.label in kept else torch.zeros(group.units, dtype=torch.bool)
            )
            for dimension, indices in group.members.items():
                if dimension in self.starts:
                    alive[self.starts[dimension] + indices[gone].flatten().numpy()] = False
        return alive

    def _unflattened(self, node: fx.Node, call: Call) -> Call:
        """nn.Unflatten has its sizes in the module: as a method it has them as arguments."""
        module = self.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if type(module) is not nn.Unflatten or not isinstance(module.dim, int):
            return call
        sizes = (module.dim, tuple(module.unflattened_size))
        node.op, node.target, node.args, node.kwargs = "call_method", "unflatten", (node.args[0], *sizes), {}
        return call._replace(args=(call.args[0], *sizes))


def _name(node: fx.Node) -> str:
    """Of the function or method that a node calls."""
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


class _Recording(fx.Interpreter):
    """Runs a graph node by node and notes the tensors of each by the numbers that a recorder gives them."""

    def __init__(self, graph: fx.GraphModule, recorder: _Recorder) -> None:
        super().__init__(graph)
        self.recorder = recorder
        self.calls: dict[fx.Node, Call] = {}

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self._numbered(self.fetch_args_kwargs_from_env(n))  # what works in place has numbers of its own
        result = super().run_node(n)
        if n.op in ("call_function", "call_method", "call_module"):
            self.calls[n] = Call(args, kwargs, self._numbered(result))
        return result

    def _numbered(self, tree: Any) -> Any:
        return pytree.tree_map_only(Tensor, self.recorder._value, tree)


def _recorded(graph: fx.GraphModule, args: Sequence[Any]) -> tuple[Program, dict[fx.Node, Call]]:
    """``trace_operators(graph, args)``, and what each node got and returned."""
    tracer = _Tracer(graph, lambda _: False, keep=False)
    recorder = _Recorder(graph, tracer)
    recording = _Recording(graph, recorder)
    try:
        recorder.attach(graph)
        tracer.attach()
        with torch.random.fork_rng(devices=[]), evaluated(graph, EveryPath()), plain_attention(), recorder:
            recorder.take_inputs(args)
            recording.run(*args)
    except OneshotError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"the graph of {type(graph).__name__} does not run on its input: {error}"
        ) from error
    finally:
        recorder.remove()
        tracer.remove()
    return recorder.program, recording.calls
