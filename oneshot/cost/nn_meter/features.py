"""What nn-Meter's kernel predictors are asked: which of them, and with which features, in nn-Meter's order.

Where the kernel is one that nn-Meter sees whole (square, dense, one image), the row is nn-Meter's own. Elsewhere it
is built from the true multiplications, and says so in a note. Two rows differ from nn-Meter 2.0 on purpose: global
pooling is asked at the height of its input, as predictors are trained, and not always at 1; and a fused kernel whose
whole name no predictor has is priced by its parts, and not with 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from .kernels import Kernel
from .nodes import FREE, Node

__all__ = ["Row", "rows_of"]


class Row(NamedTuple):
    """A question to a kernel predictor, whose answer in ms counts ``times`` times."""

    predictor: str
    features: tuple[float, ...]
    times: int
    notes: tuple[str, ...] = ()


def rows_of(kernel: Kernel, known: Mapping[str, int]) -> list[Row]:
    """The rows of a kernel; none if it only moves views. ``known``: predictor -> number of its features.

    A predictor that is not known is asked for all the same, and what nn-Meter has none for is a row of its own name
    without features: the caller says what these stand for.
    """
    nodes = [node for node in kernel.nodes if node.type != FREE]
    if not nodes:
        return []
    name = _predictor(tuple(node.type for node in nodes))
    if len(nodes) > 1 and (name is None or (name not in known and _HEADS.isdisjoint(n.type for n in nodes))):
        joined = "-".join(node.type for node in nodes)
        note = f"kernel {joined} priced as {' + '.join(node.type for node in nodes)}"
        rows = [row for node in nodes for row in rows_of(Kernel((node.type,), (node,), kernel.when), known)]
        return [row._replace(notes=(*row.notes, note)) for row in rows]
    if name is None:
        return [Row(nodes[0].type, (), 1)]
    node = next((node for node in nodes if node.type in _HEADS), nodes[0])
    if not _is_image(node, name):
        return [Row(f"{node.type} on {len(node.input_shapes[0])}-D tensors", (), 1)]
    return _ROWS[name](name, node, known)


_HEADS = {"conv", "dwconv", "fc"}
_WHOLE = {
    ("add", "relu"): "addrelu",
    ("bn", "relu"): "bnrelu",
    ("se", "relu"): "se",
    ("gap",): "global-avgpool",
}
_ALONE = {"add", "avgpool", "bn", "channelshuffle", "concat", "hswish", "maxpool", "relu", "se", "split"}


def _predictor(types: tuple[str, ...]) -> str | None:
    """The predictor that nn-Meter names for a kernel: of its convolution or linear layer, else by its whole name."""
    heads = [kind for kind in types if kind in _HEADS]
    if heads:
        return None if len(heads) > 1 else {"conv": "conv-bn-relu", "dwconv": "dwconv-bn-relu", "fc": "fc"}[heads[0]]
    return types[0] if len(types) == 1 and types[0] in _ALONE else _WHOLE.get(types)


def _is_image(node: Node, name: str) -> bool:
    """Whether a kernel has the tensors that nn-Meter knows: images, and vectors where these make sense."""
    n_axes = len(node.input_shapes[0])
    flat = name in ("relu", "bn", "bnrelu", "hswish", "add", "addrelu", "concat")
    return node.type == "fc" or n_axes == 4 or (flat and n_axes == 2)


Known = Mapping[str, int]


def _convolution(name: str, node: Node, known: Known) -> list[Row]:
    """[H, cin, cout, k, s, flops / 2e6, params / 1e6] with params = cout (k k cin / groups + 1), of a depthwise one
    cout (k k + 1), and flops = 2 (H / s)^2 params."""
    height, times, notes = _square(node)
    cin, cout = node.input_shapes[0][1], node.output_shape[1]
    kernel, stride = _side(node.attributes["ks"]), _side(node.attributes["strides"])
    each = 1 if node.type == "dwconv" else cin // node.attributes["groups"]
    params = cout * (kernel * kernel * each + 1)
    flops = 2 * (height / stride) ** 2 * params
    inputs = cin if node.type == "dwconv" else each
    return [Row(name, (height, inputs, cout, kernel, stride, flops / 2e6, params / 1e6), times, notes)]


def _linear(name: str, node: Node, known: Known) -> list[Row]:
    """[cin, cout, f / 2e6, f / 1e6] with f = (2 cin + 1) cout."""
    cin, cout, rows = node.input_shapes[0][-1], node.output_shape[-1], node.attributes["rows"]
    f = (2 * cin + 1) * cout
    notes = () if rows == 1 else (f"linear layer at {rows} positions priced as {rows} times one",)
    return [Row(name, (cin, cout, f / 2e6, f / 1e6), rows, (*node.notes, *notes))]


def _pool(name: str, node: Node, known: Known) -> list[Row]:
    """[H, cin, cout, k, s]."""
    height, times, notes = _square(node)
    cin, cout = node.input_shapes[0][1], node.output_shape[1]
    kernel, stride = _side(node.attributes["ks"]), _side(node.attributes["strides"])
    return [Row(name, (height, cin, cout, kernel, stride), times, notes)]


def _channels(name: str, node: Node, known: Known) -> list[Row]:
    """[H, cin]."""
    height, times, notes = _square(node)
    return [Row(name, (height, node.input_shapes[0][1]), times, notes)]


def _sum(name: str, node: Node, known: Known) -> list[Row]:
    """[H, cin, cin]: nn-Meter takes both inputs to be of one shape."""
    height, times, notes = _square(node, node.output_shape)
    return [Row(name, (height, node.output_shape[1], node.output_shape[1]), times, notes)]


def _concat(name: str, node: Node, known: Known) -> list[Row]:
    """[H, n, c1, c2, c3, c4], or without n for sets that nn-Meter's own builder made; 0 for what is not there."""
    height, times, notes = _square(node)
    widths = list(node.attributes["widths"])
    if len(widths) > 4:
        notes = (*notes, f"concatenation of {len(widths)} priced as several ones of at most 4")
    rows = []
    while True:
        first, rest = widths[:4], widths[4:]
        count = () if known.get(name) == 5 else (len(first),)
        rows.append(Row(name, (height, *count, *first, *[0] * (4 - len(first))), times, notes))
        if not rest:
            return rows
        widths = [sum(first), *rest]


