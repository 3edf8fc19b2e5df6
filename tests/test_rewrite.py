"""Graphs with rewritten numbers: the cut network computes what the one with zeros in the same places does."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ZOO, ConvBN, FusedAttention, leaky, randomize
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from oneshot.errors import UnsupportedModelError
from oneshot.graph.cut import cut
from oneshot.graph.dimensions import Dimension, Dimensions, find_dimensions
from oneshot.graph.masked_call import masked_call, names_of_parameters
from oneshot.graph.operators import trace_operators
from oneshot.graph.pieces import never_empty
from oneshot.graph.rewrite import Rewriter, graph_of, rewritten


class Searched:
    """A network as a graph in float64, its groups, and the two networks that a choice of units stands for."""

    def __init__(self, net: nn.Module, *args: Tensor) -> None:
        self.net = randomize(net, 0).double().eval()
        self.args = tuple(a.double() if a.is_floating_point() else a for a in args)
        graph = graph_of(self.net)
        assert graph is not None
        self.graph: fx.GraphModule = graph
        self.found: Dimensions = find_dimensions([trace_operators(graph, self.args)], graph, {}, literals=True)
        self.units = {group.label: group.units for group in self.found.groups}

    def gone(self, kept: Mapping[str, Tensor]) -> dict[Dimension, Tensor]:
        """Dimension -> which of its indices are left."""
        shapes = {n: t.shape for n, t in (*self.graph.named_parameters(), *self.graph.named_buffers())}
        left: dict[Dimension, Tensor] = {}
        for group in self.found.groups:
            for d, indices in group.members.items():
                flags = left.setdefault(d, torch.ones(shapes[d.name][d.dim], dtype=torch.bool))
                flags[indices[~kept[group.label]].flatten()] = False
        return left

    def graph_for(self, kept: Mapping[str, Tensor]) -> fx.GraphModule:
        return rewritten(self.graph, self.args, self.found, kept)

    def check(self, kept: Mapping[str, Tensor], rewriter: Rewriter | None = None) -> nn.Module:
        """The cut network, which is asserted to compute what the masked one does."""
        left = self.gone(kept)
        columns = {d for group in self.found.groups for d in group.columns}
        graph = self.graph_for(kept) if rewriter is None else rewriter(kept)
        small = cut(graph, {d: flags.nonzero().flatten() for d, flags in left.items()})
        with torch.no_grad():
            factors = {d: flags for d, flags in left.items() if d in columns}
            expected = masked_call(self.graph, factors, names_of_parameters(self.graph), self.args)
            got = small(*self.args)
        pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(got), strict=True)
        for one, other in pairs:
            assert one.isfinite().all()
            torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9 * float(one.abs().max()))
        return small

    def check_at_random(self, times: int = 3) -> None:
        rewriter = Rewriter(self.graph, self.args, self.found)
        for seed in range(times):
            self.check(self.random(seed), rewriter)

    def random(self, seed: int) -> dict[str, Tensor]:
        """At least one unit of each group."""
        generator = torch.Generator().manual_seed(seed)
        kept = {}
        for label, units in self.units.items():
            kept[label] = torch.rand(units, generator=generator) < 0.6
            kept[label][int(torch.randint(units, (), generator=generator))] = True
        return kept

    def keeping(self, **units: list[int]) -> dict[str, Tensor]:
        """These units of these groups, ``b_2`` for 'b:2', and all of the others."""
        chosen = {label.replace("_", ":"): numbers for label, numbers in units.items()}
        return {
            label: torch.tensor([u in chosen.get(label, range(n)) for u in range(n)]) for label, n in self.units.items()
        }


def arguments_of(graph: fx.GraphModule, name: str) -> tuple[Any, ...]:
    """Of the only node that calls this function or method, without its input."""
    (node,) = [n for n in graph.graph.nodes if getattr(n.target, "__name__", n.target) == name]
    return node.args[1:]


class Net(nn.Module):
    """conv ``a`` of 3 to ``width`` channels, a function, and further layers ``b``, ``c``, ... that it may call."""

    def __init__(self, function: Callable[..., Tensor], width: int, **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.a = nn.Conv2d(3, width, 1)
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.a(x))


def image() -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


# --- one index ------------------------------------------------------------------------------------------------------

INDICES: dict[str, Any] = {
    "slice": slice(2, 6),
    "open slice": slice(5, None),
    "negative slice": slice(-3, -1),
    "stepped slice": slice(0, 8, 3),
    "list": [0, 2, 5],
    "unsorted list": [6, -1, 0],
    "flags": [True, False, True, False, False, True, True, False],
    "tensor": torch.tensor([1, 4, 7]),
    "flag tensor": torch.tensor([True, True, False, False, False, True, False, True]),
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_of_channels_follows_what_is_left_of_them(name: str) -> None:
    # a -> x[:, index] -> b: a unit is a row of a and the column of b that reads it. Rows that nobody reads stay.
    index = INDICES[name]
    read = len(torch.arange(8)[index])
    searched = Searched(Net(lambda net, y: net.b(y[:, index]), 8, b=nn.Conv2d(read, 5, 1)), image())
    assert searched.units == {"a": read}
    searched.check_at_random()


def test_positions_of_an_index_by_hand() -> None:
    # Channels 0, 2, 5 are read; without 2 the channels 0 1 3 4 5 ... are at places 0 1 2 3 4 ...: 5 is at 4.
    searched = Searched(Net(lambda net, y: net.b(y[:, [0, 2, 5]]), 8, b=nn.Conv2d(3, 5, 1)), image())
    kept = searched.keeping(a=[0, 2])
    assert arguments_of(searched.graph_for(kept), "getitem")[0] == (slice(None), [0, 4])
    small = searched.check(kept)
    assert small.a.weight.shape[0] == 7
    assert small.b.weight.shape[1] == 2


def test_a_slice_by_hand() -> None:
    # Channels 2 ... 5 are read; without 3 and 4 there are 0 1 2 5 6 7, and 2, 5 are at 2, 3.
    searched = Searched(Net(lambda net, y: net.b(y[:, 2:6]), 8, b=nn.Conv2d(4, 5, 1)), image())
    kept = searched.keeping(a=[0, 3])
    assert arguments_of(searched.graph_for(kept), "getitem")[0] == (slice(None), slice(2, 4))
    searched.check(kept)


def test_a_slice_of_everything() -> None:
    # Conv(3, 8, 1) -> x[:, 0:8] -> Conv(8, 6, 1) is a plain chain of 8 channels.
    searched = Searched(Net(lambda net, y: net.b(y[:, 0:8]), 8, b=nn.Conv2d(8, 6, 1)), image())
    assert searched.units == {"a": 8}
    kept = searched.keeping(a=[1, 3, 4])
    assert searched.check(kept).b.weight.shape == (6, 3, 1, 1)
    assert arguments_of(searched.graph_for(kept), "getitem")[0][1] == slice(0, 3)


def test_a_single_position_stays_and_is_found_again() -> None:
    # Channel 3 is read alone and cannot be left out; without 0, 1 and 6 it is at 1.
    searched = Searched(Net(lambda net, y: net.b(y) * y[:, 3].unsqueeze(1), 8, b=nn.Conv2d(8, 5, 1)), image())
    assert searched.units == {"a": 7}
    kept = searched.keeping(a=[2, 3, 4, 6])  # units are channels 0 1 2 4 5 6 7
    assert arguments_of(searched.graph_for(kept), "getitem")[0] == (slice(None), 1)
    assert searched.check(kept).a.weight.shape[0] == 5


def test_an_index_in_a_buffer_and_in_an_attribute() -> None:
    net = Net(
        lambda net, y: net.b(y[:, net.buffer]) + net.c(y[:, net.plain]), 8, b=nn.Conv2d(3, 5, 1), c=nn.Conv2d(4, 5, 1)
    )
    net.register_buffer("buffer", torch.tensor([0, 1, 2]))
    net.plain = torch.tensor([4, 5, 6, 7])
    searched = Searched(net, image())
    assert searched.units == {"a": 3, "a:2": 4}
    assert set(searched.graph.state_dict()) == set(net.state_dict())
    searched.check_at_random()


def test_an_index_beside_others() -> None:
    # An ellipsis, a new dimension, rows of the image that nobody cuts, and steps beside a list.
    def function(net: Any, y: Tensor) -> Tensor:
        last = y.permute(0, 2, 3, 1)[..., 1:5].permute(0, 3, 1, 2)
        new = y[:, None, :4].squeeze(1)
        return net.b(last) + net.b(new) + net.c(y[:, ::2, [0, 1]][:, :, :1])

    searched = Searched(Net(function, 8, b=nn.Conv2d(4, 5, 1), c=nn.Conv2d(4, 5, 1)), image())
    searched.check_at_random()


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_random_slices_of_slices(data: st.DataObject) -> None:
    first = data.draw(st.slices(12).filter(lambda s: (s.step or 1) > 0 and len(range(12)[s]) > 2))
    n = len(range(12)[first])
    second = data.draw(st.lists(st.integers(-n, n - 1), min_size=2, max_size=6, unique_by=lambda i: i % n))
    net = Net(
        lambda net, y: net.b(y) + net.c(y[:, first][:, second]),
        12,
        b=nn.Conv2d(12, 4, 1),
        c=nn.Conv2d(len(second), 4, 1),
    )
    Searched(net, image()).check_at_random(1)


# --- several pieces -------------------------------------------------------------------------------------------------


def test_two_slices_in_two_branches() -> None:
    def function(net: Any, y: Tensor) -> Tensor:
        return net.d(torch.cat([net.b(y[:, :8]), net.c(y[:, 8:])], 1))

    searched = Searched(Net(function, 12, b=nn.Conv2d(8, 5, 1), c=nn.Conv2d(4, 6, 1), d=nn.Conv2d(11, 3, 1)), image())
    assert searched.units == {"a": 8, "a:2": 4, "b": 5, "c": 6}
    searched.check_at_random()


def test_slices_that_overlap() -> None:
    # Channels 0-3 are read by b, 4 and 5 by both, 6 and 7 by c.
    net = Net(lambda net, y: net.b(y[:, :6]) + net.c(y[:, 4:]), 8, b=nn.Conv2d(6, 5, 1), c=nn.Conv2d(4, 5, 1))
    searched = Searched(net, image())
    assert sorted(searched.units.values()) == [2, 2, 4]
    searched.check_at_random()


PIECES: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "lengths": lambda y: y.split([3, 5], 1),
    "equal lengths": lambda y: torch.split(y, 4, dim=1),
    "a shorter last one": lambda y: y.split(3, 1)[1:],
    "chunk": lambda y: y.chunk(2, dim=1),
    "tensor_split": lambda y: torch.tensor_split(y, [3], dim=1),
    "narrow": lambda y: (y.narrow(1, 0, 3), torch.narrow(y, 1, 3, 5)),
    "index_select": lambda y: (torch.index_select(y, 1, torch.tensor([0, 1, 2])), y[:, 3:]),
    "crop": lambda y: (F.pad(y, (0, 0, 0, 0, 0, -5)), F.pad(y, (0, 0, 0, 0, -3, 0))),
}


@pytest.mark.parametrize("name", PIECES)
def test_pieces_lose_different_channels(name: str) -> None:
    # The pieces are read by different layers: a group for each, of as many units as it has channels.
    widths = [piece.shape[1] for piece in PIECES[name](torch.zeros(1, 8, 1, 1))]

    def function(net: Any, y: Tensor) -> Tensor:
        one, other = PIECES[name](y)
        return net.b(leaky(one)) + net.c(other)

    searched = Searched(Net(function, 8, b=nn.Conv2d(widths[0], 5, 1), c=nn.Conv2d(widths[1], 5, 1)), image())
    assert sorted(searched.units.values()) == sorted(widths)
    searched.check_at_random()


def test_halves_of_a_chunk_by_hand() -> None:
    net = Net(
        lambda net, y: net.b(y.chunk(2, 1)[0]) + net.c(y.chunk(2, 1)[1]), 8, b=nn.Conv2d(4, 5, 1), c=nn.Conv2d(4, 5, 1)
    )
    searched = Searched(net, image())
    small = searched.check(searched.keeping(a=[0, 1, 3], a_2=[2]))
    assert (small.b.weight.shape[1], small.c.weight.shape[1], small.a.weight.shape[0]) == (3, 1, 4)


def test_something_of_each_piece_is_left_whatever_is_cut() -> None:
    # Both halves end in one layer, so that all 8 channels are alike; one group would allow an empty half.
    def function(net: Any, y: Tensor) -> Tensor:
        one, other = y.chunk(2, 1)
        return net.b(torch.cat([F.instance_norm(one), other], 1))

    searched = Searched(Net(function, 8, b=nn.Conv2d(8, 5, 1)), image())
    assert searched.units == {"a": 4, "a:2": 4}
    for k in range(4):
        searched.check(searched.keeping(a=[k], a_2=[3 - k]))


def test_an_empty_piece_is_an_error_that_says_where() -> None:
    searched = Searched(
        Net(lambda net, y: net.b(y[:, :4]) + net.c(y[:, 4:]), 8, b=nn.Conv2d(4, 5, 1), c=nn.Conv2d(4, 5, 1)), image()
    )
    with pytest.raises(UnsupportedModelError, match=r"positions \[0, 1, 2, 3\] of 8.*getitem"):
        searched.graph_for(searched.keeping(a=[]))


def test_in_place_work_on_a_slice_still_reaches_the_whole() -> None:
    def function(net: Any, y: Tensor) -> Tensor:
        y[:, 2:6].relu_()
        y[:, [0, 1]].mul_(0)  # of a copy: changes nothing
        return net.b(y)

    searched = Searched(Net(function, 8, b=nn.Conv2d(8, 5, 1)), image())
    searched.check_at_random()


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_sizes_in_views() -> None:
    # 16 channels as 4 x 4 with a scale for each row; the 16 pixels are not the 16 channels.
    def function(net: Any, y: Tensor) -> Tensor:
        y = y.view(-1, 16, 16).reshape(2, 16, 4, 4)
        y = torch.unflatten(y, 1, (4, 4)) * net.scale.expand(2, 4, 1, 4, 4)
        return net.b(y.flatten(1, 2).reshape((-1, 16, 4, 4)))

    net = Net(function, 16, b=nn.Conv2d(16, 5, 1))
    net.scale = nn.Parameter(torch.ones(1, 4, 1, 1, 1))
    searched = Searched(net, image())
    # A scale makes the 4 channels of its row one unit.
    assert searched.units == {"a": 4}
    kept = searched.keeping(a=[0, 3])
    assert arguments_of(searched.graph_for(kept), "view") == (-1, 8, 16)
    assert arguments_of(searched.graph_for(kept), "unflatten") == (1, (2, 4))
    assert arguments_of(searched.graph_for(kept), "expand") == (2, 2, 1, 4, 4)
    searched.check_at_random()


def test_unflatten_as_a_layer() -> None:
    net = Net(lambda net, y: net.b(net.u(y).sum(1)), 8, u=nn.Unflatten(1, (2, 4)), b=nn.Conv2d(4, 5, 1))
    searched = Searched(net, image())
    assert searched.units == {"a": 4}
    searched.check_at_random()


def test_groups_in_functions() -> None:
    def function(net: Any, y: Tensor) -> Tensor:
        y = F.conv2d(y, net.depthwise, None, 1, 1, 1, 8)
        y = F.conv2d(F.group_norm(y, 4), net.pairs, groups=4)
        return net.b(leaky(y))

    net = Net(function, 8, b=nn.Conv2d(8, 5, 1))
    net.depthwise, net.pairs = nn.Parameter(torch.ones(8, 1, 3, 3)), nn.Parameter(torch.ones(8, 2, 1, 1))
    searched = Searched(net, image())
    # GroupNorm and the second convolution have 4 groups of 2 channels.
    assert searched.units == {"a": 4}
    searched.check_at_random()


class QKV(nn.Module):
    """Attention with a size of heads; 9 = 3 x 3, and q, k, v are 3 as well."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.fc = FusedAttention(9, 3), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.attention(x))


