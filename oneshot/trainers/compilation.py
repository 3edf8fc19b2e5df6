"""torch.compile of a network under search: piece by piece, so that no path is compiled as a whole.

A network of 5 choices with 7 candidates has 7^5 paths, and torch would compile each that it comes across. What one of
its candidates computes does not depend on the path: 35 pieces are compiled, each once for every kind of step.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any, final

import torch
from torch import nn

from ..errors import ConfigurationError, InputTypeError, UnsupportedModelError
from ..mutables.base import Mutable
from ..pit.network import SearchedNetwork

__all__ = ["Compilations", "CompileOptions", "compile_arguments", "compiled", "pieces"]

CompileOptions = bool | str | Mapping[str, Any] | None
_ARGUMENTS = ("backend", "mode", "dynamic", "options", "fullgraph")
_RECORDING = ("reduce-overhead", "max-autotune")
# Of what torch's compiler does itself, while it follows a network or is imported.
_ITS_OWN_WARNINGS = (
    r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    r".*torch\.autograd\.function\.Function.* should not be instantiated",
    r"`torch\.jit\.script_method` is deprecated",
)


@final
class Compilations:
    """How often each piece of a network has been compiled so far, ``by_piece``: path -> number of graphs.

    >>> found = Compilations(["a", "b"])
    >>> found.by_piece["a"] += 2
    >>> str(found)
    '2 pieces, compiled 2 times, one of them at most 2 times'
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.by_piece = dict.fromkeys(paths, 0)

    @property
    def total(self) -> int:
        return sum(self.by_piece.values())

    @property
    def most(self) -> int:
        """Of one piece."""
        return max(self.by_piece.values(), default=0)

    def __str__(self) -> str:
        return f"{len(self.by_piece)} pieces, compiled {self.total} times, one of them at most {self.most} times"


