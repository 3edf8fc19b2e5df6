"""The kernels that nn-Meter makes of the nodes of a network, by its own detection and a set's fusion rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, final

from ...graph import Condition
from .nodes import Node
from .package import nn_meter_package
from .regions import Piece

__all__ = ["Detector", "Kernel", "folded", "ir_of", "merged"]

_STUB = "outside"


class Kernel(NamedTuple):
    """What runs as one: ``types`` of its nodes, the root first, while ``when`` holds."""

    types: tuple[str, ...]
    nodes: tuple[Node, ...]
    when: Condition


@final
class Detector:
    """nn-Meter's kernel detection under the fusion rules of a file."""

    def __init__(self, rules: Path) -> None:
        self._detector = nn_meter_package().kernel_detector.KernelDetector(str(rules))
        reader = self._detector.splitter.rule_reader
        self._pairs = set(reader.fusible)
        # Rules of three and more types, such as BF_conv_bn_relu; composite operators are nodes already.
        for name in set(reader.fusion_units) - set(reader.multiop_blocks):
            types = name.split("-")
            self._pairs |= set(pairwise(types))
        self._known: dict[Any, list[tuple[int, ...]]] = {}

    def fusible(self, root: str, consumer: str) -> bool:
        """Whether a rule, or a part of one, puts such a consumer into a kernel of such a root."""
        return (root, consumer) in self._pairs

    def kernels(self, piece: Piece) -> list[Kernel]:
        """The kernels of a piece; each of its nodes is in one of them."""
        piece = folded(piece)
        key = tuple(
            (node.type, tuple(i for i, _ in row), tuple(n for i, n in row if i is None), others)
            for node, row, others in zip(piece.nodes, piece.reads, piece.others, strict=True)
        )
        # Values from outside by the order in which they come, so that equal blocks are looked at once.
        outside: dict[int, int] = {}
        key = tuple((t, i, tuple(outside.setdefault(n, len(outside)) for n in ns), o) for t, i, ns, o in key)
        if key not in self._known:
            self._known[key] = self._detect(piece)
        return [
            Kernel(tuple(piece.nodes[i].type for i in group), tuple(piece.nodes[i] for i in group), piece.when)
            for group in self._known[key]
        ]

    def _detect(self, piece: Piece) -> list[tuple[int, ...]]:
        self._detector.load_graph(ir_of(piece))
        groups = []
        for block in self._detector.bbs:
            names = [name for entry in block for name in entry.split(";") if name.isdigit()]
            if names:
                groups.append(tuple(int(name) for name in names))
        return groups


def merged(kernels: Iterable[Kernel]) -> list[Kernel]:
    """Each kernel once for as few conditions as possible, instead of once for each combination of decisions.

    Two conditions that differ in the options of one label hold together as one: those of a label are united, one
    label after the other. They stay exclusive, so prices still add up.
    """
    found: dict[Any, tuple[Kernel, list[Condition]]] = {}
    for kernel in kernels:
        # A layer that a BatchNorm behind the choice was folded into has the outputs of that BatchNorm.
        key = tuple((n.type, n.path, n.inputs, n.outputs, n.input_shapes, repr(n.attributes)) for n in kernel.nodes)
        found.setdefault(key, (kernel, []))[1].append(kernel.when)
    return [kernel._replace(when=when) for kernel, conditions in found.values() for when in _united(conditions)]


def _united(conditions: list[Condition]) -> list[Condition]:
    """
    >>> both = frozenset({0, 1})
    >>> every = [{"a": frozenset({k}), "b": frozenset({m})} for k in (0, 1) for m in (0, 1)]
    >>> _united(every) == [{"a": both, "b": both}]
    True
    """
    for label in conditions[0]:
        rows: dict[Any, frozenset[int]] = {}
        for when in conditions:
            others = tuple((key, options) for key, options in when.items() if key != label)
            rows[others] = rows.get(others, frozenset()) | when[label]
        conditions = [{**dict(others), label: options} for others, options in rows.items()]
    # Every pass puts its label last: after all of them they stand as they stood.
    return conditions


def ir_of(piece: Piece) -> dict[str, Any]:
    """A piece as nn-Meter's graph ("nnmeter-ir"): node names are indices, shapes are (N, H, W, C) or (N, C)."""
    ir: dict[str, Any] = {}

    def add(name: str, kind: str, inbounds: list[str], attributes: Mapping[str, Any], shapes: tuple[Any, Any]) -> None:
        body = {"type": kind, "attr": dict(attributes), "input_shape": shapes[0], "output_shape": shapes[1]}
        ir[name] = {"attr": body, "inbounds": inbounds, "outbounds": []}

    for i, (node, row) in enumerate(zip(piece.nodes, piece.reads, strict=True)):
        inbounds = [f"in{number}" if maker is None else str(maker) for maker, number in row]
        for name, shape in zip(inbounds, node.input_shapes, strict=True):
            if name not in ir:
                add(name, "Placeholder", [], {}, ([], [_nhwc(shape)]))
        attributes = {key: node.attributes[key] for key in ("ks", "strides") if key in node.attributes}
        shapes = [_nhwc(shape) for shape in node.input_shapes]
        add(str(i), node.type, list(dict.fromkeys(inbounds)), attributes, (shapes, [_nhwc(node.output_shape)]))
        for k in range(piece.others[i]):
            add(f"{_STUB}{i}_{k}", _STUB, [str(i)], {}, ([_nhwc(node.output_shape)], []))
    return ir


def _nhwc(shape: tuple[int, ...]) -> list[int]:
    return [shape[0], shape[2], shape[3], shape[1]] if len(shape) == 4 else list(shape)


def folded(piece: Piece) -> Piece:
    """BatchNorm folded into the layer before it, as every converter for these devices does."""
    nodes, reads, others = dict(enumerate(piece.nodes)), dict(enumerate(piece.reads)), dict(enumerate(piece.others))
    for i, node in enumerate(piece.nodes):
        maker = reads[i][0][0] if node.type == "bn" else None
        if maker is None or nodes[maker].type not in ("conv", "dwconv", "fc"):
            continue
        readers = [j for j in nodes if any(k == maker for k, _ in reads[j])]
        if readers == [i] and others[maker] == 0:
            # It stands where the BatchNorm stood: all that the layer reads comes before that.
            nodes[i], reads[i] = replace(nodes[maker], outputs=node.outputs), reads[maker]
            del nodes[maker], reads[maker], others[maker]
    place = {i: k for k, i in enumerate(nodes)}
    moved = [[(None if i is None else place[i], number) for i, number in reads[j]] for j in nodes]
    return Piece(list(nodes.values()), moved, [others[i] for i in nodes], piece.when)