_ROWS: Mapping[str, Callable[[str, Node, Known], list[Row]]] = {
    "conv-bn-relu": _convolution,
    "dwconv-bn-relu": _convolution,
    "fc": _linear,
    "maxpool": _pool,
    "avgpool": _pool,
    "global-avgpool": _channels,
    "relu": _channels,
    "bn": _channels,
    "bnrelu": _channels,
    "hswish": _channels,
    "se": _channels,
    "split": _channels,
    "channelshuffle": _channels,
    "add": _sum,
    "addrelu": _sum,
    "concat": _concat,
}


def _square(node: Node, shape: tuple[int, ...] | None = None) -> tuple[float, int, tuple[str, ...]]:
    """Height of the square image of the same area, number of images, notes. A vector is an image of height 1."""
    shape = node.input_shapes[0] if shape is None else shape
    height, width = shape[2:] if len(shape) == 4 else (1, 1)
    notes = list(node.notes)
    if height != width:
        notes.append(f"image of {height}x{width} priced as a square one of that area")
    if shape[0] != 1:
        notes.append(f"batch of {shape[0]} priced as {shape[0]} times one")
    return (height if height == width else math.sqrt(height * width)), shape[0], tuple(notes)


def _side(sizes: Sequence[int]) -> float:
    return sizes[0] if sizes[0] == sizes[1] else math.sqrt(sizes[0] * sizes[1])
