"""Which nodes of a search space can share a kernel, and what that depends on.

Across the border of a mutable, what follows a node depends on decisions. nn-Meter fuses a node with its consumer by
their types alone, so most borders are never fused across, and the nodes on both sides can be priced apart. Where they
can be, the nodes form one region, which is looked at for every combination of the decisions that matter to it. The
sum over the regions is then, for every architecture, the price of its own network (but for composites that a border
runs through, see ``composites``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple

from ...errors import UnsupportedModelError
from ...graph import Condition, Junction, Program, intersect
from .composites import with_composites
from .nodes import Node, node_of, passes_on

__all__ = ["Graph", "Piece", "graph_of", "pieces"]

_MOST_COMBINATIONS = 4096
_FOLDED_INTO = {"conv", "dwconv", "fc"}

Fusible = Callable[[str, str], bool]
"""(type of the root of a kernel, type of a consumer) -> whether nn-Meter may put the consumer into the kernel."""


class Edge(NamedTuple):
    """``reader`` reads an output of ``maker`` while ``when`` holds."""

    maker: int
    reader: int
    when: Condition


class Graph(NamedTuple):
    """The nodes of a search space in their order, by index, with the edges between them.

    ``junctions``: output of a mutable -> what stands for it; ``same``: a value -> the value it is another name of.
    """

    nodes: list[Node]
    junctions: Mapping[int, Junction]
    same: Mapping[int, int]
    edges: list[Edge]


class Piece(NamedTuple):
    """The nodes of a region that are there while ``when`` holds.

    ``reads[i]``: what node i reads, as (index of a node of this piece, or None for something from outside, the number
    of the value). ``others[i]``: how many nodes outside of the piece read node i.
    """

    nodes: list[Node]
    reads: list[list[tuple[int | None, int]]]
    others: list[int]
    when: Condition


def graph_of(program: Program) -> Graph:
    junctions = {step.output: step for step in program.steps if isinstance(step, Junction)}
    same: dict[int, int] = {}
    nodes: list[Node] = []
    for step in program.steps:
        if isinstance(step, Junction):
            continue
        if passes_on(step):
            same[step.outputs[0].number] = step.inputs[0].number
            continue
        node = node_of(step)
        if node is not None:
            nodes.append(node)
    kept = {*program.outputs, *(number for j in junctions.values() for number in j.options.values())}
    nodes = with_composites(nodes, same, kept)
    graph = Graph(nodes, junctions, same, [])
    makers = {number: i for i, node in enumerate(nodes) for number in node.outputs}
    for reader, node in enumerate(nodes):
        for number in dict.fromkeys(node.inputs):
            for source, when in _sources(graph, number, node.when):
                if source in makers:
                    both = intersect(when, nodes[makers[source]].when)
                    if both is not None:
                        graph.edges.append(Edge(makers[source], reader, both))
    return graph


def _sources(graph: Graph, number: int, when: Condition) -> Iterator[tuple[int, Condition]]:
    """The values that may stand for a number, with the conditions under which they do."""
    while number in graph.same:
        number = graph.same[number]
    junction = graph.junctions.get(number)
    if junction is None:
        yield number, when
        return
    for option, source in junction.options.items():
        here = intersect(when, junction.when)
        both = None if here is None else intersect(here, {junction.label: frozenset({option})})
        if both is not None:
            yield from _sources(graph, source, both)


def pieces(graph: Graph, fusible: Fusible, sizes: Mapping[str, int]) -> Iterator[Piece]:
    """The regions of a search space, one piece for every combination of decisions that makes a difference to one.

    UnsupportedModelError for a region that depends on more than 4,096 combinations.
    """
    ends = [(edge.maker, edge.reader) for edge in graph.edges]
    active = _active([node.type for node in graph.nodes], ends, fusible)
    leaving: dict[int, list[int]] = {}
    for e, edge in enumerate(graph.edges):
        leaving.setdefault(edge.maker, []).append(e)
    for region in _joined(len(graph.nodes), [ends[e] for e in active]):
        # How many read a node matters where it may be fused with one of them.
        shared = {i: leaving[i] for i in region if any(e in active for e in leaving.get(i, ()))}
        conditions = [graph.nodes[i].when for i in region]
        conditions += [graph.edges[e].when for edges in shared.values() for e in edges]
        for when in _combinations(conditions, sizes, graph.nodes[region[0]].path):
            yield from _split(_piece(graph, region, shared, when), fusible)


def _active(types: Sequence[str], edges: Sequence[tuple[int, int]], fusible: Fusible) -> set[int]:
    """The edges (maker, reader) across which something could be fused, for any root that a kernel may have there."""
    roots = [{kind} for kind in types]
    active: set[int] = set()
    # Nodes stand in their order, so what comes before a node is complete when it is reached.
    for e in sorted(range(len(edges)), key=lambda e: edges[e][1]):
        maker, reader = edges[e]
        joined = {root for root in roots[maker] if fusible(root, types[reader])}
        if types[reader] == "bn":
            joined |= roots[maker] & _FOLDED_INTO
        if joined:
            active.add(e)
            roots[reader] |= joined
    return active


def _split(piece: Piece, fusible: Fusible) -> Iterator[Piece]:
    """The parts of a piece between which nothing is fused under these decisions.

    What nn-Meter fuses first, where two nodes could take a third one, depends on their distance from the input. With
    parts as small as this it depends on what is fused alone, and so it is the same in the space and in its networks.
    """
    edges = [(maker, i) for i, row in enumerate(piece.reads) for maker in {m for m, _ in row} if maker is not None]
    active = _active([node.type for node in piece.nodes], edges, fusible)
    shared = {edges[e][0] for e in active}
    for part in _joined(len(piece.nodes), [edges[e] for e in active]):
        place = {i: k for k, i in enumerate(part)}
        reads = [[(place.get(-1 if m is None else m), number) for m, number in piece.reads[i]] for i in part]
        outside = [len({r for m, r in edges if m == i and r not in place}) if i in shared else 0 for i in part]
        others = [n + (piece.others[i] if i in shared else 0) for i, n in zip(part, outside, strict=True)]
        yield Piece([piece.nodes[i] for i in part], reads, others, piece.when)


def _joined(n: int, edges: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The connected parts of 0..n-1, each in order."""
    parent = list(range(n))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in edges:
        low, high = sorted((find(a), find(b)))
        parent[high] = low
    parts: dict[int, list[int]] = {}
    for i in range(n):
        parts.setdefault(find(i), []).append(i)
    return list(parts.values())


