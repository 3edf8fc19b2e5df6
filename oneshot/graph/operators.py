"""The operators that run, in their order, with the tensors they read and make, and the decisions under which they do.

Followed below autograd, where everything a network does to tensors arrives, however it is written: modules,
functions, methods and python control flow. See ``torch.utils._python_dispatch.TorchDispatchMode``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from ..mutables import EveryPath, InputChoice, LayerChoice, Repeat, decisions
from .trace import Condition, _run, _Tracer, evaluated, intersect, tensors_of

__all__ = ["Junction", "Operator", "Program", "Run", "Value", "plain_attention", "trace_operators"]


@dataclass(frozen=True)
class Value:
    """A tensor of the run, by its number.

    ``maker``: "input" (of the network), "operator", "junction" (a mutable), or "constant" (a weight, a buffer, or
    something else that no operator of the run made). ``alias_of``: the value in whose memory it lies, of a view and
    of what is computed in place; None for memory of its own. ``folded``: computed from constants alone.
    """

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    maker: str
    alias_of: int | None = None
    folded: bool = False


@dataclass(frozen=True)
class Operator:
    """One call of an ATen operator. Tensors in ``args``, ``kwargs`` are ``Value``s; ``path``: the module it is in."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    path: str
    when: Condition


@dataclass(frozen=True)
class Junction:
    """What leaves a mutable: ``output`` is the value of the option that ``label`` is decided for."""

    output: int
    label: str
    options: Mapping[int, int]
    when: Condition


class Run(NamedTuple):
    """The operators of one architecture; ``values`` are those of the program, each under its number.

    ``source(number)``: the value that stands for a number once the junctions are decided.
    """

    operators: list[Operator]
    sources: Mapping[int, int]
    outputs: list[int]

    def source(self, number: int) -> int:
        while number in self.sources:
            number = self.sources[number]
        return number


@dataclass
class Program:
    """The run of a search model along all its paths at once.

    ``parameters``: number -> name of the parameters and buffers that were read. ``integers``: number -> content of
    the constants and folded values that are integers, by which others may be indexed.
    """

    values: list[Value] = field(default_factory=list)
    steps: list[Operator | Junction] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    parameters: dict[int, str] = field(default_factory=dict)
    integers: dict[int, Tensor] = field(default_factory=dict)

    def of(self, choices: Mapping[str, int]) -> Run:
        """What runs in the fixed model of ``choices`` (label -> option), in its order."""
        operators: list[Operator] = []
        sources: dict[int, int] = {}
        for step in self.steps:
            if not all(choices[label] in options for label, options in step.when.items()):
                continue
            if isinstance(step, Operator):
                operators.append(step)
            else:
                sources[step.output] = step.options[choices[step.label]]
        run = Run(operators, sources, [])
        return run._replace(outputs=[run.source(number) for number in self.outputs])


def trace_operators(model: nn.Module, args: Sequence[Any], *, training: bool = False) -> Program:
    """Run ``model(*args)`` once along every path, without grad, and return what runs.

    What the mutables do to mix their options is left out; where their outputs lie differently in memory, what follows
    (a ``reshape``, say) is that of the first option. ``training``: in the modes that the modules of ``model`` have,
    and not in eval mode; BatchNorm statistics then move. All else of the model, and the random numbers of torch on the
    CPU, are afterwards as they were. UnsupportedModelError for a model that does not run on ``args``.

    >>> net = nn.Sequential(nn.Linear(2, 2), LayerChoice({"relu": nn.ReLU(), "none": nn.Identity()}, label="act"))
    >>> program = trace_operators(net, (torch.ones(1, 2),))
    >>> [[o.name for o in program.of({"act": k}).operators] for k in (0, 1)]
    [['t', 'addmm', 'relu'], ['t', 'addmm']]
    """
    tracer = _Tracer(model, lambda _: False, keep=False)
    recorder = _Recorder(model, tracer)
    try:
        recorder.attach(model)
        tracer.attach()  # its hooks run before those of the recorder, which asks it what holds
        mode = evaluated(model, EveryPath(), training=training)
        with torch.random.fork_rng(devices=[]), mode, plain_attention(), recorder:
            recorder.take_inputs(args)
            _run(model, args)
    finally:
        recorder.remove()
        tracer.remove()
    return recorder.program


