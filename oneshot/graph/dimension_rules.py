"""What each operator does to labelled dimensions: a table from the operator's name to a rule.

A rule gets the labels so far, the operator, and the labels of its tensors, and returns those of its outputs. What is
not in the table is pointwise if torch says so (``torch.Tag.pointwise``); all else freezes the labels it touches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .labels import Label, Labelled, Labels, atoms_of, dims_of
from .operators import Operator, Value

__all__ = ["RULES", "Given", "Rule", "is_product", "rule_for"]


class Given:
    """One call of an operator, with the labels of the tensors it got.

    ``literal``: the numbers in its arguments can be rewritten, so that labels may move where they say.
    """

    def __init__(
        self,
        labels: Labels,
        operator: Operator,
        known: Mapping[int, Labelled],
        integers: Mapping[int, Tensor],
        literal: bool = False,
    ) -> None:
        self.labels, self.operator, self.known, self.integers = labels, operator, known, integers
        self.literal = literal
        self.name, self.args, self.kwargs = operator.name, operator.args, operator.kwargs
        self.out_shapes = [value.shape for value in operator.outputs]

    def of(self, value: Value) -> Labelled:
        return self.known.get(value.number, Labelled(value.shape))

    @property
    def first(self) -> Labelled:
        return self.of(self.operator.inputs[0])

    def argument(self, place: int, name: str, default: Any) -> Any:
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    def dims(self, place: int, name: str, rank: int) -> list[int]:
        given = self.argument(place, name, None)
        if given is None or given == []:
            return list(range(rank))
        return [d % rank for d in ([given] if isinstance(given, int) else given)]

    def freeze(self, *operands: Labelled, why: str) -> None:
        for operand in operands:
            self.labels.freeze(operand.labels, f"{self.operator.name}{self.place}: {why}")

    @property
    def place(self) -> str:
        return f" in {self.operator.path}" if self.operator.path else ""

    @property
    def what(self) -> str:
        return f"{self.operator.name}{self.place}"


Rule: TypeAlias = Callable[[Given], list[Labelled]]


def rule_for(name: str) -> Rule:
    """The rule of an operator by its ATen name; in-place forms follow the rule of the other one."""
    base = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    if name in RULES or base in RULES:
        return RULES[name] if name in RULES else RULES[base]
    if "batch_norm" in base:
        return _batch_norm
    return _pointwise if _is_pointwise(base) else _unknown


def is_product(name: str) -> bool:
    """Whether an operator sums products."""
    return RULES.get(name.rstrip("_")) in (_convolution, _product, _added_product, _linear, _attention)


@cache
def _is_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    overloads = [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]
    return any(torch.Tag.pointwise in overload.tags for overload in overloads)


# --- pointwise ----------------------------------------------------------------------------------------------------


def _pointwise(given: Given) -> list[Labelled]:
    operands = [given.of(value) for value in given.operator.inputs]
    return [given.labels.pointwise(operands, given.what)]


def _unknown(given: Given) -> list[Labelled]:
    given.freeze(*(given.of(v) for v in given.operator.inputs), why="an operator that is not followed")
    return []


def _unlabelled(given: Given) -> list[Labelled]:
    return []


def _same(given: Given) -> list[Labelled]:
    """The first input with other numbers, or in another place."""
    return [given.first]


def _filled(given: Given) -> list[Labelled]:
    """As large as the first input, whatever is in it."""
    return [Labelled(given.first.shape, given.first.labels)]


# --- movement -----------------------------------------------------------------------------------------------------


def _moved(given: Given) -> list[Labelled]:
    """The operator itself, on labels that stand for every element."""
    packet = getattr(torch.ops.aten, given.name.rstrip("_") if given.name.endswith("_") else given.name)
    source, shape = given.first, given.out_shapes[0]
    before = given.operator.inputs[0].shape

    def move(label: Label) -> Label:
        moved: Label = packet(label.expand(before), *given.args[1:], **given.kwargs)
        return moved

    return [given.labels.compact(source.moved(move, shape), given.what)]


def _viewed(given: Given) -> list[Labelled]:
    """Other dimensions on the same elements in the same order."""
    source, shape = given.first, given.out_shapes[0]
    before = given.operator.inputs[0].shape
    result = Labelled(shape, tuple(s.expand(before).reshape(shape) for s in source.labels), source.weight)
    small = Labelled(shape, tuple(given.labels._compact(s) for s in result.labels), source.weight)
    given.labels.rectangular(source, small, given.what)
    return [given.labels.compact(small, given.what)]


def _as_strided(given: Given) -> list[Labelled]:
    return [given.first] if given.out_shapes[0] == given.first.shape else _unknown(given)


def _pixel_shuffle(given: Given) -> list[Labelled]:
    """(C r^2, H, W) -> (C, H r, W r): the r^2 channels of one output channel are a unit."""
    r, shape = given.args[1], given.out_shapes[0]
    channel = len(shape) - 3
    found = []
    for label in given.first.labels:
        if dims_of(label) != {channel}:
            given.labels.freeze([label], f"{given.what}: moves along another dimension")
            continue
        blocks = label.reshape(-1, r * r)
        one = given.labels.tied(blocks, {1}, given.what)
        found.append(one.reshape([-1 if d == channel else 1 for d in range(len(shape))]))
    return [Labelled(shape, tuple(found))]


def _shuffled(given: Given) -> list[Labelled]:
    """Channels as a (groups, C / groups) grid, transposed."""
    groups, shape = given.args[1], given.first.shape
    found = []
    for label in given.first.labels:
        if dims_of(label) == {1}:
            grid = label.reshape(groups, -1)
            given.labels.grids.append((grid, given.what))
            label = grid.t().reshape(label.shape)
        else:
            given.labels.freeze([label], f"{given.what}: moves along another dimension")
        found.append(label)
    return [Labelled(shape, tuple(found))]


def _split(given: Given) -> list[Labelled]:
    """Pieces of one dimension. Equal ones keep their places in step; others have bounds that cannot move."""
    name, source = given.name, given.first
    dim = given.argument(1 if name == "unbind" else 2, "dim", 0) % len(source.shape)
    lengths = [1] * len(given.out_shapes) if name == "unbind" else [shape[dim] for shape in given.out_shapes]
    if len(lengths) == 1 and name != "unbind":
        return [source]
    labels = []
    for label in source.labels:
        if dim in dims_of(label):
            label = _split_label(given, label, dim, lengths)
        labels.append(label)
    results = []
    start = 0
    for length, shape in zip(lengths, given.out_shapes, strict=True):
        pieces = [s.narrow(dim, start, length) if s.shape[dim] > 1 else s for s in labels]
        pieces = [s.squeeze(dim) for s in pieces] if name == "unbind" else pieces
        results.append(given.labels.compact(Labelled(shape, tuple(pieces), source.weight), given.what))
        start += length
    return results


def _split_label(given: Given, label: Label, dim: int, lengths: Sequence[int]) -> Label:
    if given.name == "unbind":
        if len(dims_of(label)) > 1:  # (3, heads, d): its other dimensions keep the label, this one keeps its length
            return given.labels.tied(label, {dim}, given.what)
        given.labels.freeze([label], f"{given.what}: single positions of it are taken")
    elif given.literal:
        return label
    elif len(set(lengths)) > 1:
        given.labels.freeze([label], f"{given.what}: pieces of fixed lengths {list(lengths)}")
    elif len(dims_of(label)) > 1:
        given.labels.freeze([label], f"{given.what}: of a dimension that is a part of another one")
    else:
        given.labels.grids.append((label.reshape(len(lengths), -1), given.what))
    return label


def _glu(given: Given) -> list[Labelled]:
    """a * sigmoid(b) with the halves a, b of one dimension."""
    source, shape = given.first, given.out_shapes[0]
    dim = given.argument(1, "dim", -1) % len(shape)
    halves = []
    for start in (0, shape[dim]):
        labels = tuple(s.narrow(dim, start, shape[dim]) if s.shape[dim] > 1 else s for s in source.labels)
        halves.append(Labelled(shape, labels))
    return [given.labels.pointwise(halves, given.what)]


def _slice(given: Given) -> list[Labelled]:
    """``x[a:b:c]`` and ``x[i]`` along one dimension."""
    source, shape = given.first, given.out_shapes[0]
    dim = given.argument(1, "dim", 0) % len(source.shape)
    if shape == source.shape:
        return [source]
    labels = []
    for label in source.labels:
        if given.literal or dim not in dims_of(label):
            pass
        elif given.name == "select" and len(dims_of(label)) > 1:
            label = given.labels.tied(label, {dim}, given.what)
        else:
            given.labels.freeze([label], f"{given.what}: positions that the code names")
        labels.append(label)
    packet = getattr(torch.ops.aten, given.name)

    def cut(label: Label) -> Label:
        if label.shape[dim] > 1:
            piece: Label = packet(label, *given.args[1:], **given.kwargs)
            return piece
        return label.squeeze(dim) if given.name == "select" else label

    moved = [cut(label) for label in labels]
    return [given.labels.compact(Labelled(shape, tuple(moved), source.weight), given.what)]


def _index(given: Given) -> list[Labelled]:
    """Indexing by tensors: what is indexed keeps its places; other dimensions move along."""
    source, shape = given.first, given.out_shapes[0]
    places = [given.args[2]] if given.name == "index_select" else given.args[1]
    dims = [given.args[1] % len(source.shape)] if given.name == "index_select" else list(range(len(places)))
    indexed = {d for d, place in zip(dims, places, strict=True) if place is not None}
    others = [given.of(place) for place in places if isinstance(place, Value)]
    given.freeze(*others, why="used as an index")
    if given.literal and len(indexed) == 1:
        (dim,) = indexed
        chosen = _chosen(given, places[dims.index(dim)])
        if chosen is not None:
            return [_taken(given, source, dim, chosen)]
    labels = []
    for label in source.labels:
        if dims_of(label) & indexed:
            given.labels.freeze([label], f"{given.what}: positions that the code names")
        else:
            labels.append(label)
    tensors = [None if place is None else given.integers.get(place.number) for place in places]
    if any(place is not None and tensor is None for place, tensor in zip(places, tensors, strict=True)):
        # Positions known only when it runs: the rest of the labels would move in a way nobody can say.
        given.labels.freeze(labels, f"{given.what}: next to positions that depend on the input")
        return []
    packet = getattr(torch.ops.aten, given.name)
    arguments = (given.args[1], tensors[0]) if given.name == "index_select" else (tensors,)

    def take(label: Label) -> Label:
        taken: Label = packet(label.expand(given.operator.inputs[0].shape), *arguments)
        return taken

    return [given.labels.compact(Labelled(shape, tuple(take(s) for s in labels)), given.what)]


def _chosen(given: Given, index: Value) -> Tensor | None:
    """The positions that a constant vector of integers or flags names."""
    tensor = given.integers.get(index.number)
    if tensor is None or tensor.dim() != 1:
        return None
    return tensor.nonzero().flatten() if tensor.dtype is torch.bool else tensor.to("cpu", torch.int64)


def _taken(given: Given, source: Labelled, dim: int, chosen: Tensor) -> Labelled:
    places = chosen % source.shape[dim]

    def take(label: Label) -> Label:
        return label.index_select(dim, places) if label.shape[dim] > 1 else label

    return given.labels.compact(source.moved(take, given.out_shapes[0]), given.what)


def _embedding(given: Given) -> list[Labelled]:
    """Rows of a table by indices: (N, F), (...) -> (..., F)."""
    table, shape = given.first, given.out_shapes[0]
    rows = [s for s in table.labels if 0 in dims_of(s)]
    given.labels.freeze(rows, f"{given.what}: rows that the input names")
    found = [s.reshape([1] * (len(shape) - 1) + [-1]) for s in table.labels if dims_of(s) == {1}]
    return [Labelled(shape, tuple(found))]


def _cat(given: Given) -> list[Labelled]:
    parts = [given.of(value) for value in given.args[0]]
    shape = given.out_shapes[0]
    dim = given.argument(1, "dim", 0) % len(shape)
    parts = [part for part in parts if part.shape != (0,)]  # an empty tensor may be a neutral start
    if given.name == "stack":
        parts = [p.moved(lambda s: s.unsqueeze(dim), (*p.shape[:dim], 1, *p.shape[dim:])) for p in parts]
    parts = [given.labels.compact(part, given.what) for part in parts]
    across = [
        Labelled(
            tuple(1 if d == dim else n for d, n in enumerate(part.shape)),
            tuple(s for s in part.labels if dim not in dims_of(s)),
        )
        for part in parts
    ]
    result = given.labels.pointwise(across, given.what)
    along = [[s for s in part.labels if dim in dims_of(s)] for part in parts]
    return [Labelled(shape, (*result.labels, *_joined(given, parts, along, dim)))]


def _joined(given: Given, parts: Sequence[Labelled], along: Sequence[list[Label]], dim: int) -> list[Label]:
    """The labels along the dimension of a concatenation; parts without one have fixed positions there."""
    if not any(along):
        return []
    if any(len(labels) > 1 for labels in along):
        given.labels.freeze([s for labels in along for s in labels], f"{given.what}: several labels along it")
        return []
    varying = set().union(*(dims_of(s) for labels in along for s in labels))
    pieces = []
    for part, labels in zip(parts, along, strict=True):
        shape = [n if d in varying else 1 for d, n in enumerate(part.shape)]
        pieces.append(labels[0].expand(shape) if labels else torch.zeros(shape, dtype=torch.int64))
    return list(given.labels.compact(Labelled((), (torch.cat(pieces, dim),)), given.what).labels)


def _padded(given: Given) -> list[Labelled]:
    """Positions that are added have a fixed place. Those that are cropped were named by the code."""
    source, shape, pad = given.first, given.out_shapes[0], given.args[1]
    rank = len(shape)
    sides = {rank - 1 - i // 2: (pad[i], pad[i + 1]) for i in range(0, len(pad), 2) if pad[i] or pad[i + 1]}
    found = []
    for label in source.labels:
        touched = {d: sides[d] for d in sides if d in dims_of(label)}
        if any(min(amounts) < 0 for amounts in touched.values()) and not given.literal:
            given.labels.freeze([label], f"{given.what}: positions that the code crops")
            return []
        full = [touched.get(rank - 1 - i // 2, (0, 0))[i % 2] for i in range(2 * rank)]
        found.append(torch.constant_pad_nd(label, full, 0))
    return [given.labels.compact(Labelled(shape, tuple(found)), given.what)]


# --- products -----------------------------------------------------------------------------------------------------


def _convolution(given: Given) -> list[Labelled]:
    """x (N, C, ...), weight (O, C / groups, ...), or (C, O / groups, ...) if transposed."""
    x, weight = given.of(given.args[0]), given.of(given.args[1])
    bias = given.of(given.args[2]) if isinstance(given.args[2], Value) else None
    transposed, groups = given.args[6], given.args[8]
    labels, out = given.labels, given.out_shapes[0]
    kernel = [s for s in weight.labels if max(dims_of(s)) > 1]
    labels.freeze(kernel, "a kernel")
    elsewhere = [s for s in x.labels if dims_of(s) != {1}]
    labels.freeze(elsewhere, f"{given.what}: not the channels of its input")
    inner, outer = (0, 1) if transposed else (1, 0)
    w_in = tuple(s.reshape(-1) for s in weight.labels if dims_of(s) == {inner})
    w_out = tuple(s.reshape(-1) for s in weight.labels if dims_of(s) == {outer})
    x_in = tuple(s.reshape(-1) for s in x.labels if dims_of(s) == {1})
    channels = x.shape[1]
    if groups == 1:
        columns = Labelled((channels,), w_in, weight.weight)
        entering = Labelled((channels,), x_in, fixed=x.fixed)
        labels.pointwise([entering, columns], given.what)
        labels.sum_over([entering, columns], 0, given.what)
        rows = w_out
    elif transposed:
        labels.freeze([*x_in, *w_in, *w_out], f"{given.what}: a transposed convolution with groups")
        rows = ()
    else:
        labels.freeze(w_in, f"{given.what}: columns within its {groups} groups")
        rows = _whole_groups(given, x_in, w_out, groups)
    result = Labelled((out[1],), rows)
    if bias is not None:
        result = labels.pointwise([result, bias], given.what)
    spread = [1, -1] + [1] * (len(out) - 2)
    return [Labelled(out, tuple(s.reshape(spread) for s in result.labels))]


def _whole_groups(given: Given, x_in: tuple[Label, ...], w_out: tuple[Label, ...], groups: int) -> tuple[Label, ...]:
    """The inputs and outputs of one group of a convolution are a unit."""
    if len(x_in) != 1 or len(w_out) != 1:
        given.labels.freeze([*x_in, *w_out], f"{given.what}: {groups} groups of an input that is not cut")
        return w_out
    units, why = given.labels.units, f"{given.what}, its groups"
    entering, leaving = atoms_of(x_in[0]).reshape(groups, -1), atoms_of(w_out[0]).reshape(groups, -1)
    units.unite(entering, entering[:, :1], why)
    units.unite(leaving, entering[:, :1], why)
    return w_out


def _product(given: Given) -> list[Labelled]:
    """mm, bmm, matmul, mv, dot."""
    one, other = given.of(given.args[0]), given.of(given.args[1])
    return [_matmul(given, one, other)]


def _matmul(given: Given, one: Labelled, other: Labelled) -> Labelled:
    row, column = len(one.shape) == 1, len(other.shape) == 1
    if row:
        one = one.moved(lambda s: s.unsqueeze(0), (1, *one.shape))
    if column:
        other = other.moved(lambda s: s.unsqueeze(-1), (*other.shape, 1))
    rank = max(len(one.shape), len(other.shape))
    result = given.labels.contract(one.aligned(rank), other.aligned(rank), given.what)
    if column:
        result = result.moved(lambda s: s.squeeze(-1), result.shape[:-1])
    if row:
        at = -1 if column else -2
        kept = list(result.shape)
        del kept[at]
        result = result.moved(lambda s: s.squeeze(at), kept)
    return result


def _added_product(given: Given) -> list[Labelled]:
    """addmm, baddbmm: b + x @ y."""
    bias, one, other = (given.of(value) for value in given.args[:3])
    return [given.labels.pointwise([_matmul(given, one, other), bias], given.what)]


def _linear(given: Given) -> list[Labelled]:
    x, weight = given.of(given.args[0]), given.of(given.args[1])
    result = _matmul(given, x, weight.moved(lambda s: s.t(), weight.shape[::-1]))
    if len(given.args) > 2 and given.args[2] is not None:
        result = given.labels.pointwise([result, given.of(given.args[2])], given.what)
    return [result]


def _attention(given: Given) -> list[Labelled]:
    """softmax(q k^T) v: the size of a head is summed over, so that whole heads are units."""
    q, k, v = (given.of(value) for value in given.args[:3])
    if not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        given.freeze(q, k, v, why="heads that share keys and values")
        return []
    turned = k.moved(lambda s: s.transpose(-1, -2), (*k.shape[:-2], k.shape[-1], k.shape[-2]))
    scores = given.labels.contract(q, turned, given.what)
    mask = given.kwargs.get("attn_mask")
    if isinstance(mask, Value):
        scores = given.labels.pointwise([scores, given.of(mask)], given.what)
    given.labels.reduce(scores, [len(scores.shape) - 1], f"{given.what}: softmax over it")
    return [given.labels.contract(scores, v, given.what)]


# --- reductions and windows ---------------------------------------------------------------------------------------

_KIND = {"mean": "a mean over it", "sum": "summed over without a weight to mask"}


def _reduced(given: Given) -> list[Labelled]:
    source = given.first
    rank = len(source.shape)
    place = 2 if given.name in ("linalg_vector_norm", "norm") else 1
    dims = given.dims(place, "dim", rank)
    why = _KIND.get(given.name, "a value of the whole dimension")
    result = given.labels.reduce(source, dims, f"{given.what}: {why}")
    outputs = []
    for shape in given.out_shapes:
        kept = [d for d in range(rank) if d not in dims]
        if len(shape) == rank:
            outputs.append(Labelled(shape, result.labels))
        else:
            moved = tuple(s.reshape([s.shape[d] for d in kept]) for s in result.labels)
            outputs.append(Labelled(shape, moved))
    return outputs


def _along(given: Given) -> list[Labelled]:
    """softmax, cumulative sums and sorting: along a dimension that stays."""
    source = given.first
    place = 2 if given.name == "topk" else 1
    dim = given.argument(place, "dim", -1)
    if not isinstance(dim, int) or isinstance(dim, bool):  # sort.stable has its flag first
        dim = given.kwargs.get("dim", -1)
    dim %= max(1, len(source.shape))
    touched = [s for s in source.labels if dim in dims_of(s)]
    given.labels.freeze(touched, f"{given.what}: all along it meet")
    kept = tuple(s for s in source.labels if dim not in dims_of(s))
    return [Labelled(shape, kept) for shape in given.out_shapes]


def _windowed(given: Given) -> list[Labelled]:
    """Pooling, interpolation and padding by reflection: over the last dimensions, each channel for itself."""
    source = given.first
    space = next((int(k) for k in "123" if f"{k}d" in given.name), 2)
    inside = range(len(source.shape) - space, len(source.shape))
    touched = [s for s in source.labels if dims_of(s) & set(inside)]
    given.labels.freeze(touched, f"{given.what}: a window over it")
    kept = tuple(s for s in source.labels if not dims_of(s) & set(inside))
    return [Labelled(shape, kept) for shape in given.out_shapes]


def _triangle(given: Given) -> list[Labelled]:
    rank = len(given.first.shape)
    touched = [s for s in given.first.labels if dims_of(s) & {rank - 1, rank - 2}]
    given.labels.freeze(touched, f"{given.what}: a diagonal of it")
    return [given.first]


# --- normalisation ------------------------------------------------------------------------------------------------


def _batch_norm(given: Given) -> list[Labelled]:
    x = given.first
    vectors = [given.of(value) for value in given.args[1:5] if isinstance(value, Value) and value.shape]
    spread = [1, -1] + [1] * (len(x.shape) - 2)
    shaped = [v.moved(lambda s: s.reshape(spread), [1, v.shape[0], *spread[2:]]) for v in vectors if v.shape != (0,)]
    return [given.labels.pointwise([x, *shaped], given.what)]


def _layer_norm(given: Given) -> list[Labelled]:
    """Statistics over the last dimensions: what they are taken over cannot be cut without changing them."""
    x, rank = given.first, len(given.first.shape)
    inside = list(range(rank - len(given.args[1]), rank))
    given.labels.reduce(x, inside, f"{given.what}: normalised over it")
    vectors = [given.of(value) for value in given.args[2:4] if isinstance(value, Value)]
    return [given.labels.pointwise([x, *vectors], given.what)]


def _group_norm(given: Given) -> list[Labelled]:
    """The channels of one group share statistics: a unit is a whole group."""
    x = given.first
    native = given.name == "native_group_norm"
    groups = given.args[6] if native else given.args[1]
    vectors = [v for v in (given.args[1:3] if native else given.args[2:4]) if isinstance(v, Value)]
    for label in x.labels:
        if dims_of(label) == {1}:
            given.labels.tied(label.reshape(groups, -1), {1}, f"{given.what}, its groups")
        else:
            given.labels.freeze([label], f"{given.what}: not the channels of its input")
    if groups == 1:
        given.freeze(x, why="normalised over it")
    spread = [1, -1] + [1] * (len(x.shape) - 2)
    shaped = [given.of(v).moved(lambda s: s.reshape(spread), [1, v.shape[0], *spread[2:]]) for v in vectors]
    return [given.labels.pointwise([x, *shaped], given.what)]


def _named(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


_WINDOWS = (
    "max_pool{}_with_indices max_pool{} avg_pool{} adaptive_avg_pool{} _adaptive_avg_pool{} adaptive_max_pool{} "
    "upsample_nearest{} _upsample_nearest_exact{} reflection_pad{} replication_pad{}"
)
_ATTENTIONS = (
    "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math "
    "_scaled_dot_product_fused_attention_overrideable"
)

RULES: dict[str, Rule] = {
    **_named("clone alias detach contiguous lift_fresh lift _to_copy positive dropout native_dropout", _same),
    **_named("alpha_dropout feature_dropout celu elu gelu hardswish silu mish", _same),
    **_named("zeros_like ones_like empty_like rand_like randn_like full_like", _filled),
    **_named("bernoulli bernoulli_ zero_ fill_ uniform_ normal_", _filled),
    **_named("empty new_zeros new_ones new_empty new_full _local_scalar_dense equal sym_size", _unlabelled),
    **_named("permute transpose t expand unsqueeze squeeze flip repeat movedim swapaxes broadcast_to", _moved),
    **_named("pixel_unshuffle", _moved),
    **_named("view _unsafe_view reshape _reshape_alias view_copy", _viewed),
    **_named("as_strided", _as_strided),
    **_named("pixel_shuffle", _pixel_shuffle),
    **_named("native_channel_shuffle channel_shuffle", _shuffled),
    **_named("split split_with_sizes unsafe_split chunk unsafe_chunk unbind", _split),
    **_named("glu", _glu),
    **_named("slice select", _slice),
    **_named("index index_select", _index),
    **_named("embedding", _embedding),
    **_named("cat stack", _cat),
    **_named("constant_pad_nd", _padded),
    **_named("convolution _convolution convolution_overrideable", _convolution),
    **_named("mm bmm matmul mv dot", _product),
    **_named("addmm baddbmm", _added_product),
    **_named("linear", _linear),
    **_named(_ATTENTIONS, _attention),
    **_named("mean sum amax amin max min prod var std var_mean std_mean logsumexp norm linalg_vector_norm", _reduced),
    **_named("argmax argmin all any", _reduced),
    **_named("_softmax _log_softmax _safe_softmax softmax log_softmax cumsum cumprod sort topk", _along),
    **_named(_WINDOWS.replace("{}", "1d"), _windowed),
    **_named(_WINDOWS.replace("{}", "2d"), _windowed),
    **_named(_WINDOWS.replace("{}", "3d"), _windowed),
    **_named("upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d", _windowed),
    **_named("_upsample_bicubic2d_aa upsample_trilinear3d", _windowed),
    **_named("tril triu", _triangle),
    **_named("native_layer_norm layer_norm rms_norm _fused_rms_norm", _layer_norm),
    **_named("native_group_norm group_norm", _group_norm),
    **_named("_prelu_kernel prelu", _pointwise),
}
