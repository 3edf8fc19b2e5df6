"""The fixed model: the plain network that an arch stands for, and the proof that it is the searched one."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..errors import ArchMismatchError, ExportError, UnsupportedModelError
from ..graph import evaluated, tensors_of
from ..mutables import InputChoice, LayerChoice, Mutable, OnePath, Repeat, decisions
from ..mutables.base import SearchModel
from .arch import ArchFile, ArchSource, choices_of

__all__ = ["as_graph", "check_equal", "fixed", "load_fixed", "verified_fixed", "without_choices"]

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_LOOSE = 2e-2  # of half precision


def fixed(model: nn.Module, arch: ArchSource | None = None) -> nn.Module:
    """The plain network of an arch, with copies of the weights of the chosen candidates.

    ``model`` is left as it is; without ``arch`` the masks of a ``PIT`` network say what is kept. The result holds no
    class of this library: a LayerChoice becomes its candidate, a Repeat an ``nn.Sequential``, an InputChoice a small
    ``torch.fx.GraphModule``. ``arch``: a path, a mapping, or None for a model that was built under ``fixed_arch``.

    >>> net = nn.Sequential(LayerChoice({"small": nn.Linear(2, 3), "none": nn.Identity()}, label="a"))
    >>> fixed(net, {"a": "small"})
    Sequential(
      (0): Linear(in_features=2, out_features=3, bias=True)
    )
    """
    if isinstance(model, SearchModel):
        return model.rebuilt(model.arch() if arch is None else choices_of(model, arch), None)
    choices = choices_of(model, _file_of_context(model) if arch is None else arch)
    return _strip(model, choices)[0]


def load_fixed(factory: Callable[[], nn.Module], path: ArchSource) -> nn.Module:
    """The network of an arch with fresh weights: ``factory()`` builds the search model it belongs to."""
    return fixed(factory(), path)


def verified_fixed(model: nn.Module, choices: Mapping[str, Any], examples: Sequence[Sequence[Any]]) -> nn.Module:
    """The fixed model of ``choices``, compared with the search model pinned to them on every example.

    Both in eval mode; max |difference| / max |reference| must be at most 1e-4 in float32, 1e-9 in float64. Else
    ExportError names the first layer that differs.
    """
    if isinstance(model, SearchModel):
        return model.rebuilt(choices, examples)
    with torch.random.fork_rng(devices=[]):
        plain, copies = _strip(model, choices)
        with evaluated(model):
            for label, decision in decisions(model).items():
                decision.set_sampler(OnePath(choices[label]))
            for args in examples:
                _prove(model, plain, copies, args)
    return plain


def as_graph(module: nn.Module, args: Sequence[Any]) -> fx.GraphModule:
    """The network as a ``torch.fx.GraphModule``, which unpickles with torch alone, without the user's classes.

    Of a fixed model in eval mode, with copies of its weights. Checked on ``args`` to compute the same.
    UnsupportedModelError for a forward that depends on values, or that calls functions a graph cannot hold.
    """
    inside = [name for name, inner in module.named_modules() if isinstance(inner, Mutable)]
    if inside:
        raise UnsupportedModelError(f"as_graph: {inside} are undecided choices; give it fixed(model, arch)")
    copied = _copied(module, {}).eval()
    try:
        graph = fx.symbolic_trace(copied).eval()
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(module).__name__} cannot be written as a graph: {error}. Its forward depends on the values of "
            "tensors; keep the class, or its state_dict with its source"
        ) from error
    _make_portable(graph)
    check_equal(module, graph, args, f"the graph of {type(module).__name__}")
    return graph


def _make_portable(graph: fx.GraphModule) -> None:
    """Nothing in it may be a name that only the user's source defines; annotations of a forward are such names."""
    foreign = set()
    for node in graph.graph.nodes:
        node.type = None
        if node.op == "call_function":
            home = getattr(node.target, "__module__", None) or "torch"  # some functions of torch name no module
            if home.split(".")[0] not in ("torch", "_operator", "builtins", "math"):
                foreign.add(f"{home}.{node.target.__name__}")
    if foreign:
        raise UnsupportedModelError(
            f"the graph calls {sorted(foreign)}, without which it cannot be loaded; keep the class, or its state_dict "
            "with its source"
        )
    graph.recompile()