def pieces(model: nn.Module) -> dict[str, nn.Module]:
    """What is compiled of a model, by path: the largest modules that hold no undecided choice.

    Without choices it is the whole model: of a ``PIT`` network its masks too. With choices these are the candidates
    without choices in them, and the blocks around. A layer of torch alone is none: it is one operator already. The
    paths are those of the network as it was written, also of a ``PIT`` or ``SuperNet`` of it.

    >>> from oneshot import LayerChoice
    >>> block = lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> net = nn.Sequential(block(), LayerChoice({"block": block(), "linear": nn.Linear(2, 2)}), nn.Linear(2, 2))
    >>> list(pieces(net)), list(pieces(block()))
    (['0', '1.candidates.block'], ['Sequential'])
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def visit(path: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        if _is_called(module) and not _is_operator(module) and not _has_choices(module):
            found[path or type(module).__name__] = module
            return
        for name, child in module.named_children():
            visit(f"{path}.{name}".lstrip("."), child)

    has_choices = isinstance(model, SearchedNetwork) and _has_choices(model)
    visit("", model.network if isinstance(model, SearchedNetwork) and has_choices else model)
    return found


def _has_choices(module: nn.Module) -> bool:
    return any(isinstance(m, Mutable) and m.decided is None for m in module.modules())


def _is_called(module: nn.Module) -> bool:
    """Whether it has a forward, which lists and dicts of modules do not."""
    return type(module).forward is not nn.Module.forward


def _is_operator(module: nn.Module) -> bool:
    """A layer of torch, or a function: it calls one kernel, which a compiler does not make faster."""
    if next(module.children(), None) is not None:
        return False
    return type(module).__module__.startswith("torch.") or next(module.parameters(), None) is None


def compile_arguments(options: CompileOptions) -> dict[str, Any] | None:
    """The arguments of ``torch.compile`` that an option stands for; None for no compilation.

    True: its defaults. A name: its ``backend``. A mapping: ``backend`` (a name or a function), ``mode``, ``dynamic``,
    ``options``, ``fullgraph``. ConfigurationError for a backend, mode or argument that does not exist, InputTypeError
    for something else.

    >>> compile_arguments(True), compile_arguments("aot_eager"), compile_arguments(None)
    ({}, {'backend': 'aot_eager'}, None)
    """
    if options is None or options is False:
        return None
    if options is True:
        return {}
    if not isinstance(options, str | Mapping):
        raise InputTypeError(
            f"compile={options!r}: True, the name of a backend, or a mapping of arguments of torch.compile is needed"
        )
    arguments = {"backend": options} if isinstance(options, str) else dict(options)
    unknown = [name for name in arguments if name not in _ARGUMENTS]
    if unknown:
        raise ConfigurationError(f"compile: torch.compile is given {list(_ARGUMENTS)}, got {unknown}")
    _check_backend(arguments.get("backend", "inductor"), arguments)
    return arguments


def _check_backend(backend: Any, arguments: Mapping[str, Any]) -> None:
    if not isinstance(backend, str) and not callable(backend):
        raise InputTypeError(f"compile: backend={backend!r}; the name of one, or a function, is needed")
    if isinstance(backend, str) and backend not in torch.compiler.list_backends(None):
        allowed = [*torch.compiler.list_backends(), "eager", "aot_eager"]
        raise ConfigurationError(f"compile: there is no backend {backend!r}; torch knows {allowed}")
    mode, options = arguments.get("mode"), arguments.get("options")
    if mode is not None and options is not None:
        raise ConfigurationError(f"compile: mode={mode!r} and options={options!r}; torch.compile takes one of them")
    if backend == "inductor" and mode is not None:
        from torch._inductor import list_mode_options  # imports the compiler

        if mode not in list_mode_options():
            raise ConfigurationError(f"compile: there is no mode {mode!r}; inductor has {list(list_mode_options())}")


@contextmanager
def compiled(model: nn.Module, options: CompileOptions) -> Iterator[Compilations]:
    """Inside, the ``pieces`` of a model in train mode are compiled, each in place; what it yields counts them.

    A piece is compiled when it runs for the first time, and again where something else learns: at most once for each
    phase of a ``PIT`` network; and of a candidate once for steps of the weights, twice for those of alphas (where it is
    the active one, and where only its output is needed) and once more if masks learn as well. All training batches are
    alike; inputs of another shape are compiled once more, for any shape. After 8 graphs of a piece torch lets it run
    as it is written, and logs that. Inductor draws the random numbers of dropout in its own way, from the same seeds.

    In eval mode the model runs as it is written: there, batches are of many sizes, and what is evaluated is to be
    equal to what is exported. So do copies and pickles, and ``state_dict`` has the keys that it always has. Afterwards
    all is as before. A gradient of a gradient is only there with the backend ``'eager'``.

    Args:
        model: a network with or without choices, also a ``PIT`` or ``SuperNet``.
        options: as in ``compile_arguments``; None or False compile nothing.

    Raises what ``compile_arguments`` does, ConfigurationError where inductor has no C++ compiler or what else it needs,
    or where it would record CUDA graphs of the paths of choices; UnsupportedModelError for a model without pieces.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> with compiled(net, "eager") as compilations:
    ...     shapes = [net(torch.ones(3, 2)).shape for _ in range(5)]
    >>> compilations.by_piece
    {'Sequential': 1}
    """
    arguments = compile_arguments(options)
    if arguments is None:
        yield Compilations([])
        return
    found = pieces(model)
    with _without_its_warnings():
        _check_model(model, found, arguments)
        compilations = Compilations(list(found))
        before = {path: vars(module).get("_compiled_call_impl") for path, module in found.items()}
        try:
            for path, module in found.items():
                # Where nn.Module.compile() puts it, too.
                vars(module)["_compiled_call_impl"] = _Compiled(model, module, path, arguments, compilations)
            yield compilations
        finally:
            for path, module in found.items():
                vars(module).pop("_compiled_call_impl", None)
                if before[path] is not None:
                    vars(module)["_compiled_call_impl"] = before[path]


@contextmanager
def _without_its_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in _ITS_OWN_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        yield


def _check_model(model: nn.Module, found: Mapping[str, nn.Module], arguments: Mapping[str, Any]) -> None:
    if not found:
        raise UnsupportedModelError(
            f"compile: nothing in {type(model).__name__} would be faster: it and its candidates are made of single "
            "layers around choices; leave compile out"
        )
    options = arguments.get("options") or {}
    records = arguments.get("mode") in _RECORDING or options.get("triton.cudagraphs")
    if _has_choices(model) and (records or arguments.get("backend") == "cudagraphs"):
        raise ConfigurationError(
            "compile: CUDA graphs are recorded anew for every order in which pieces run, here for every path of the "
            f"choices; take another mode than {list(_RECORDING)} ('max-autotune-no-cudagraphs', say)"
        )
    if arguments.get("backend", "inductor") == "inductor":
        _check_inductor(next((p.device for p in model.parameters()), torch.device("cpu")))


def _check_inductor(device: torch.device) -> None:
    """Compile one operator: whether compilers and headers are there shows in no other way."""

    def one_more(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    try:
        # Not from the cache of an earlier run, in which all may have been there.
        torch.compile(one_more, options={"fx_graph_cache": False})(torch.zeros(2, device=device))
    except RuntimeError as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        needed = "a C++ compiler (g++, or another one named by CXX)" if device.type == "cpu" else "Triton"
        raise ConfigurationError(
            f"compile: inductor cannot compile for {device} here: {first}. It needs {needed}; install it, or leave "
            "compile out"
        ) from error


class _Compiled:
    """What is called in the place of a piece: in train mode, its compiled form."""

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module,
        path: str,
        arguments: Mapping[str, Any],
        compilations: Compilations,
    ) -> None:
        from torch._dynamo.utils import counters  # imports the compiler

        self.model, self.module, self.path = model, module, path
        self.compilations, self.counters = compilations, counters
        self.compiled = torch.compile(_own_code(module, path), **_isolated(), **arguments)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.model.training or torch.compiler.is_compiling():
            return self.module._call_impl(*args, **kwargs)
        before = self.counters["stats"]["unique_graphs"]
        try:
            return self.compiled(*args, **kwargs)
        finally:
            self.compilations.by_piece[self.path] += self.counters["stats"]["unique_graphs"] - before

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Of a copy nothing is compiled; most modules leave this out by themselves, ``torch.fx`` graphs do not."""
        return

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def _own_code(module: nn.Module, path: str) -> Callable[..., Any]:
    """A call of a module, as a function with code of its own.

    torch counts, limits (to 8) and looks up what it has compiled by code objects, and all modules share the code that
    calls them. The shapes that it has seen it knows by the name in the code.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    name = f"{path.replace('.', '_')}_{id(module):x}"
    return FunctionType(call.__code__.replace(co_name=name), call.__globals__, name, None, call.__closure__)


def _isolated() -> dict[str, Any]:
    """For the parts of a piece that cannot be compiled with the rest, and share their code: from torch 2.13 on."""
    known = inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
