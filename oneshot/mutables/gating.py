"""How the outputs of the options of a decision become one output, and what flows back.

y = sum_k w_k o_k(x) over the options of the gate. Where a single option runs in the graph with weight 1, y is
its output, and the gradients of all weights, dL/dw_k = <dL/dy, o_k(x)>, are formed in the backward pass: the
other options are evaluated there, without grad, so that the memory of a step is that of one path however many
gates learn (ProxylessNAS, arXiv 1812.00332, section 3.2 and appendix).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from ..errors import ShapeMismatchError, UnsupportedModelError
from .samplers import Gate

__all__ = ["combine", "unchanged"]

Evaluate = Callable[[int, Sequence[Tensor]], Any]
Weighted = Callable[[int, Sequence[Tensor], Tensor], Any]


def combine(
    gate: Gate,
    evaluate: Evaluate,
    inputs: Sequence[Tensor],
    describe: Callable[[int], str],
    weighted: Weighted | None = None,
) -> Any:
    """The gated sum of the options, in memory of its own.

    ``evaluate(k, inputs)`` returns the output of option k: a tensor, or a tuple, list or dict of tensors.
    ``inputs``: the tensors the options read. ``describe(k)`` names option k in errors. ``weighted(k, inputs, w)``:
    w >= 0 times that output, where the option can do this for less than a multiplication of it; else None.
    """
    if len(gate.graph) > 1:
        # EveryPath is for tracing, which has to see the parameters themselves.
        folds = gate.convex and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return _mixture(gate, evaluate, inputs, describe, weighted if folds else None)
    learns = gate.weights.requires_grad and torch.is_grad_enabled()
    others = tuple(k for k in gate.run if k not in gate.graph) if learns else ()
    first = gate.graph[0]
    if not others:
        output = evaluate(first, inputs)
        if not learns:
            return _own(output, inputs)
    else:
        with unchanged(inputs, partial(describe, first)):
            output = evaluate(first, inputs)
    alike = _Alike(output, partial(describe, first))
    leaves = alike.leaves(output, alike.name)
    return pytree.tree_unflatten(_echo(gate, others, leaves, alike, evaluate, inputs, describe), alike.tree)


def _mixture(
    gate: Gate,
    evaluate: Evaluate,
    inputs: Sequence[Tensor],
    describe: Callable[[int], str],
    weighted: Weighted | None,
) -> Any:
    """sum_k w_k o_k: those that come with their weight in them are added, the others multiplied and added in one."""
    weights = gate.weights.unbind()
    alike: _Alike | None = None
    total: list[Tensor] = []
    bare: dict[int, list[Tensor]] = {}
    n_added = 0
    for k in gate.graph:
        name = partial(describe, k)
        with unchanged([*inputs, *total, *chain.from_iterable(bare.values())], name):
            output = None if weighted is None else weighted(k, inputs, weights[k])
            has_weight = output is not None
            output = output if has_weight else evaluate(k, inputs)
        alike = alike or _Alike(output, name)
        leaves = alike.leaves(output, name)
        if has_weight:
            total = _sums(total, leaves, is_own=n_added > 1) if total else leaves
            n_added += 1
        else:
            bare[k] = leaves
        del output, leaves  # so that the next one has their memory
    if bare:
        chosen = gate.weights if len(bare) == len(weights) else torch.stack([weights[k] for k in bare])
        mixed = [_mixed(chosen, column) for column in zip(*bare.values(), strict=True)]
        total = _sums(mixed, total, is_own=True) if total else mixed
    assert alike is not None
    return pytree.tree_unflatten(total, alike.tree)


def _sums(some: list[Tensor], others: list[Tensor], *, is_own: bool) -> list[Tensor]:
    """Pairwise; in the memory of the first ones, where nobody else has it."""
    pairs = zip(some, others, strict=True)
    return [a.add_(b) if is_own and a.dtype == b.dtype else a + b for a, b in pairs]


def _mixed(weights: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    dtype = reduce(torch.promote_types, (output.dtype for output in outputs))
    if torch.compiler.is_compiling():  # which fuses single operators by itself
        return reduce(torch.add, (w.to(dtype) * output for w, output in zip(weights, outputs, strict=True)))
    mixed: Tensor = _Mixture.apply(weights, *(output.to(dtype) for output in outputs))
    return mixed


class _Mixture(torch.autograd.Function):
    """y = sum_k w_k o_k in one pass over each output; dL/do_k = w_k g, dL/dw_k = <g, o_k>. Differentiable twice.

    As single operators of autograd, the products of the inner products alone would take as long as all the rest.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, *outputs: Tensor) -> Tensor:
        ctx.save_for_backward(weights, *outputs)
        cast = weights.to(outputs[0].dtype)
        total = outputs[0] * cast[0]
        for k, output in enumerate(outputs[1:], start=1):
            total.addcmul_(output, cast[k])
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weights, *outputs = ctx.saved_tensors
        cast = weights.to(gradient.dtype)
        of_weights = None
        if ctx.needs_input_grad[0]:
            of_weights = torch.stack([_inner_product(gradient, output, weights.dtype) for output in outputs])
        needed = ctx.needs_input_grad[1:]
        return of_weights, *(gradient * w if n else None for w, n in zip(cast, needed, strict=True))