def _file_of_context(model: nn.Module) -> ArchFile:
    known = decisions(model)
    contexts = {id(m.context): m.context for d in known.values() for m in d.members}
    context = next(iter(contexts.values()), None)
    if len(contexts) != 1 or context is None:
        raise ArchMismatchError(
            "fixed(model) without an arch is for a model built under one fixed_arch; "
            f"{list(known) or 'this model'} is not. Pass the arch: fixed(model, path)"
        )
    return ArchFile(context.arch, context.space, context.source)


def without_choices(model: nn.Module, choices: Mapping[str, int]) -> nn.Module:
    """A copy of the network in which every mutable is the option ``choices[label]``; the other options are not copied.

    ``fixed`` for options by index, and for networks that no arch file belongs to.
    """
    return _strip(model, choices)[0]


def _strip(model: nn.Module, choices: Mapping[str, int]) -> tuple[nn.Module, dict[int, Any]]:
    """A copy of the network without its mutables, and the copies by id of their originals."""
    options = {id(m): choices[label] for label, d in decisions(model).items() for m in d.members}
    copies: dict[int, Any] = {}
    plain = _without_mutables(model, options, copies)
    left = [name for name, module in plain.named_modules() if isinstance(module, Mutable)]
    if left:
        raise ExportError(f"mutables {left} are still in the rebuilt network; is its __deepcopy__ its own?")
    return plain, copies


def _without_mutables(module: nn.Module, options: Mapping[int, int], copies: dict[int, Any]) -> Any:
    """A copy of a module in which each mutable is what it was decided for.

    What a decision leaves out is never copied: the replacement of a mutable is entered as its copy before the
    module around it is copied.
    """
    for mutable in _outermost(module):
        if id(mutable) not in copies:
            copies[id(mutable)] = _replacement(mutable, options, copies)
    return _copied(module, copies)


def _outermost(module: nn.Module) -> Iterator[Mutable]:
    if isinstance(module, Mutable):
        yield module
    else:
        for child in module.children():
            yield from _outermost(child)


def _replacement(mutable: Mutable, options: Mapping[int, int], copies: dict[int, Any]) -> nn.Module:
    option = options[id(mutable)]
    if isinstance(mutable, LayerChoice):
        chosen: nn.Module = _without_mutables(mutable[mutable.options[option]], options, copies)
        return chosen
    if isinstance(mutable, Repeat):
        row = mutable.blocks[: mutable.options[option]]
        replacement: nn.Module = nn.Sequential(*(_without_mutables(block, options, copies) for block in row))
    else:
        assert isinstance(mutable, InputChoice)
        replacement = _input_graph(mutable, option)
    replacement.training = mutable.training
    return replacement