@contextmanager
def plain_attention() -> Iterator[None]:
    """The fused attention of eval mode is one operator whose inside nobody sees; the usual path computes the same."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@dataclass
class _Scope:
    """A module that is running. ``returned``: what the options of a mutable gave, in the order of their calls."""

    path: str
    when: Condition | None
    is_mutable: bool = False
    inputs: Any = None
    returned: list[list[int]] = field(default_factory=list)


class _Recorder(TorchDispatchMode):
    """Writes the program. The tracer, whose hooks run before these, knows which conditions hold."""

    def __init__(self, model: nn.Module, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer, self.program = tracer, Program()
        self.numbers = WeakTensorKeyDictionary()
        self.scopes = [_Scope("", {})]
        self.labels = {id(m): k for k, d in decisions(model).items() for m in d.members if m.decided is None}
        self.handles: list[Any] = []
        self.names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        # Memory of constants into which something else was written. Held, so that nothing else gets the same address.
        self.written: dict[int, Tensor] = {}

    def attach(self, model: nn.Module) -> None:
        for path, module in model.named_modules():
            enter = partial(self._enter, path)
            self.handles.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._leave))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def take_inputs(self, args: Sequence[Any]) -> None:
        for tensor in _tensors(args):
            if tensor not in self.numbers:
                same = [n for t, n in self.numbers.items() if _memory(t) is not None and _memory(t) == _memory(tensor)]
                self._new(tensor, "input", same[0] if same else None)

    # ---- modules -----------------------------------------------------------------------------------------------

    def _enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        mutable = id(module) in self.labels
        self.scopes.append(_Scope(path, self.tracer.stack[-1].when, mutable, (args, kwargs) if mutable else None))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        scope = self.scopes.pop()
        if scope.is_mutable and scope.when is not None:
            self._join(scope, scope.when, module, output)
        if self.scopes[-1].is_mutable:
            self.scopes[-1].returned.append(self._numbers_of(output))
        if len(self.scopes) == 1:
            self.program.outputs = self._numbers_of(output)

    def _join(self, scope: _Scope, when: Condition, module: nn.Module, output: Any) -> None:
        label = self.labels[id(module)]
        # An option that contradicts what holds around it is never taken, and has not been recorded.
        possible = when.get(label, frozenset(range(len(module.options))))  # type: ignore[arg-type]
        ways = {k: numbers for k, numbers in enumerate(self._options(scope, when, label, module)) if k in possible}
        for i, tensor in enumerate(_tensors(output)):
            number = self._new(tensor, "junction")
            self.program.steps.append(Junction(number, label, {k: way[i] for k, way in ways.items()}, when))

    def _options(self, scope: _Scope, when: Condition, label: str, module: nn.Module) -> list[list[int]]:
        """The numbers of what each option of a mutable returned."""
        if isinstance(module, LayerChoice):
            return scope.returned
        if isinstance(module, Repeat):
            low, _ = module.depth
            row = [self._numbers_of(scope.inputs), *scope.returned]
            return [row[low + k] for k in range(len(module.options))]
        assert isinstance(module, InputChoice)
        args, kwargs = scope.inputs
        found = []
        for k in range(len(module.options)):
            self.scopes.append(_Scope(scope.path, intersect(when, {label: frozenset({k})})))
            found.append(self._numbers_of(module.chosen(k, *args, **kwargs)))
            self.scopes.pop()
        return found

    # ---- operators ---------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # where an operator that is made of others arrives in one piece
            with self:
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        scope = self.scopes[-1]
        if scope.is_mutable or scope.when is None:
            return func(*args, **kwargs)
        # Before it runs: what works in place returns the same tensor.
        inputs = [(tensor, self._value(tensor)) for tensor in _tensors((args, kwargs))]
        recorded = _replaced(args, self._value), {key: _replaced(leaf, self._value) for key, leaf in kwargs.items()}
        output = func(*args, **kwargs)
        written = _written(func, args, kwargs)
        if not all(value.folded for _, value in inputs):
            constants = {id(tensor) for tensor, value in inputs if value.folded}
            for tensor in written:
                memory = _memory(tensor)
                if id(tensor) in constants and memory is not None:
                    self.written[memory] = tensor
        outputs = tuple(self._made(tensor, inputs) for tensor in _tensors(output) or written)
        if outputs:
            name = func._overloadpacket.__name__
            values = tuple(value for _, value in inputs)
            self.program.steps.append(Operator(name, *recorded, values, outputs, scope.path, scope.when))
        return output

    def _made(self, tensor: Tensor, inputs: Sequence[tuple[Tensor, Value]]) -> Value:
        memory = _memory(tensor)
        alias = next((v.number for t, v in inputs if memory is not None and _memory(t) == memory), None)
        folded = all(value.folded for _, value in inputs)
        return self.program.values[self._new(tensor, "operator", alias, folded)]

    def _new(self, tensor: Tensor, maker: str, alias_of: int | None = None, folded: bool = False) -> int:
        number = len(self.program.values)
        self.program.values.append(Value(number, tuple(tensor.shape), tensor.dtype, maker, alias_of, folded))
        self.numbers[tensor] = number
        if maker == "constant" and id(tensor) in self.names:
            self.program.parameters[number] = self.names[id(tensor)]
        if folded and not (tensor.is_floating_point() or tensor.is_complex()):
            with _disable_current_modes():
                self.program.integers[number] = tensor.detach().cpu().clone()
        return number

    def _value(self, tensor: Tensor) -> Value:
        number = self.numbers.get(tensor)
        if number is None:
            number = self._new(tensor, "constant", folded=True)
        elif self.program.values[number].folded and _memory(tensor) in self.written:
            # A buffer that a view of it was filled through, say: it is no constant any more.
            number = self._new(tensor, "operator", alias_of=number)
        return self.program.values[number]

    def _numbers_of(self, tree: Any) -> list[int]:
        return [self._value(tensor).number for tensor in _tensors(tree)]


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, list | tuple | dict):  # most of them; pytree is ten times slower
        # By key: two options may return one dict in different orders.
        leaves = [tree[key] for key in sorted(tree, key=str)] if isinstance(tree, dict) else tree
        return [tensor for leaf in leaves for tensor in _tensors(leaf)]
    return tensors_of(tree)


def _replaced(tree: Any, by: Callable[[Tensor], Any]) -> Any:
    """The arguments of an operator, which are tensors, lists of them, and numbers, with something else as tensors."""
    if isinstance(tree, Tensor):
        return by(tree)
    if isinstance(tree, list | tuple):
        return type(tree)(_replaced(leaf, by) for leaf in tree)
    return tree


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operator changes."""
    arguments = func._schema.arguments
    given = {a.name: value for a, value in zip(arguments, args, strict=False)} | kwargs
    changed = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return _tensors([given[name] for name in changed if name in given])


def _memory(tensor: Tensor) -> int | None:
    """The address of what a tensor lies in; None if it holds nothing."""
    return tensor.untyped_storage().data_ptr() or None if tensor.layout is torch.strided else None