def test_heads_and_their_size_are_told_apart() -> None:
    searched = Searched(QKV(), torch.randn(2, 5, 9))
    assert searched.units == {"attention.qkv": 3, "attention.proj": 9}
    kept = searched.keeping(**{"attention.qkv": [0, 2]})
    assert arguments_of(searched.graph_for(kept), "reshape")[2:] == (3, 2, 3)  # q, k, v; two heads; their size
    searched.check_at_random()


class ComputedHeads(nn.Module):
    """The size of a head is computed from the width, which shrinks with the number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(6, 12)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = self.q(x).shape
        q, k, v = (layer(x).view(b, n, 3, c // 3).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-1, -2)) / (c // 3) ** 0.5
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


def test_computed_sizes() -> None:
    # 3 heads of 4; with two of them left a head would have 8 // 3 = 2, and the scores another scale.
    searched = Searched(ComputedHeads(), torch.randn(2, 5, 6))
    assert searched.units == {"q": 3}
    small = searched.check(searched.keeping(q=[0, 2]))
    assert small.q.weight.shape == (8, 6)
    assert small(torch.randn(3, 4, 6).double()).shape == (3, 4, 5)  # batch and tokens are still free
    searched.check_at_random()


# --- whole networks -------------------------------------------------------------------------------------------------

NETWORKS = {
    # 8 of the 12 channels go round the convolution.
    "slice_channels": [8, 4, 6, 10],
    # 3 of 12 channels are convolved by partial, all meet fc2's in the sum.
    "unequal_split": [3, 9, 3, 20],
    "head_view_literal": [6, 8],
    "vit_fused_qkv": [3, 20, 3, 24],
    # value and gate are multiplied: still 6.
    "glu_chunk": [6, 8],
    # The first half of cv1 only runs into the concatenation; the second is tied to the bottlenecks' outputs.
    "c2f": [8, 6, 6, 5, 4, 10],
    # Block 0 makes left_j and right_j neighbours: 8 units. Block 1 passes those of 0-3 and ties each to 2 rows of its
    # right side; it reads 4-7. Block 2 passes 0 and 1 and ties each to 4 rows; it reads 2 and 3. In place, where the
    # halves of a chunk go together, only 2 units are left of the 8.
    "shufflenet_v2": [8, 2, 2, 4, 8, 8, 8],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    searched = Searched(ZOO[name].build(), *ZOO[name].inputs())
    assert sorted(searched.units.values()) == sorted(NETWORKS[name])
    searched.check_at_random()


def test_shufflenet_has_finer_units_than_in_place() -> None:
    searched = Searched(ZOO["shufflenet_v2"].build(), *ZOO["shufflenet_v2"].inputs())
    in_place = find_dimensions([trace_operators(searched.net, searched.args)], searched.net, {})
    dimension = Dimension("blocks.0.left.1.conv.weight", 0)

    def units(found: Dimensions) -> int:
        return sum(group.units for group in found.groups if dimension in group.members)

    assert (units(in_place), units(searched.found)) == (2, 8)


# --- the graph ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_traced_gives_none() -> None:
    assert graph_of(ZOO["if_data"].build()) is None
    assert graph_of(ZOO["auxiliary_head"].build()) is None  # another output in train mode


def test_the_graph_has_the_parameters_and_modes_of_the_model() -> None:
    model = ZOO["unequal_split"].build()
    model.add_module("unused", nn.Linear(2, 2))
    model.stem.norm.eval()
    graph = graph_of(model)
    assert graph is not None
    assert set(graph.state_dict()) == set(model.state_dict())
    assert all(graph.get_parameter(name) is p for name, p in model.named_parameters())
    modes = {path: module.training for path, module in model.named_modules()}
    assert {path: graph.get_submodule(path).training for path in modes} == modes
    assert not modes["stem.norm"]
    assert set(copy.deepcopy(graph).state_dict()) == set(model.state_dict())
    assert "_tensor_constant0" not in vars(model)


def test_a_pickle_of_the_graph_needs_no_class_of_the_user() -> None:
    model = ZOO["c2f"].build().eval()
    (x,) = ZOO["c2f"].inputs()
    graph = graph_of(model)
    assert graph is not None
    data = pickle.dumps(graph)
    assert b"models" not in data
    assert torch.equal(pickle.loads(data)(x), model(x))  # noqa: S301  (made above)


class AsksForATuple(nn.Module):
    """While it is traced, what a chunk returns is no tuple."""

    def forward(self, x: Tensor) -> Tensor:
        pieces: Any = x.chunk(2, 1)
        return pieces[0] if isinstance(pieces, tuple) else pieces[1]


def test_a_graph_that_computes_something_else_is_none() -> None:
    assert graph_of(AsksForATuple()) is not None
    assert graph_of(AsksForATuple(), (torch.randn(2, 4),)) is None
    assert graph_of(nn.Sequential(nn.Linear(4, 2)), (torch.randn(2, 4),)) is not None
    assert graph_of(nn.Sequential(nn.Linear(4, 2)), (torch.randn(2, 3),)) is None


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 50)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(x), 0.5, self.training)


def test_dropout_follows_the_mode_of_the_graph() -> None:
    graph = graph_of(Dropping())
    assert graph is not None
    x = torch.ones(2, 4)
    assert (graph(x) == 0).float().mean() > 0.2
    graph.eval()
    assert torch.equal(graph(x), graph.fc(x))
    assert list(graph.state_dict()) == ["fc.weight", "fc.bias"]


class Causal(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (2, 0)))


def test_a_subclass_of_a_layer_stays_a_layer() -> None:
    net = nn.Sequential(Causal(2, 6, 3), nn.ReLU(), Causal(6, 3, 3))
    searched = Searched(net, torch.randn(2, 2, 9))
    assert type(searched.graph.get_submodule("0")) is Causal
    assert searched.units == {"0": 6}
    searched.check_at_random()


def test_rewriting_leaves_the_graph_as_it_is() -> None:
    searched = Searched(Net(lambda net, y: net.b(y[:, :4]), 8, b=ConvBN(4, 5)), image())
    code, weight = searched.graph.code, searched.graph.a.weight
    small = searched.graph_for(searched.keeping(a=[1]))
    assert searched.graph.code == code
    assert small.a.weight is weight
    (node,) = [n for n in small.graph.nodes if n.target is operator.getitem]
    assert node.args[1] == (slice(None), slice(0, 1))


# --- groups and pieces ----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=10),
    st.lists(st.frozensets(st.integers(0, 9), min_size=1), max_size=5),
)
def test_every_piece_holds_a_whole_group(owners: list[int], pieces: list[frozenset[int]]) -> None:
    groups = [[u for u, owner in enumerate(owners) if owner == g] for g in set(owners)]
    pieces = [piece for piece in (p & set(range(len(owners))) for p in pieces) if piece]
    found = never_empty(groups, pieces)
    assert sorted(u for group in found for u in group) == list(range(len(owners)))
    assert all(any(set(group) <= set(old) for old in groups) for group in found)
    assert all(any(set(group) <= piece for group in found) for piece in pieces)
