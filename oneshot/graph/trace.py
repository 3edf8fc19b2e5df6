"""Follow one run of a search model along all its paths, and say of each module call when it happens.

A ``Condition`` maps labels to the options under which something happens; it holds when every label's decision
is among them. Labels are independent variables, so P(condition) = prod_label sum_{o in options} p_label(o);
mutables of one label are one variable, also when one of them is inside a candidate of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import OneshotError, UnsupportedModelError
from ..mutables import EveryPath, LayerChoice, Mutable, Repeat, Sampler, decisions, set_sampler

__all__ = [
    "Call",
    "Condition",
    "Operation",
    "evaluated",
    "intersect",
    "parameter_conditions",
    "tensor_conditions",
    "tensors_of",
    "trace_calls",
    "trace_operations",
    "undecided_inside",
]

Condition = Mapping[str, frozenset[int]]


@dataclass(frozen=True)
class Call:
    """One call of a module: where, on what, and under which decisions it happens.

    ``number``: of the call of an undecided mutable, in the order of the run; -1 for other modules.
    ``parent``: the innermost undecided mutable that made this call, as the number of its own call and those of its
    options under which it makes it; None outside all mutables.
    """

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    when: Condition
    number: int = -1
    parent: tuple[int, frozenset[int]] | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the first tensor the module was called with; UnsupportedModelError if there was none."""
        return self._shape((self.args, dict(self.kwargs)), "is called without a tensor")

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the first tensor it returned; UnsupportedModelError if there was none."""
        return self._shape(self.output, "returns no tensor")

    def _shape(self, tree: Any, problem: str) -> tuple[int, ...]:
        for leaf in pytree.tree_leaves(tree):
            if isinstance(leaf, Tensor):
                return tuple(leaf.shape)
        raise UnsupportedModelError(
            f"{self.path or 'the network'} ({type(self.module).__name__}) {problem}: its cost depends on a shape. "
            "Hand the tensor it works on through its forward"
        )


@dataclass(frozen=True)
class Operation:
    """One call of an operator of torch outside of all units: on what, and under which decisions it happens.

    ``name``: as torch writes it, such as 'aten::mm'; ``path``: of the innermost module that was running. Tensors are
    on the meta device: only their shapes survive.
    """

    name: str
    path: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    when: Condition


def intersect(one: Condition, other: Condition) -> Condition | None:
    """The condition that both hold, None when they never do.

    >>> both = intersect({"a": frozenset({0, 1})}, {"a": frozenset({1}), "b": frozenset({2})})
    >>> both == {"a": {1}, "b": {2}}, intersect({"a": frozenset({0})}, {"a": frozenset({1})})
    (True, None)
    """
    both = dict(one)
    for label, options in other.items():
        both[label] = both[label] & options if label in both else options
        if not both[label]:
            return None
    return both


def trace_calls(
    model: nn.Module, args: Sequence[Any], is_unit: Callable[[nn.Module], bool], *, keep: bool = False
) -> list[Call]:
    """Run ``model(*args)`` once along every path, in eval mode without grad, and return the calls of its units.

    ``is_unit(module)``: whether calls of this module are wanted. Calls inside a unit are not reported, unless the
    unit is a mutable. ``keep``: keep the tensors of each call; else only their shapes survive, as tensors on the
    meta device. A call that can never happen (its conditions contradict each other) is left out. The model and the
    random numbers of torch on the CPU are afterwards as they were.
    """
    tracer = _Tracer(model, is_unit, keep)
    tracer.run(args)
    return tracer.calls


def trace_operations(
    model: nn.Module,
    args: Sequence[Any],
    is_unit: Callable[[nn.Module], bool],
    is_wanted: Callable[[str], bool],
) -> tuple[list[Call], list[Operation]]:
    """``trace_calls``, and of the operators that run outside of all units those that are wanted by their name.

    These are the operators that a kernel is chosen for, below the functions of Python: ``x @ w``, ``F.linear`` and
    ``torch.einsum`` are all seen as the matrix products that they come to.
    """
    tracer = _Tracer(model, is_unit, keep=False)
    watch = _Watch(tracer, is_wanted)
    tracer.run(args, watch)
    return tracer.calls, watch.operations


@dataclass
class _Frame:
    """An entered option or mutable: what holds in it, and the children a mutable will call, in this order."""

    when: Condition | None
    parent: tuple[int, frozenset[int]] | None
    number: int = -1
    children: Sequence[_Child] = ()
    called: int = 0


class _Tracer:
    """The hooks of one traced run. ``stack`` holds a frame for each entered mutable or option."""

    def __init__(self, model: nn.Module, is_unit: Callable[[nn.Module], bool], keep: bool) -> None:
        self.model, self.is_unit, self.keep = model, is_unit, keep
        self.children = _children_of(model)
        self.calls: list[Call] = []
        self.stack = [_Frame({}, None)]
        self.entered = 0
        self.inside = 0
        self.handles: list[Any] = []

    def run(self, args: Sequence[Any], watch: _Watch | None = None) -> None:
        try:
            self.attach()
            if watch is not None:
                watch.attach(self.model, self.handles)
            with torch.random.fork_rng(devices=[]), evaluated(self.model, EveryPath()), watch or nullcontext():
                _run(self.model, args)
        finally:
            self.remove()

    def attach(self) -> None:
        followed = {*self.children, *(id(child.module) for row in self.children.values() for child in row)}
        # What the user's own hooks do belongs to their module: they run after these enter, and before these leave.
        for path, module in self.model.named_modules():
            if self.is_unit(module):
                self.handles.append(module.register_forward_pre_hook(self._enter_unit, prepend=True))
                self.handles.append(module.register_forward_hook(partial(self._report, path), with_kwargs=True))
            if id(module) in followed:
                self.handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
            if id(module) in followed:
                self.handles.append(module.register_forward_hook(self._leave))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        top = self.stack[-1]
        when, parent = top.when, top.parent
        # A mutable calls its children one after the other, each once. By their place in that row, and not by what
        # they are: one module may be several candidates, and may be called from elsewhere too, without an option.
        if top.called < len(top.children) and top.children[top.called].module is module:
            child = top.children[top.called]
            top.called += 1
            when = None if when is None else intersect(when, {child.label: child.options})
            parent = (top.number, child.options)
        frame = _Frame(when, parent)
        if id(module) in self.children:
            frame.number, frame.children = self.entered, self.children[id(module)]
            self.entered += 1
        self.stack.append(frame)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()

    def _enter_unit(self, module: nn.Module, args: Any) -> None:
        self.inside += not isinstance(module, Mutable)

    def _report(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.inside -= not isinstance(module, Mutable)
        top = self.stack[-1]
        if self.inside or top.when is None:
            return
        if not self.keep:
            args, kwargs, output = pytree.tree_map_only(Tensor, _shape_only, (args, kwargs, output))
        number = top.number if isinstance(module, Mutable) else -1
        self.calls.append(Call(path, module, args, kwargs, output, top.when, number, top.parent))


class _Watch(TorchDispatchMode):
    """Notes the wanted operators of a traced run, while no unit runs."""

    def __init__(self, tracer: _Tracer, is_wanted: Callable[[str], bool]) -> None:
        super().__init__()
        self.tracer, self.is_wanted = tracer, is_wanted
        self.paths = [""]
        self.operations: list[Operation] = []

    def attach(self, model: nn.Module, handles: list[Any]) -> None:
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(partial(self._enter, path), prepend=True))
            handles.append(module.register_forward_hook(self._leave))

    def _enter(self, path: str, module: nn.Module, args: Any) -> None:
        self.paths.append(path)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.paths.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # In inference mode an operator that is made of others arrives in one piece.
        with self:
            output = func.decompose(*args, **kwargs)
        if output is not NotImplemented:
            return output
        output = func(*args, **kwargs)
        name = func.name().partition(".")[0]
        when = self.tracer.stack[-1].when
        if not self.tracer.inside and when is not None and self.is_wanted(name):
            args, kwargs, shapes = pytree.tree_map_only(Tensor, _shape_only, (args, kwargs, output))
            self.operations.append(Operation(name, self.paths[-1], args, kwargs, shapes, when))
        return output


def parameter_conditions(model: nn.Module) -> list[tuple[nn.Parameter, list[Condition]]]:
    """Every weight of a search model with the conditions under which it is in the fixed model.

    It is there when any of the conditions holds: a module that stands in two places has two of them.
    """
    found = tensor_conditions(model)
    return [(tensor, conditions) for tensor, conditions in found if isinstance(tensor, nn.Parameter)]


def tensor_conditions(model: nn.Module) -> list[tuple[Tensor, list[Condition]]]:
    """``parameter_conditions`` of the buffers too, after the parameters of their module."""
    children = _children_of(model)
    conditions: dict[int, tuple[Tensor, list[Condition]]] = {}

    def visit(module: nn.Module, when: Condition) -> None:
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and not (isinstance(module, Mutable) and name == "alpha"):
                conditions.setdefault(id(tensor), (tensor, []))[1].append(when)
        if id(module) not in children:
            for inner in module.children():
                visit(inner, when)
            return
        for child in children[id(module)]:
            both = intersect(when, {child.label: child.options})
            if both is not None:
                visit(child.module, both)

    visit(model, {})
    return list(conditions.values())


def undecided_inside(module: nn.Module) -> str | None:
    """The first undecided choice between layers inside a module, as errors name it; None if there is none.

    >>> undecided_inside(nn.Sequential(LayerChoice([nn.ReLU(), nn.Tanh()], label="act")))
    "LayerChoice(label='act') of [0, 1]"
    """
    inner = (m for m in module.modules() if isinstance(m, LayerChoice | Repeat) and m.decided is None)
    return next((m.describe() for m in inner), None)


@contextmanager
def evaluated(model: nn.Module, sampler: Sampler | None = None, *, training: bool = False) -> Iterator[None]:
    """Eval mode without grad, under ``sampler``; modes, samplers and draws are put back afterwards.

    ``training``: leave the modes as they are.
    """
    modes = [(module, module.training) for module in model.modules()]
    mutables = [m for m in model.modules() if isinstance(m, Mutable)]
    states = [(m, m.sampler, m.drawn, m.alpha_at_draw) for m in mutables]
    try:
        if not training:
            model.eval()
        if sampler is not None:
            set_sampler(model, sampler)
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for m, *state in states:
            m.sampler, m.drawn, m.alpha_at_draw = state


def _run(model: nn.Module, args: Sequence[Any]) -> None:
    try:
        model(*args)
    except OneshotError:
        raise
    except Exception as error:
        shapes = [tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__ for a in args]
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run on an input of shape {shapes}: {type(error).__name__}: {error}. "
            "Give the shape of one real batch as dummy_input, or, to PIT, that of one sample as input_shape"
        ) from error


class _Child(NamedTuple):
    """A module that a mutable calls, and the options of its label under which it does."""

    module: nn.Module
    label: str
    options: frozenset[int]


def _children_of(model: nn.Module) -> dict[int, list[_Child]]:
    """The children of every undecided mutable, by its id, in the order in which it calls them on all its paths."""
    return {
        id(mutable): [_Child(child, label, options) for child, options in _rows(mutable)]
        for label, decision in decisions(model).items()
        for mutable in decision.members
        if mutable.decided is None
    }


def _rows(mutable: Mutable) -> list[tuple[nn.Module, frozenset[int]]]:
    if isinstance(mutable, LayerChoice):
        return [(candidate, frozenset({k})) for k, candidate in enumerate(mutable)]
    if isinstance(mutable, Repeat):
        low, _ = mutable.depth
        every = range(len(mutable.options))
        return [(block, frozenset(k for k in every if low + k > i)) for i, block in enumerate(mutable.blocks)]
    return []  # an InputChoice passes tensors on


def tensors_of(tree: Any, depth: int = 4) -> list[Tensor]:
    """The tensors of what a network returns: also of dataclasses and other objects, by their attributes.

    >>> from types import SimpleNamespace
    >>> len(tensors_of([torch.ones(1), SimpleNamespace(a=torch.ones(1), b={"c": torch.ones(1)})]))
    3
    """
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif depth and hasattr(leaf, "__dict__") and not isinstance(leaf, nn.Module | type):
            found += tensors_of(dict(vars(leaf)), depth - 1)
    return found


def _shape_only(tensor: Tensor) -> Tensor:
    return tensor.to("meta")
