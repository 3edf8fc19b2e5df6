"""A network written out as a ``torch.fx`` graph, in which the numbers of its code can be seen."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from ..mutables import Mutable
from .trace import evaluated

__all__ = ["graph_module", "graph_of"]

_CONTAINERS = ("torch.nn.modules.module", "torch.nn.modules.container")
_DROPOUTS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}
_CONSTANTS = "_constants"


def graph_of(
    model: nn.Module, args: Sequence[Any] | None = None, leaves: Sequence[type[nn.Module]] = ()
) -> fx.GraphModule | None:
    """The forward of a model as a graph; None where it cannot be written down (it branches on values, say).

    The graph shares modules and parameters with the model, under their names, and has its training flags. Layers of
    torch, subclasses of them, mutables and ``leaves`` stay modules; every other module is written out. A forward that
    does other things in train mode than in eval mode gives None too; dropout alone becomes an ``nn.Dropout``.
    ``args``: an input on which graph and model must agree in eval mode, or there is None: a forward that asks
    ``isinstance(x, tuple)`` may be written down wrongly.

    >>> graph = graph_of(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    >>> [node.op for node in graph.graph.nodes], list(graph.state_dict())
    (['placeholder', 'call_module', 'call_module', 'output'], ['0.weight', '0.bias'])
    """
    try:
        in_eval, constants = _traced(model, leaves, training=False)
        in_train, others = _traced(model, leaves, training=True)
    except Exception:  # noqa: BLE001  (the forward is the user's: anything may be raised by it)
        return None
    dropouts = _differences(in_eval, in_train, constants, others)
    if dropouts is None:
        return None
    for name, tensor in constants.items():
        setattr(model, name, tensor)
    try:
        graph = graph_module(model, in_eval)
    finally:
        for name in constants:
            delattr(model, name)
    _move_constants(graph, list(constants))
    for node in dropouts:
        _make_dropout_module(graph, node)
    graph.recompile()
    return graph if args is None or _agree(model, graph, args) else None


def _agree(model: nn.Module, graph: nn.Module, args: Sequence[Any]) -> bool:
    outputs = []
    for network in (model, graph):
        with torch.random.fork_rng(devices=[]), evaluated(network):
            torch.manual_seed(0)
            try:
                outputs.append(network(*pytree.tree_map_only(Tensor, torch.clone, list(args))))
            except Exception:  # noqa: BLE001  (the forward is the user's: anything may be raised by it)
                return False
    (ones, structure), (others, other_structure) = (pytree.tree_flatten(output) for output in outputs)
    return structure == other_structure and all(_alike(a, b) for a, b in zip(ones, others, strict=True))


def _alike(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True))


def graph_module(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A graph with the modules and parameters of ``root``, those that it does not use among them."""
    made = fx.GraphModule(root, graph, class_name=type(root).__name__)
    for path, module in root.named_modules(remove_duplicate=False):
        there: Any = made
        for name in path.split(".") if path else ():
            if name not in there._modules:
                there._modules[name] = nn.Module()
            there = there._modules[name]
        if there is not module:
            _take_tensors(there, module)
            there.training = module.training
    known = {name for name, _ in root.named_buffers(remove_duplicate=False)}
    for path, module in made.named_modules():
        # A tensor that is a plain attribute becomes a buffer; it stays out of the state_dict.
        new = [name for name in module._buffers if f"{path}.{name}".lstrip(".") not in known]
        module._non_persistent_buffers_set.update(new)
    return made


def _take_tensors(taker: nn.Module, owner: nn.Module) -> None:
    for name, parameter in owner._parameters.items():
        taker._parameters.setdefault(name, parameter)
    for name, buffer in owner._buffers.items():
        taker._buffers.setdefault(name, buffer)
        if name in owner._non_persistent_buffers_set:
            taker._non_persistent_buffers_set.add(name)
    for name, module in owner._modules.items():
        if module is None:
            taker._modules.setdefault(name, None)


# --- tracing --------------------------------------------------------------------------------------------------------


class _Pieces(fx.Proxy):
    """What a split returns: as long as its arguments say."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, count: int) -> None:
        super().__init__(node, tracer)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[fx.Proxy]:
        return iter(
            [self.tracer.create_proxy("call_function", operator.getitem, (self, k), {}) for k in range(self.count)]
        )


class _LayerTracer(fx.Tracer):
    """Stops at layers of torch and at subclasses of them, and knows how many pieces a split has."""

    proxy_buffer_attributes = True  # else what is computed from a buffer would be a constant of the graph

    def __init__(self, leaves: Sequence[type[nn.Module]] = ()) -> None:
        super().__init__()
        self.leaves: tuple[type[nn.Module], ...] = (Mutable, *leaves)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = [base.__module__ for base in type(m).__mro__ if base.__module__.startswith("torch.nn.modules")]
        is_layer = any(name not in _CONTAINERS for name in known)
        return is_layer or isinstance(m, self.leaves) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        count = _pieces(node)
        return super().proxy(node) if count is None else _Pieces(node, self, count)


def _pieces(node: fx.Node) -> int | None:
    """How many tensors a split returns, where its arguments say so."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    asked = [*node.args[1:2], *(node.kwargs[key] for key in ("chunks", "split_size_or_sections") if key in node.kwargs)]
    if name == "chunk" and asked and isinstance(asked[0], int):
        return asked[0]
    if name in ("split", "split_with_sizes") and asked and isinstance(asked[0], list | tuple):
        return len(asked[0])
    return None


def _traced(
    model: nn.Module, leaves: Sequence[type[nn.Module]], *, training: bool
) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The graph of one mode and the constant tensors that its forward makes, by the names that the graph has."""
    before = set(vars(model))
    constants: dict[str, Tensor] = {}
    with evaluated(model):
        model.train(training)
        try:
            graph = _LayerTracer(leaves).trace(model)
        finally:
            for name in [name for name in vars(model) if name not in before]:
                constants[name] = vars(model).pop(name)
    graph._tracer_cls = fx.Tracer  # neither it nor the annotations below are known where a pickle is loaded
    for node in graph.nodes:
        node.type = None
    return graph, {name: tensor for name, tensor in constants.items() if isinstance(tensor, Tensor)}


def _differences(
    one: fx.Graph, other: fx.Graph, constants: dict[str, Tensor], others: dict[str, Tensor]
) -> list[fx.Node] | None:
    """The nodes of ``one`` that are dropout with the flag of its mode; None if anything else differs."""
    if len(one.nodes) != len(other.nodes) or list(constants) != list(others):
        return None
    if any(not _same(a, b) for a, b in zip(constants.values(), others.values(), strict=True)):
        return None
    dropouts = []
    for a, b in zip(one.nodes, other.nodes, strict=True):
        if (a.name, a.op, a.target) != (b.name, b.op, b.target):
            return None
        if repr((a.args, a.kwargs)) != repr((b.args, b.kwargs)):
            if a.target not in _DROPOUTS or repr(_without_flag(a)) != repr(_without_flag(b)):
                return None
            dropouts.append(a)
    return dropouts


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def _without_flag(node: fx.Node) -> Any:
    # Functions of torch that were traced have their options by name.
    return node.args, {name: value for name, value in node.kwargs.items() if name != "training"}


def _make_dropout_module(graph: fx.GraphModule, node: fx.Node) -> None:
    options = {name: value for name, value in node.kwargs.items() if name not in ("training", "input")}
    module = _DROPOUTS[node.target](**options)
    module.training = graph.training
    path = f"_{node.name}"
    graph.add_submodule(path, module)
    with graph.graph.inserting_before(node):
        made = graph.graph.call_module(path, (node.args[0] if node.args else node.kwargs["input"],))
    node.replace_all_uses_with(made)
    graph.graph.erase_node(node)


def _move_constants(graph: fx.GraphModule, names: Sequence[str]) -> None:
    """Constant tensors of a forward lie in a module of their own, and not in the ``state_dict``."""
    if not names:
        return
    holder = nn.Module()
    holder.training = graph.training
    for name in names:
        holder.register_buffer(name, graph._buffers.pop(name, None), persistent=False)
    graph.add_module(_CONSTANTS, holder)
    for node in graph.graph.nodes:
        if node.op == "get_attr" and node.target in names:
            node.target = f"{_CONSTANTS}.{node.target}"
