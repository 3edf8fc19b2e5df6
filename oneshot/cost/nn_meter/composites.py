"""Operators that nn-Meter knows by one name and networks spell out: squeeze-excite, hard-swish, channel shuffle."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from .nodes import FREE, Node

__all__ = ["with_composites"]


def with_composites(nodes: Sequence[Node], same: Mapping[int, int], kept: Collection[int]) -> list[Node]:
    """The nodes with each such chain replaced by one node, where the chain ends.

    Only chains inside one candidate, whose values nothing else reads. ``same``: a value -> the value it is another
    name of; ``kept``: values that leave the network or enter a choice.
    """
    chains = _Chains(nodes, same, kept)
    for pattern in (chains.hard_swish, chains.squeeze_excite, chains.channel_shuffle):
        for i in range(len(nodes)):
            if chains.nodes[i] is not None:
                pattern(i)
    return [node for node in chains.nodes if node is not None]


class _Chains:
    """Nodes of which some are being replaced; None where one is gone."""

    def __init__(self, nodes: Sequence[Node], same: Mapping[int, int], kept: Collection[int]) -> None:
        self.nodes: list[Node | None] = list(nodes)
        self.same = same
        self.kept = {self.source(number) for number in kept}
        self.readers: dict[int, list[int]] = {}
        for i, node in enumerate(nodes):
            for number in {self.source(number) for number in node.inputs}:
                self.readers.setdefault(number, []).append(i)

    def source(self, number: int) -> int:
        while number in self.same:
            number = self.same[number]
        return number

    def inputs(self, i: int) -> list[int]:
        return [self.source(number) for number in self._node(i).inputs]

    def _node(self, i: int) -> Node:
        node = self.nodes[i]
        assert node is not None  # only nodes that are left are followed
        return node

    def after(self, i: int, kinds: Collection[str], skip: Collection[str] = ()) -> list[int]:
        """The way from node i, which is not on it, to its only reader, if that is of one of these kinds."""
        way: list[int] = []
        while True:
            node = self._node(i)
            readers = [j for number in node.outputs for j in self.readers.get(number, ())]
            if len(readers) != 1 or not self.kept.isdisjoint(node.outputs):
                return []
            i = readers[0]
            reader = self._node(i)
            if dict(reader.when) != dict(node.when) or reader.type not in {*kinds, *skip}:
                return []
            way.append(i)
            if reader.type in kinds:
                return way

    def merge(self, chain: Sequence[int], kind: str, notes: tuple[str, ...] = ()) -> None:
        first, last = self._node(chain[0]), self._node(chain[-1])
        entry, shape = self.source(first.inputs[0]), first.input_shapes[0]
        self.readers[entry] = [j for j in self.readers[entry] if j not in chain] + [chain[-1]]
        for i in chain[:-1]:
            self.nodes[i] = None
        self.nodes[chain[-1]] = replace(
            last, type=kind, inputs=(entry,), input_shapes=(shape,), attributes={}, constant=None, notes=notes
        )

    def hard_swish(self, i: int) -> None:
        """x * relu6(x + 3) / 6, the product and the division in either order."""
        if self._node(i).type != "add-constant" or self._node(i).constant != 3.0:
            return
        chain, scale = [i], ("div-constant", "mul-constant")
        for kinds in (("relu",), ("mul", *scale), ("mul", *scale)):
            way = self.after(chain[-1], kinds)
            if not way:
                return
            chain += way
        if self._node(chain[1]).attributes.get("most") != 6:
            return
        products = [j for j in chain if self._node(j).type == "mul"]
        scalings = [self._node(j) for j in chain if self._node(j).type in scale]
        if len(products) != 1 or self.inputs(i)[0] not in self.inputs(products[0]):
            return
        by = scalings[0].constant or math.nan
        if math.isclose(by if scalings[0].type == "div-constant" else 1 / by, 6, rel_tol=1e-3):
            self.merge(chain, "hswish")

    def squeeze_excite(self, i: int) -> None:
        """gap -> conv or fc -> relu -> conv or fc -> hardsigmoid or sigmoid -> x * ., with views anywhere."""
        if self._node(i).type != "gap":
            return
        chain = [i]
        for kinds in (("conv", "fc"), ("relu",), ("conv", "fc"), ("hardsigmoid", "sigmoid"), ("mul",)):
            way = self.after(chain[-1], kinds, skip=(FREE,))
            if not way:
                return
            chain += way
        convolutions = [self._node(j) for j in chain if self._node(j).type == "conv"]
        pointwise = all(node.attributes["ks"] == [1, 1] for node in convolutions)
        if self.inputs(i)[0] not in self.inputs(chain[-1]) or not pointwise:
            return
        used = {self._node(j).type for j in chain}
        usual = used.isdisjoint(("sigmoid", "fc"))
        self.merge(
            chain, "se", () if usual else ("squeeze-excite with a sigmoid or linear layers priced as the usual one",)
        )

    def channel_shuffle(self, i: int) -> None:
        """(N, g, c, H, W) -> (N, c, g, H, W), seen as (N, g c, H, W) before and after."""
        node = self._node(i)
        if node.type != FREE or len(node.input_shapes[0]) != 4 or len(node.output_shape) != 5:
            return
        chain = [i]
        for kind in ("transpose", "copy", FREE):
            way = self.after(chain[-1], (kind,))
            if not way:
                return
            chain += way
        groups_and_channels = {tuple(axis % 5 for axis in self._node(chain[1]).attributes.get("axes", ()))} <= {
            (1, 2),
            (2, 1),
        }
        same_image = (
            node.output_shape[3:] == node.input_shapes[0][2:] and node.output_shape[0] == node.input_shapes[0][0]
        )
        if groups_and_channels and same_image and self._node(chain[-1]).output_shape == node.input_shapes[0]:
            self.merge(chain, "channelshuffle")
