"""Activation checkpointing by name: a block keeps no activations, they are computed again in the backward pass."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigurationError, UnsupportedModelError
from ..pit.network import SearchedNetwork

__all__ = ["blocks_of", "recomputed"]


def blocks_of(model: nn.Module, blocks: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that these names or patterns stand for, by path; of those inside each other the outermost ones.

    The paths are those of ``named_modules()`` of the network as it was written, also where ``model`` is a ``PIT`` or
    ``SuperNet`` of it. In a pattern ``*`` also stands for dots: ``'layers.*'`` matches ``layers.0``, and what is in it.
    ConfigurationError for a name that matches nothing that is called.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    >>> list(blocks_of(net, ["1.*"])), list(blocks_of(net, ["1", "1.0"]))
    (['1.0', '1.1'], ['1'])
    """
    if isinstance(blocks, str):
        raise ConfigurationError(f"blocks={blocks!r}: a list of names is needed: [{blocks!r}]")
    network = model.network if isinstance(model, SearchedNetwork) else model
    every = {path: module for path, module in network.named_modules(remove_duplicate=False) if path}
    called = {path: module for path, module in every.items() if _is_called(module)}
    found: dict[str, nn.Module] = {}
    for pattern in blocks:
        matching = {path: module for path, module in called.items() if path == pattern or fnmatchcase(path, pattern)}
        if not matching:
            raise ConfigurationError(_unmatched(pattern, network, every, called))
        found.update(matching)
    inside = {id(below) for module in found.values() for below in module.modules() if below is not module}
    outermost = {id(module): path for path, module in reversed(found.items()) if id(module) not in inside}
    return {path: module for path, module in found.items() if outermost.get(id(module)) == path}


