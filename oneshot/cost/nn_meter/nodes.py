"""From the operators that run to the nodes that nn-Meter's graphs are made of.

nn-Meter knows about twenty kinds of operator. What it ignores of them (groups, dilation, other than square kernels,
...) is kept here as a ``note``, so that a price that is an approximation says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...graph import Condition, Operator, Value

__all__ = ["FREE", "Node", "node_of"]

FREE = "reshape"
"""The type of what moves no data: views of the same memory."""

Attributes = Mapping[str, Any]


@dataclass(frozen=True)
class Node:
    """One node of an nn-Meter graph: ``type`` as nn-Meter spells it, or the operator's own name if it has none.

    ``inputs``, ``outputs``: numbers of activations. Shapes are (N, C, H, W) or (N, C), as in PyTorch. ``constant``:
    the number that an elementwise operator has as its second operand, if it has one.
    """

    type: str
    path: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    output_shape: tuple[int, ...]
    when: Condition
    attributes: Attributes = field(default_factory=dict)
    constant: float | None = None
    notes: tuple[str, ...] = ()


def node_of(operator: Operator) -> Node | None:
    """The node of an operator; None if it computes constants or hands its input on."""
    inputs = [value for value in operator.inputs if not value.folded]
    name = operator.name.rstrip("_")
    if not inputs or name in _SAME:
        return None
    kind, attributes, notes = _KINDS.get(name, _other)(operator, inputs)
    return Node(
        kind,
        operator.path,
        tuple(value.number for value in inputs),
        tuple(value.number for value in operator.outputs),
        tuple(value.shape for value in inputs),
        operator.outputs[0].shape,
        operator.when,
        attributes,
        _constant(operator),
        notes,
    )


_SAME = {"detach", "alias", "lift_fresh"}
"""Operators whose result is their input; see ``passes_on``."""


def passes_on(operator: Operator) -> bool:
    """Whether the output of an operator is its input, in another name."""
    return operator.name.rstrip("_") in _SAME


Kind = tuple[str, Attributes, tuple[str, ...]]


def _convolution(o: Operator, inputs: list[Value]) -> Kind:
    _, weight, _, stride, _, dilation, transposed, _, groups = o.args[:9]
    d = len(weight.shape) - 2
    cin, cout = inputs[0].shape[1], o.outputs[0].shape[1]
    kernel, strides = [int(k) for k in weight.shape[2:]], _all(stride, d)
    attributes = {"ks": kernel, "strides": strides, "groups": int(groups)}
    if d != 2 or transposed:
        return f"conv{'transpose' if transposed else ''}{d}d", attributes, ()
    notes = []
    if any(step != 1 for step in _all(dilation, d)):
        notes.append(f"dilation {_by(_all(dilation, d))} priced as 1")
    if kernel[0] != kernel[1]:
        notes.append(f"kernel {_by(kernel)} priced as a square one of that area")
    if strides[0] != strides[1]:
        notes.append(f"stride {_by(strides)} priced as a square one of that area")
    if groups > 1 and groups == cin:
        if cout != cin:
            notes.append(f"depthwise convolution with {cout // cin} outputs per channel priced by its MACs")
        return "dwconv", attributes, tuple(notes)
    if groups > 1:
        notes.append(f"{groups} groups priced as a dense convolution of {cin // groups} input channels")
    return "conv", attributes, tuple(notes)


def _linear(o: Operator, inputs: list[Value]) -> Kind:
    by_row = o.args[1 if o.name == "addmm" else 0]  # and not the weight, nor a bias that is computed
    if len(inputs) > 1 or by_row.folded:
        return "matmul", {}, ()
    rows = 1
    for size in inputs[0].shape[:-1]:
        rows *= size
    return "fc", {"rows": rows}, ()


def _batch_norm(o: Operator, inputs: list[Value]) -> Kind:
    # With the statistics of the batch, or of each image, it cannot be folded into anything.
    by_batch = o.name in ("native_batch_norm", "cudnn_batch_norm") and bool(o.args[5])
    return ("batch-statistics-norm" if by_batch else "bn"), {}, ()


def _relu(o: Operator, inputs: list[Value]) -> Kind:
    return "relu", {}, ()


def _clamp(o: Operator, inputs: list[Value]) -> Kind:
    default: dict[str, Any] = {"min_val": -1.0, "max_val": 1.0} if "hardtanh" in o.name else {}
    names = ("min_val", "max_val") if default else ("min", "max")
    given = {**default, **dict(zip(names, o.args[1:], strict=False)), **o.kwargs}
    return ("relu" if given.get(names[0]) == 0 else "clip"), {"most": given.get(names[1])}, ()


def _elementwise(o: Operator, inputs: list[Value]) -> Kind:
    name = o.name.rstrip("_")
    if len(inputs) == 1:
        usual = o.kwargs.get("alpha", 1) == 1 and o.kwargs.get("rounding_mode") is None
        return f"{name}-constant" if usual else f"{name}-with-options", {}, ()
    shapes = {value.shape for value in inputs}
    return name, {}, () if len(shapes) == 1 else (f"{name} of different shapes priced as of the larger one",)


def _pool(o: Operator, inputs: list[Value]) -> Kind:
    kernel = _all(o.args[1], 2)
    strides = _all(o.args[2], 2) if len(o.args) > 2 and o.args[2] else kernel
    kind = "maxpool" if "max" in o.name else "avgpool"
    if kind == "avgpool" and o.outputs[0].shape[2:] == (1, 1) and tuple(kernel) == inputs[0].shape[2:]:
        return "gap", {}, ()
    notes = _square_notes(kernel, strides)
    dilation = _all(o.args[4], 2) if kind == "maxpool" and len(o.args) > 4 else [1, 1]
    if dilation != [1, 1]:
        notes = (*notes, f"dilation {_by(dilation)} of a pool priced as 1")
    return kind, {"ks": kernel, "strides": strides}, notes


def _adaptive_pool(o: Operator, inputs: list[Value]) -> Kind:
    (height, width), (rows, columns) = inputs[0].shape[-2:], o.outputs[0].shape[-2:]
    if (rows, columns) == (1, 1):
        return "gap", {}, ()
    strides = [height // rows, width // columns]
    kernel = [height - (rows - 1) * strides[0], width - (columns - 1) * strides[1]]
    return "avgpool", {"ks": kernel, "strides": strides}, _square_notes(kernel, strides)


def _mean(o: Operator, inputs: list[Value]) -> Kind:
    shape, axes = inputs[0].shape, o.args[1] if len(o.args) > 1 else None
    over = sorted(axis % len(shape) for axis in axes) if axes else []
    return ("gap" if len(shape) == 4 and over == [2, 3] else "mean"), {}, ()


def _view(o: Operator, inputs: list[Value]) -> Kind:
    return FREE, {}, ()


def _split(o: Operator, inputs: list[Value]) -> Kind:
    if all(value.shape == inputs[0].shape for value in o.outputs):
        return FREE, {}, ()  # x[:] and the like
    notes = [] if o.name.startswith("split") else [f"{o.name} priced as split"]
    axis = (o.args[2] if len(o.args) > 2 else o.kwargs.get("dim", 0)) if not notes else 1
    if axis % len(inputs[0].shape) != 1:
        notes.append(f"split along axis {axis} priced as one of channels")
    return "split", {}, tuple(notes)


def _concat(o: Operator, inputs: list[Value]) -> Kind:
    axis = (o.args[1] if len(o.args) > 1 else o.kwargs.get("dim", 0)) % len(inputs[0].shape)
    widths = [value.shape[1] for value in o.args[0]]  # constants (coordinates, zeros) are copied too
    notes = () if axis == 1 else (f"concatenation along axis {axis} priced as one of channels",)
    return "concat", {"widths": widths}, notes


def _transpose(o: Operator, inputs: list[Value]) -> Kind:
    return "transpose", {"axes": tuple(o.args[1:3])}, ()


def _named(kind: str) -> Callable[[Operator, list[Value]], Kind]:
    return lambda o, inputs: (kind, {}, ())


def _other(o: Operator, inputs: list[Value]) -> Kind:
    return o.name.rstrip("_"), {}, ()


_KINDS: Mapping[str, Callable[[Operator, list[Value]], Kind]] = {
    "convolution": _convolution,
    "addmm": _linear,
    "mm": _linear,
    "linear": _linear,
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "cudnn_batch_norm": _batch_norm,
    "relu": _relu,
    "hardtanh": _clamp,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "hardswish": _named("hswish"),
    "silu": _named("swish"),
    "add": _elementwise,
    "mul": _elementwise,
    "sub": _elementwise,
    "div": _elementwise,
    "cat": _concat,
    "max_pool2d_with_indices": _pool,
    "max_pool2d": _pool,
    "avg_pool2d": _pool,
    "_adaptive_avg_pool2d": _adaptive_pool,
    "mean": _mean,
    "view": _view,
    "_unsafe_view": _view,
    "_reshape_alias": _view,
    "squeeze": _view,
    "unsqueeze": _view,
    "expand": _view,
    "split": _split,
    "split_with_sizes": _split,
    "slice": _split,
    "select": _split,
    "native_channel_shuffle": _named("channelshuffle"),
    "channel_shuffle": _named("channelshuffle"),
    "t": _transpose,
    "permute": _named("transpose"),
    "transpose": _transpose,
    "clone": _named("copy"),
}


def _constant(operator: Operator) -> float | None:
    second = operator.args[1] if len(operator.args) > 1 else None
    return float(second) if isinstance(second, int | float) and not isinstance(second, bool) else None


def _square_notes(kernel: list[int], strides: list[int]) -> tuple[str, ...]:
    if kernel[0] == kernel[1] and strides[0] == strides[1]:
        return ()
    return (f"pool of {_by(kernel)}, stride {_by(strides)}, priced as a square one of that area",)


def _all(size: Any, d: int) -> list[int]:
    sizes = [int(s) for s in size] if isinstance(size, list | tuple) else [int(size)]
    return sizes * d if len(sizes) == 1 else sizes


def _by(sizes: list[int]) -> str:
    return "x".join(map(str, sizes))