def _combinations(conditions: list[Condition], sizes: Mapping[str, int], path: str) -> Iterator[Condition]:
    """Every combination of the decisions that these conditions tell apart, as options of each label."""
    labels = dict.fromkeys(label for when in conditions for label in when)
    classes: list[list[frozenset[int]]] = []
    for label in labels:
        alike: dict[tuple[bool, ...], set[int]] = {}
        for option in range(sizes[label]):
            key = tuple(option in when[label] for when in conditions if label in when)
            alike.setdefault(key, set()).add(option)
        classes.append([frozenset(options) for options in alike.values()])
    n = 1
    for options in classes:
        n *= len(options)
    if n > _MOST_COMBINATIONS:
        raise UnsupportedModelError(
            f"latency: what is fused with {path or 'the network'} depends on {n} combinations of {list(labels)}; at "
            f"most {_MOST_COMBINATIONS} are looked at. Put an operator that is not fused between these choices"
        )
    for combination in product(*classes):
        yield dict(zip(labels, combination, strict=True))


def _piece(graph: Graph, region: list[int], shared: Mapping[int, list[int]], when: Condition) -> Piece:
    def holds(condition: Condition) -> bool:
        return all(label not in when or when[label] <= options for label, options in condition.items())

    here = [i for i in region if holds(graph.nodes[i].when)]
    place = {i: k for k, i in enumerate(here)}
    makers = {number: k for k, i in enumerate(here) for number in graph.nodes[i].outputs}
    reads = []
    for i in here:
        sources = [_decided(graph, number, when) for number in graph.nodes[i].inputs]
        reads.append([(makers.get(source), source) for source in sources])
    joined = {(k, i) for k, row in enumerate(reads) for i, _ in row if i is not None}
    others = []
    for i in here:
        readers = {graph.edges[e].reader for e in shared.get(i, ()) if holds(graph.edges[e].when)}
        others.append(sum((place.get(reader), place[i]) not in joined for reader in readers))
    return Piece([graph.nodes[i] for i in here], reads, others, when)


def _decided(graph: Graph, number: int, when: Condition) -> int:
    """The value that stands for a number under these decisions, as far as they say."""
    while True:
        if number in graph.same:
            number = graph.same[number]
            continue
        junction = graph.junctions.get(number)
        if junction is None or junction.label not in when:
            return number
        option = min(when[junction.label])
        if option not in junction.options:
            return number
        number = junction.options[option]
