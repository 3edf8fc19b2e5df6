"""LayerChoice: one of several layers at a place of the network."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, final

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..errors import ArchMismatchError, ConfigurationError
from .base import Mutable, unlabelled
from .folding import last_affine, scaled
from .gating import combine
from .padding import Padding

__all__ = ["LayerChoice"]

Candidate: TypeAlias = nn.Module | Callable[[Tensor], Tensor]
Candidates: TypeAlias = Sequence[Candidate] | Mapping[str, Candidate] | nn.ModuleDict

_WEIGHTS = 4  # A factor of a layer's weights is worth it if the inputs have so many times more elements.


@final
class LayerChoice(Mutable):
    """One of ``candidates``, decided by search: y = sum_k w_k candidate_k(x) with the gate w of the sampler.

    ``candidates``: a list (decisions are indices) or a mapping (decisions are names) of modules, or of functions of one
    tensor that have a name (``torch.relu``, not a lambda). They may differ in anything but the shape of their output;
    they may hold choices themselves, and need no parameters (``nn.Identity()`` is a skip). All positional and keyword
    inputs are handed on as they come.
    ``label``: mutables of one label share one decision; None means the path of the module in its model. ``padding``:
    zeros behind the outputs of narrower candidates, which only a ``SuperNet`` or ``PIT`` gives its copy. ``offered``:
    all options, ``options``: those that a search has not dropped.

    A candidate that does not run in a step is not touched: no gradient, no BatchNorm statistics. The output shares
    no memory with the inputs, also where the candidate passes them on, so that what follows may work in place.

    >>> import torch
    >>> choice = LayerChoice({"conv": nn.Conv2d(4, 4, 3, padding=1), "skip": nn.Identity()})
    >>> choice(torch.rand(2, 4, 8, 8)).shape, choice.options
    (torch.Size([2, 4, 8, 8]), ('conv', 'skip'))
    """

    def __init__(self, candidates: Candidates, label: str | None = None) -> None:
        named = _named(candidates, label)
        names = list(named)
        by_name = isinstance(candidates, Mapping | nn.ModuleDict)
        super().__init__(names if by_name else range(len(names)), label)
        self.by_name, self.offered = by_name, self.options
        self.padding: Padding | None = None
        self._signature = tuple((name, _kind(named[name], deep=not by_name)) for name in names)
        self._decide()
        kept = named if self.decided is None else {names[self.decided]: named[names[self.decided]]}
        for name in names:
            if name not in kept:
                self.left_out.update(unlabelled(named[name], f"candidates.{name}"))
        try:
            self.candidates = nn.ModuleDict(kept)
        except (KeyError, TypeError) as error:
            raise ConfigurationError(
                f"LayerChoice(label={label!r}): {error}; candidate names must be usable as module names "
                f"(no dot, no attribute of nn.ModuleDict), got {names}"
            ) from error

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        candidates = list(self.candidates.values())
        if self.decided is not None:
            return candidates[0](*args, **kwargs)
        inputs, refilled = _inputs_of(args, kwargs)
        entering, padding = self.entering, self.padding

        def evaluate(k: int, tensors: Sequence[Tensor]) -> Any:
            args, kwargs = refilled(tensors)
            with entering(candidates[k]):
                output = candidates[k](*args, **kwargs)
            return output if padding is None else padding(output)

        def weighted(k: int, tensors: Sequence[Tensor], weight: Tensor) -> Any:
            layer = last_affine(candidates[k], sum(tensor.numel() for tensor in tensors) // _WEIGHTS)
            if layer is None:
                return None
            args, kwargs = refilled(tensors)
            with entering(candidates[k]), scaled(layer, weight):
                output = candidates[k](*args, **kwargs)
            return output if padding is None else padding(output)

        if padding is not None and not padding.is_known:
            padding.learn([evaluate(k, inputs) for k in range(len(candidates))])
        return combine(self.gate(), evaluate, inputs, self._candidate, weighted)

    def index_of(self, decision: Any, where: str) -> int:
        # NNI writes indices for named candidates too, and the digits of an index as a string.
        names, number = [str(option) for option in self.offered], -1
        if isinstance(decision, str) and decision in names:
            number = names.index(decision)
        elif isinstance(decision, int) and not isinstance(decision, bool) and decision < len(names):
            number = decision
        if number < 0:
            raise ArchMismatchError(
                f"{where}: the arch says {decision!r}, the candidates are {list(self.offered)}. "
                "Build the model with the arguments it was searched with"
            )
        if self.offered[number] not in self.options:
            raise ArchMismatchError(
                f"{where}: the arch says {decision!r}, which was dropped in the search; of {list(self.offered)} there "
                f"are {list(self.options)} left. Take a model with all candidates for this arch"
            )
        return self.options.index(self.offered[number])

    def describe(self) -> str:
        return f"LayerChoice(label={self.label!r}) of {list(self.options)}"

    def signature(self) -> tuple[Hashable, ...]:
        return ("LayerChoice", self.by_name, *self._signature)

    def _candidate(self, k: int) -> str:
        return f"candidate {self.options[k]!r} of {self.describe()}"

    def __len__(self) -> int:
        return len(self.options)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.candidates.values())

    def __getitem__(self, option: str | int) -> nn.Module:
        return self.candidates[str(option)]


def _inputs_of(args: Any, kwargs: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], tuple[Any, Any]]]:
    """The tensors among the arguments, and a function from others like them to the arguments with these.

    The function is kept for the backward pass, without the tensors: autograd saves these, elsewhere or not at all.
    """
    if not kwargs and len(args) == 1 and isinstance(args[0], Tensor):
        return [args[0]], lambda tensors: (tensors, {})
    leaves, tree = pytree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def refilled(tensors: Sequence[Tensor]) -> Any:
        filled = list(others)
        for i, tensor in zip(places, tensors, strict=True):
            filled[i] = tensor
        return pytree.tree_unflatten(filled, tree)

    return [leaves[i] for i in places], refilled


def _named(candidates: Candidates, label: str | None) -> dict[str, nn.Module]:
    named: dict[str, Any]
    if isinstance(candidates, Mapping | nn.ModuleDict):
        named = dict(candidates.items())
        if not all(isinstance(name, str) for name in named):
            raise ConfigurationError(
                f"LayerChoice(label={label!r}): candidate names must be strings, got {list(named)}"
            )
    else:
        if not isinstance(candidates, Iterable):
            raise ConfigurationError(
                f"LayerChoice(label={label!r}): candidates are a list or a mapping of modules, got a "
                f"{type(candidates).__name__}"
            )
        named = {str(i): candidate for i, candidate in enumerate(candidates)}
    if not named:
        raise ConfigurationError(f"LayerChoice(label={label!r}): no candidates; at least one is needed")
    for name, candidate in named.items():
        if isinstance(candidate, nn.Module):
            continue
        if isinstance(candidate, type) or not callable(candidate) or not _has_name(candidate):
            raise ConfigurationError(
                f"LayerChoice(label={label!r}): candidate {name!r} is a {type(candidate).__name__}; candidates are "
                "modules (nn.Identity() for a skip), or functions with a name that is no lambda"
            )
        named[name] = _of_function(candidate)
    return named


def _has_name(function: Callable[..., Any]) -> bool:
    return getattr(function, "__name__", "").isidentifier()


def _of_function(function: Callable[..., Any]) -> fx.GraphModule:
    """A module that calls it, of no class of this library: what is exported is the same."""
    graph = fx.Graph()
    graph.output(graph.call_function(function, (graph.placeholder("x"),)))
    return fx.GraphModule(nn.Module(), graph, class_name=function.__name__)


def _kind(module: nn.Module, *, deep: bool) -> Hashable:
    """What makes two candidates the same operation, widths and strides aside.

    A name given by the user says it for what is inside; without names the whole structure is compared. A mutable
    inside is what it offers, so that a model built under ``fixed_arch`` is still the same space.
    """
    if isinstance(module, Mutable):
        return module.signature()
    own = (type(module).__qualname__, _size(module, "kernel_size"), _size(module, "dilation"))
    children = tuple(_kind(child, deep=True) for child in module.children()) if deep else ()
    return (*own, *children)


def _size(module: nn.Module, name: str) -> int | tuple[int, ...] | None:
    size = getattr(module, name, None)
    if isinstance(size, list | tuple) and all(isinstance(n, int) for n in size):
        return tuple(size)
    return size if isinstance(size, int) else None