def _inner_product(one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """<one, other>, in the precision of alpha: a sum in half precision would round it, or overflow."""
    one, other = one.to(dtype), other.to(dtype)
    if one.is_contiguous() != other.is_contiguous() or one.stride() != other.stride():
        return (one * other).sum()
    # The elements of both lie in one order, whichever it is.
    flat = [t.flatten() if t.is_contiguous() else t.permute(_order(t)).flatten() for t in (one, other)]
    return torch.dot(flat[0], flat[1])


def _order(tensor: Tensor) -> list[int]:
    """The dimensions as they lie in memory."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda d: -strides[d])


def _own(output: Any, inputs: Sequence[Tensor]) -> Any:
    """``output`` without memory of the inputs: what follows may work in place, as after a sum."""
    roots = [x if x._base is None else x._base for x in inputs]

    def is_input(tensor: Tensor) -> bool:
        return any(tensor is x for x in inputs) or any(tensor is x or tensor._base is x for x in roots)

    if isinstance(output, Tensor):
        return output.clone() if is_input(output) else output
    return pytree.tree_map_only(Tensor, lambda t: t.clone() if is_input(t) else t, output)


class _Alike:
    """What the first option returned, and so all of them must: structure and shapes."""

    def __init__(self, output: Any, name: Callable[[], str]) -> None:
        leaves, self.tree = pytree.tree_flatten(output)
        self.shapes, self.name = _shapes_of(leaves, name), name
        self.is_tensor = self.tree.is_leaf()

    def leaves(self, output: Any, name: Callable[[], str]) -> list[Tensor]:
        """The tensors of an option in the order of the first one's, whatever the order of its dict."""
        try:
            leaves = [output] if self.is_tensor else self.tree.flatten_up_to(output)
        except ValueError as error:
            raise ShapeMismatchError(
                f"{name()} returns another structure than {self.name()}: {error}. The candidates of one choice must "
                "return the same tuples, lists or dicts"
            ) from error
        got = _shapes_of(leaves, name)
        if got != self.shapes:
            raise ShapeMismatchError(
                f"{name()} returns shape {_shapes(got)}, {self.name()} returns {_shapes(self.shapes)}: "
                "the candidates of one choice must return outputs of one shape"
            )
        return leaves


def _shapes_of(leaves: list[Any], name: Callable[[], str]) -> list[torch.Size]:
    wrong = [x for x in leaves if not (isinstance(x, Tensor) and x.is_floating_point())]
    if leaves and not wrong:
        return [t.shape for t in leaves]
    found = [f"a tensor of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}" for x in wrong]
    raise UnsupportedModelError(
        f"{name()} returns {' and '.join(found) or 'no tensor'}, which cannot be weighted and added; a candidate "
        "returns a tensor of real floating-point numbers, or a tuple, list or dict of them"
    )


def _shapes(shapes: list[torch.Size]) -> str:
    plain = [tuple(shape) for shape in shapes]
    return str(plain[0]) if len(plain) == 1 else str(plain)


@contextmanager
def unchanged(tensors: Sequence[Tensor], name: Callable[[], str]) -> Iterator[None]:
    """UnsupportedModelError if the option ``name()``, run inside, changes tensors in place that others read."""
    before = _versions(tensors)
    yield
    if before != _versions(tensors):
        raise UnsupportedModelError(
            f"{name()} changes its input in place, and other candidates read the same tensor: "
            "begin the candidate with inplace=False"
        )


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    if torch.compiler.is_compiling():  # which follows what is written where by itself
        return []
    return [0 if t.is_inference() else t._version for t in tensors]


def _echo(
    gate: Gate,
    others: tuple[int, ...],
    leaves: list[Tensor],
    alike: _Alike,
    evaluate: Evaluate,
    inputs: Sequence[Tensor],
    describe: Callable[[int], str],
) -> list[Tensor]:
    precision = _autocast_state(leaves[0].device.type)

    def others_on(gradients: Sequence[Tensor], saved: Sequence[Tensor], dtype: torch.dtype) -> list[tuple[int, Tensor]]:
        pairs = []
        with torch.no_grad(), precision():
            for k in others:
                with unchanged(saved, partial(describe, k)):
                    again = evaluate(k, saved)
                pairs.append((k, _inner(gradients, alike.leaves(again, partial(describe, k)), dtype)))
        return pairs

    return list(_Echo.apply(gate.weights, gate.graph[0], others_on, len(leaves), *leaves, *inputs))


class _Echo(torch.autograd.Function):
    """Identity on the active output whose backward also forms the gradients of the gate weights."""

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, active: int, others_on: Any, n_outputs: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.weights, ctx.active, ctx.others_on, ctx.n_outputs = weights.detach(), active, others_on, n_outputs
        # A copy and not a view: what follows may work in place (a ReLU, a +=), and the output is needed again.
        return tuple(t.clone() for t in tensors[:n_outputs])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: activation checkpointing unpacks once
        outputs, inputs = saved[: ctx.n_outputs], saved[ctx.n_outputs :]
        of_weights = torch.zeros_like(ctx.weights)
        of_weights[ctx.active] = _inner(gradients, outputs, of_weights.dtype)
        for k, value in ctx.others_on(gradients, inputs, of_weights.dtype):
            of_weights[k] = value
        return (of_weights, None, None, None, *gradients, *(None for _ in inputs))


def _inner(gradients: Sequence[Tensor], outputs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.stack([_inner_product(g, o, dtype) for g, o in zip(gradients, outputs, strict=True)]).sum()


def _autocast_state(device_type: str) -> Callable[[], torch.autocast]:
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled)