@contextmanager
def recomputed(model: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """Inside, these blocks keep their inputs alone in a training step, and compute the rest again in its backward pass.

    The step is the same to the bit, random numbers and running statistics included; it takes the time of one more
    forward pass of the blocks, and the memory of their activations is needed for one block at a time. In eval mode and
    without gradient nothing is done. Names are those of ``blocks_of``. Afterwards all is as before; a copy that is
    made, or a ``state_dict`` that is taken, in the middle is that of the network without it.

    UnsupportedModelError, in the forward pass, for a block that changes its input in place; RuntimeError, in the
    backward pass, where weights of a block have been changed in place since its forward pass.

    >>> saved: list[int] = []
    >>> net = nn.Sequential(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)))
    >>> def bytes_saved() -> int:
    ...     saved.clear()
    ...     with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
    ...         net(torch.ones(4, 2)).sum().backward()
    ...     return sum(saved)
    >>> before = bytes_saved()
    >>> with recomputed(net, ["0"]):
    ...     before, bytes_saved()  # 4 x 2 inputs, twice 4 x 8 of tanh, 8 weights; the inputs
    (320, 32)
    """
    held = []
    try:
        for module in blocks_of(model, blocks).values():
            own = vars(module).get("forward")
            # An attribute of the instance, and no hooks: it is the only way in that leaves checkpoint(), which wants a
            # function to call, torch's public one, and that is the same in all versions. Hooks of the block are outside
            # of it, and so are not called twice.
            vars(module)["forward"] = _Recomputed(module, module.forward, own)
            held.append((module, own))
        yield
    finally:
        for module, own in held:
            if own is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = own


class _Recomputed:
    """The forward of a block, by ``torch.utils.checkpoint``."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any], own: Callable[..., Any] | None) -> None:
        self.module, self.forward, self.own = module, forward, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.module.training and torch.is_grad_enabled()):
            return self.forward(*args, **kwargs)
        if torch.compiler.is_compiling():  # which recomputes without running the code again: nothing moves twice
            return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)
        # All tensors by position: torch takes care of the random numbers of the devices of these.
        leaves, tree = pytree.tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[i] for i in places]
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

        def run(*tensors: Tensor) -> Any:
            filled = list(others)
            for i, tensor in zip(places, tensors, strict=True):
                filled[i] = tensor
            args, kwargs = pytree.tree_unflatten(filled, tree)
            return self.forward(*args, **kwargs)

        before = _Before(self.module)
        versions = [tensor._version for tensor in tensors]
        output = checkpoint(run, *tensors, use_reentrant=False, context_fn=lambda: (nullcontext(), before))
        if versions != [tensor._version for tensor in tensors]:
            raise UnsupportedModelError(
                f"a {type(self.module).__name__} that is recomputed changes its input in place, so that it cannot be "
                "computed again: begin it with inplace=False, or leave it out"
            )
        before.after_forward()
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the block computes as the block itself does, and not as this one."""
        if self.own is not None:
            return copy.deepcopy(self.own, memo)
        return type(self.module).forward.__get__(copy.deepcopy(self.module, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        if self.own is not None:
            return _itself, (self.own,)
        return getattr, (self.module, "forward")  # of one that holds nothing yet, and so not this one


class _Before:
    """What the modules of a block hold before its forward pass; in its context they hold it again.

    Masked weights are in a searched network only while it runs, and so are frozen statistics or other modes in a block
    only as long as somebody wants them; running statistics move with every forward pass, and must not do so twice.
    """

    def __init__(self, block: nn.Module) -> None:
        self.modules = list(block.modules())
        self.held = [dict(vars(module)) for module in self.modules]
        clones: dict[int, Tensor] = {}  # a buffer may stand at two places
        self.buffers = [
            [_Buffer(name, b, b._version, _kept(b, clones)) for name, b in held["_buffers"].items() if b is not None]
            for held in self.held
        ]
        self.parameters = [
            [_Parameter(name, p, p.requires_grad) for name, p in held["_parameters"].items() if p is not None]
            for held in self.held
        ]
        self.versions: list[int] = []
        self.now: list[dict[str, Any]] = []

    def after_forward(self) -> None:
        """Keep copies only of the buffers that have moved, and remember what the parameters are."""
        for of_module in self.buffers:
            of_module[:] = [b if _may_have_moved(b) else b._replace(value=b.buffer) for b in of_module]
        self.versions = self._versions()

    def _versions(self) -> list[int]:
        return [p.parameter._version for of_module in self.parameters for p in of_module]

    def __enter__(self) -> None:
        if self.versions != self._versions():
            raise RuntimeError(
                f"weights of a {type(self.modules[0]).__name__} that is recomputed were changed in place between its "
                "forward and its backward pass"
            )
        clones: dict[int, Tensor] = {}
        for module, held, buffers, parameters in zip(
            self.modules, self.held, self.buffers, self.parameters, strict=True
        ):
            attributes = vars(module)
            self.now.append(dict(attributes))
            again = {
                "_parameters": {**held["_parameters"], **{p.name: _learning(p) for p in parameters}},
                "_buffers": {**held["_buffers"], **{b.name: _fresh(b, clones) for b in buffers}},
            }
            attributes.clear()
            attributes.update({**held, **again})

    def __exit__(self, *error: object) -> None:
        for module, now in zip(self.modules, self.now, strict=True):
            vars(module).clear()
            vars(module).update(now)
        self.now = []


class _Buffer(NamedTuple):
    name: str
    buffer: Tensor
    version: int
    value: Tensor  # before the forward pass


class _Parameter(NamedTuple):
    name: str
    parameter: Tensor
    learns: bool


def _may_have_moved(held: _Buffer) -> bool:
    # Normalisations move their running statistics, which are vectors, without counting it as a change.
    return held.buffer.dim() <= 1 or held.buffer._version != held.version


def _kept(buffer: Tensor, clones: dict[int, Tensor]) -> Tensor:
    """A copy of a tensor, one for each."""
    if id(buffer) not in clones:
        clones[id(buffer)] = buffer.detach().clone().requires_grad_(buffer.requires_grad)
    return clones[id(buffer)]


def _fresh(buffer: _Buffer, clones: dict[int, Tensor]) -> Tensor:
    return buffer.buffer if buffer.value is buffer.buffer else _kept(buffer.value, clones)


def _learning(held: _Parameter) -> Tensor:
    """The parameter as it was to the forward pass: what learns says what has to be computed again."""
    tensor, learns = held.parameter, held.learns
    return tensor if tensor.requires_grad == learns else tensor.detach().requires_grad_(learns)


def _itself(own: Callable[..., Any]) -> Callable[..., Any]:
    return own


def _is_called(module: nn.Module) -> bool:
    """Whether it has a forward: lists and dicts of modules have none, nor have the folders of a ``torch.fx`` graph."""
    return "forward" in vars(module) or type(module).forward is not nn.Module.forward


def _unmatched(
    pattern: str, network: nn.Module, every: Mapping[str, nn.Module], called: Mapping[str, nn.Module]
) -> str:
    in_graph = ""
    if isinstance(network, fx.GraphModule):
        in_graph = (
            ". The network has become a torch.fx graph, because numbers in its code have to change with its widths "
            "(report() says so): its blocks do not exist in it, its layers do"
        )
    if pattern in every:
        inside = [path for path in called if path.startswith(f"{pattern}.")]
        return (
            f"blocks: {pattern!r} is a {type(every[pattern]).__name__} and is not called itself; name what is in it: "
            f"{inside[:5]}, or '{pattern}.*'{in_graph}"
        )
    near = difflib.get_close_matches(pattern, called, n=5, cutoff=0.4) or list(called)[:5]
    return f"blocks: {pattern!r} matches no module; near names are {', '.join(near)}{in_graph}"