def _copied(module: nn.Module, copies: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(module, copies)
    except (RuntimeError, TypeError) as error:
        raise ExportError(
            f"{type(module).__name__} cannot be copied: {error}. Do not keep results of a forward, locks or files in "
            "the attributes of a module"
        ) from error


def _input_graph(mutable: InputChoice, option: int) -> fx.GraphModule:
    graph = fx.Graph()
    inputs = graph.placeholder("inputs")
    keys = [mutable.names[i] if mutable.names else i for i in mutable.options[option]]
    chosen = [graph.call_function(operator.getitem, (inputs, key)) for key in keys]
    output: Any = chosen
    if mutable.reduction == "concat" and len(chosen) > 1:
        output = graph.call_function(torch.cat, (chosen,), {"dim": 1})
    elif mutable.reduction != "none":
        output = chosen[0]
        for other in chosen[1:]:
            output = graph.call_function(operator.add, (output, other))
        if mutable.reduction == "mean" and len(chosen) > 1:
            output = graph.call_function(operator.truediv, (output, len(chosen)))
    graph.output(output)
    return fx.GraphModule(nn.Module(), graph, class_name="ChosenInputs")


def _prove(model: nn.Module, plain: nn.Module, copies: Mapping[int, Any], args: Sequence[Any]) -> None:
    try:
        check_equal(model, plain, args, "the rebuilt network")
    except ExportError as error:
        layer = _first_difference(model, plain, copies, args)
        raise ExportError(
            f"{error}. The first layer that differs is {layer}. Is its forward random in eval mode, does it change "
            "the output of a choice in place, or look at the choice instead of calling it?"
        ) from error


def check_equal(
    reference: nn.Module, other: nn.Module, args: Sequence[Any], name: str, *, seed: int | None = None
) -> None:
    """ExportError unless both compute the same in eval mode; each on a copy of ``args``, which they may change.

    ``seed``: of the random numbers that both may draw; None: these are not the same.
    """
    with evaluated(reference), evaluated(other), torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        expected = reference(*pytree.tree_map_only(Tensor, torch.clone, list(args)))
        try:
            if seed is not None:
                torch.manual_seed(seed)
            got = other(*pytree.tree_map_only(Tensor, torch.clone, list(args)))
        except Exception as error:
            raise ExportError(
                f"{name} does not run where the searched one does: {type(error).__name__}: {error}"
            ) from error
    difference, allowed = _difference(expected, got)
    if not difference <= allowed:
        raise ExportError(
            f"{name} differs from the searched one by {difference:.3g} (relative; allowed is {allowed:g})"
        )


def _difference(reference: Any, other: Any) -> tuple[float, float]:
    """The worst relative difference of two outputs, and what is allowed for its dtype."""
    ours, theirs = _tensors(reference), _tensors(other)
    if [(t.shape, t.dtype) for t in ours] != [(t.shape, t.dtype) for t in theirs]:
        return math.inf, 0.0
    pairs = [_difference_of_tensors(a, b) for a, b in zip(ours, theirs, strict=True)]
    return max(pairs, key=lambda pair: pair[0] - pair[1], default=(0.0, 0.0))


def _difference_of_tensors(a: Tensor, b: Tensor) -> tuple[float, float]:
    if not a.is_floating_point():
        return (0.0 if torch.equal(a, b) else math.inf), 0.0
    allowed = _TOLERANCE.get(a.dtype, _LOOSE)
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return math.inf, allowed
    a, b = a[finite].double(), b[finite].double()
    return (float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) if a.numel() else 0.0), allowed


def _first_difference(model: nn.Module, plain: nn.Module, copies: Mapping[int, Any], args: Sequence[Any]) -> str:
    """The path, in the rebuilt network, of the first layer to return something else than the searched one, or fail."""
    originals = {id(copied): original for original, copied in copies.items() if isinstance(copied, nn.Module)}
    by_id = {id(module): module for module in model.modules()}
    ours: dict[str, list[Any]] = {}
    theirs: dict[str, list[Any]] = {}
    entered: list[str] = []
    handles = []
    for path, module in plain.named_modules():
        original = by_id.get(originals.get(id(module), -1))
        handles.append(module.register_forward_pre_hook(partial(_enter, entered, path)))
        handles.append(module.register_forward_hook(partial(_leave, entered, theirs, path)))
        if original is not None:
            handles.append(original.register_forward_hook(partial(_leave, [], ours, path)))
    try:
        with suppress(ExportError):
            check_equal(model, plain, args, "the rebuilt network")
    finally:
        for handle in handles:
            handle.remove()
    differing = (path for path, outputs in theirs.items() if path in ours and not _alike(ours[path], outputs))
    path = next(differing, entered[-1] if entered else "")
    return repr(path) if path else "not a module: the forward of the network itself"


def _enter(entered: list[str], path: str, module: nn.Module, args: Any) -> None:
    entered.append(path)


def _leave(
    entered: list[str], outputs: dict[str, list[Any]], path: str, module: nn.Module, args: Any, out: Any
) -> None:
    if entered:
        entered.pop()
    outputs.setdefault(path, []).append(pytree.tree_map_only(Tensor, torch.clone, out))


def _alike(ours: list[Any], theirs: list[Any]) -> bool:
    differences = [_difference(*pair) for pair in zip(ours, theirs, strict=False)]
    return len(ours) == len(theirs) and all(difference <= allowed for difference, allowed in differences)


def _tensors(tree: Any) -> list[Tensor]:
    return tensors_of(tree)
