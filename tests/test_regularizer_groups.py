"""Groups of weights: against loops over single elements, and against what a layer computes without a channel."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from oneshot.errors import ConfigurationError, InputTypeError
from oneshot.mutables import LayerChoice
from oneshot.regularizers.groups import (
    Family,
    check_family,
    group_largest,
    group_norms,
    group_sizes,
    group_sums,
    inside,
    of_elements,
    zero_groups,
)
from oneshot.regularizers.layer_groups import GROUPINGS, Groups, blocks, families, strided

CONVOLUTIONS = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
    (3, True): nn.ConvTranspose3d,
}


@st.composite
def convolutions(draw: st.DrawFn) -> nn.Module:
    dims, transposed, groups = draw(st.integers(1, 3)), draw(st.booleans()), draw(st.integers(1, 3))
    into, out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    return CONVOLUTIONS[dims, transposed](into, out, kernel, groups=groups, bias=False).double()


def of_each_element(family: Family, parameters: dict[str, Tensor]) -> dict[int, list[float]]:
    """Group -> its numbers, element by element."""
    found: dict[int, list[float]] = {g: [] for g in range(family.n)}
    for name, index in family.index.items():
        every = index.expand(parameters[name].shape)
        for place in itertools.product(*map(range, every.shape)):
            if int(every[place]) >= 0:
                found[int(every[place])].append(float(parameters[name].detach()[place]))
    return found


def grouped(layer: nn.Module, groups: Groups) -> tuple[Family, dict[str, Tensor]]:
    (family,) = families(layer, groups)
    return family, {name: p.detach() for name, p in layer.named_parameters()}


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.sampled_from(["output_channels", "input_channels", "kernels", "layer", "elements", "blocks"]))
def test_norms_and_sizes_against_single_elements(layer: nn.Module, kind: str) -> None:
    family, parameters = grouped(layer, blocks(2, 2) if kind == "blocks" else kind)
    check_family(family, parameters)
    each = of_each_element(family, parameters)
    assert group_sizes(family, parameters).tolist() == [len(each[g]) for g in range(family.n)]
    assert sum(map(len, each.values())) == parameters["weight"].numel()
    wanted = torch.tensor([math.hypot(*each[g]) for g in range(family.n)], dtype=torch.float64)
    torch.testing.assert_close(group_norms(family, parameters), wanted, rtol=1e-12, atol=0)
    largest = torch.tensor([max(map(abs, each[g])) for g in range(family.n)], dtype=torch.float64)
    assert torch.equal(group_largest(family, parameters), largest)
    sums = torch.tensor([math.fsum(each[g]) for g in range(family.n)], dtype=torch.float64)
    torch.testing.assert_close(group_sums(family, parameters), sums, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(convolutions(), st.data())
def test_channels_are_those_of_the_computation(layer: nn.Module, data: st.DataObject) -> None:
    """A zero output channel gives zeros in that channel only; of a zero input channel nothing depends on."""
    assert isinstance(layer, tuple(CONVOLUTIONS.values()))
    family, _ = grouped(layer, "output_channels")
    assert family.n == layer.out_channels
    x = torch.randn(2, layer.in_channels, *[4] * len(layer.kernel_size), dtype=torch.float64)
    channel = data.draw(st.integers(0, family.n - 1))
    with torch.no_grad():
        before = layer(x)
        kept = layer.weight.clone()
        layer.weight.masked_fill_(family.index["weight"] == channel, 0.0)
        after = layer(x)
    assert not after[:, channel].any()
    others = [c for c in range(family.n) if c != channel]
    torch.testing.assert_close(after[:, others], before[:, others])

    with torch.no_grad():
        layer.weight.copy_(kept)
    family, _ = grouped(layer, "input_channels")
    assert family.n == layer.in_channels
    channel = data.draw(st.integers(0, family.n - 1))
    with torch.no_grad():
        without = x.clone()
        without[:, channel] = 0.0
        wanted = layer(without)
        layer.weight.masked_fill_(family.index["weight"] == channel, 0.0)
        torch.testing.assert_close(layer(x), wanted)


def test_rows_and_columns_of_a_linear_layer() -> None:
    layer = nn.Linear(3, 2)
    rows, parameters = grouped(layer, "out_features")
    columns, _ = grouped(layer, "in_features")
    assert (rows.name, rows.n, columns.name, columns.n) == ("weight: rows", 2, "weight: columns", 3)
    torch.testing.assert_close(group_norms(rows, parameters), parameters["weight"].norm(dim=1))
    torch.testing.assert_close(group_norms(columns, parameters), parameters["weight"].norm(dim=0))
    for one, other in (("rows", "out_features"), ("columns", "in_features")):
        assert GROUPINGS[one] == GROUPINGS[other]


def test_blocks_with_smaller_ones_at_the_end() -> None:
    # rows 0-1, 2-3, 4 and columns 0-2, 3-5, 6: sizes 6 6 2 / 6 6 2 / 3 3 1
    layer = nn.Linear(7, 5)
    family, parameters = grouped(layer, blocks(2, 3))
    assert group_sizes(family, parameters).tolist() == [6, 6, 2, 6, 6, 2, 3, 3, 1]
    assert torch.equal(family.index["weight"][4], torch.tensor([6, 6, 6, 7, 7, 7, 8]))
    assert families(layer, blocks((2, 3)))[0].index["weight"].equal(family.index["weight"])


def test_blocks_of_transposed_convolutions_are_out_times_in() -> None:
    family, parameters = grouped(nn.ConvTranspose2d(6, 4, 3), blocks(2, 3))  # weight (in, out, 3, 3)
    assert group_sizes(family, parameters).tolist() == [2 * 3 * 9] * 4
    assert family.index["weight"][:, :, 0, 0].tolist() == [[0, 0, 1, 1]] * 3 + [[2, 2, 3, 3]] * 3


def test_blocks_with_a_length_per_dimension() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 4))
    (family,) = families(net, blocks(4, 2, 3, 1))
    assert list(family.index) == ["0.weight"]
    assert group_sizes(family, dict(net.named_parameters())).tolist() == [4 * 2 * 3] * 6


def test_strided_positions() -> None:
    layer = nn.Conv2d(2, 3, 3)
    family, parameters = grouped(layer, strided(2))
    assert family.index["weight"].tolist() == [[[[0, 1, 0], [1, 0, 1], [0, 1, 0]]]]
    assert group_sizes(family, parameters).tolist() == [5 * 6, 4 * 6]
    family, _ = grouped(layer, strided((2, 3)))
    assert family.index["weight"].tolist() == [[[[0, 1, 2], [3, 4, 5], [0, 1, 2]]]]
    assert families(layer, strided(100))[0].n == 9
    with pytest.raises(ConfigurationError, match="no layer of this Conv2d has positions at stride 2"):
        families(nn.Conv2d(2, 3, 1), strided(2))


@pytest.mark.parametrize("sizes", [{}, {"kdim": 3, "vdim": 5}, {"add_bias_kv": True}, {"bias": False}])
def test_a_head_of_attention_at_zero_adds_nothing(sizes: dict[str, int]) -> None:
    attention = nn.MultiheadAttention(6, 3, batch_first=True, **sizes).double()  # type: ignore[arg-type]
    for p in attention.parameters():
        nn.init.normal_(p)
    (family,) = families(attention, "heads")
    assert (family.name, family.n) == ("MultiheadAttention: heads", 3)
    named = dict(attention.named_parameters())
    assert set(named) - set(family.index) == {name for name in named if name == "out_proj.bias"}
    assert len(set(group_sizes(family, named).tolist())) == 1
    q = torch.randn(2, 4, 6, dtype=torch.float64)
    k, v = (torch.randn(2, 5, sizes.get(name, 6), dtype=torch.float64) for name in ("kdim", "vdim"))

    def without_head(names: set[str]) -> Tensor:
        """The output with head 1 set to zero in these parameters."""
        kept = {name: p.detach().clone() for name, p in named.items()}
        with torch.no_grad():
            for name in names:
                named[name].masked_fill_(family.index[name] == 1, 0.0)
            out: Tensor = attention(q, k, v)[0]
            for name, p in named.items():
                p.copy_(kept[name])
        return out

    whole, columns = without_head(set()), without_head({"out_proj.weight"})
    torch.testing.assert_close(without_head(set(family.index)), columns)  # cut at its columns, nothing else is missing
    torch.testing.assert_close(without_head(set(family.index) - {"out_proj.weight"}), columns)  # nor at its rows
    assert not torch.allclose(whole, columns)


def test_heads_cover_every_row_of_q_k_and_v() -> None:
    (family,) = families(nn.MultiheadAttention(4, 2), "heads")
    assert family.index["in_proj_weight"].flatten().tolist() == [0, 0, 1, 1] * 3
    assert family.index["in_proj_bias"].tolist() == [0, 0, 1, 1] * 3
    assert family.index["out_proj.weight"].tolist() == [[0, 0, 1, 1]]


def test_a_shared_parameter_is_there_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    assert [family.name for family in families(net, "rows")] == ["0.weight: rows"]
    assert [family.name for family in families(net, "rows", "1.weight")] == ["0.weight: rows"]
    tied = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(ConfigurationError, match=r"1.weight is the same parameter as 0.weight, but its groups"):
        families(tied, "output_channels")


def test_patterns_fit_names_of_modules_and_parameters() -> None:
    net = nn.ModuleDict({"body": nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 3, 1)), "head": nn.Conv2d(3, 4, 1)})

    def found(patterns: str | list[str]) -> list[str]:
        return [family.name.split(":")[0] for family in families(net, "kernels", patterns)]

    assert found("body") == ["body.0.weight", "body.1.weight"]
    assert found("*.weight") == ["body.0.weight", "body.1.weight", "head.weight"]
    assert found(["head.weight", "body.0"]) == ["body.0.weight", "head.weight"]
    with pytest.raises(ConfigurationError, match=r"the pattern 'haed' fits nothing; near names are .*head"):
        found(["body", "haed"])
    with pytest.raises(ConfigurationError, match="patterns="):
        found([])


def test_groups_of_the_users_own() -> None:
    net = nn.Linear(3, 4)

    def halves(name: str, parameter: Tensor) -> Tensor | None:
        return torch.tensor([[7], [-1], [7], [40]]) if name == "weight" else None

    (family,) = families(net, halves)
    assert (family.name, family.n) == ("weight: halves", 2)
    assert family.index["weight"].flatten().tolist() == [0, -1, 0, 1]
    assert group_sizes(family, dict(net.named_parameters())).tolist() == [6, 3]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.zeros(4, 1), "dtype torch.float32, an int64 tensor"),
        (torch.zeros(5, 1, dtype=torch.int64), r"shape \(5, 1\), which does not broadcast to \(4, 3\)"),
        (torch.zeros(1, 4, 3, dtype=torch.int64), "does not broadcast"),
        (torch.full((4, 1), -1), "no element of weight is in a group"),
        (torch.tensor([[-2], [0], [0], [0]]), "holds -2"),
        ([0, 1, 2, 3], "is list"),
    ],
)
def test_an_index_that_cannot_be_one(index: Tensor, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        families(nn.Linear(3, 4), lambda name, p: index if name == "weight" else None)


def test_families_that_do_not_fit() -> None:
    net = nn.Linear(3, 4)
    good = Family("mine", {"weight": torch.arange(4)[:, None]}, 4)
    assert families(net, good) == families(net, [good]) == [good]
    bad = {
        "no parameter 'w'": Family("mine", {"w": torch.arange(4)[:, None]}, 4),
        "has the group 3, but n=3": Family("mine", {"weight": torch.arange(4)[:, None]}, 3),
        "no element is in group 4": Family("mine", {"weight": torch.arange(4)[:, None]}, 5),
        "no parameter is in them": Family("mine", {}, 1),
    }
    for message, family in bad.items():
        with pytest.raises(ConfigurationError, match=message):
            families(net, family)
    with pytest.raises(ConfigurationError, match="two families are called 'mine'"):
        families(net, [good, good])
    with pytest.raises(ConfigurationError, match="leave it out"):
        families(net, good, "weight")
    with pytest.raises(ConfigurationError, match="families are needed"):
        families(net, [])


def test_groups_that_are_not_there() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'rows'"):
        families(nn.Linear(2, 2), "rosw")
    with pytest.raises(ConfigurationError, match="no layer of this Linear has output channels"):
        families(nn.Linear(2, 2), "output_channels")
    with pytest.raises(InputTypeError, match="Module is needed"):
        families([nn.Linear(2, 2)], "rows")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="run the model once"):
        families(nn.LazyLinear(2), "rows")
    computed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    with pytest.raises(ConfigurationError, match="weight is computed from other parameters"):
        families(computed, "rows")
    for wrong in ((2,), (0, 2), (2, 1.5)):
        with pytest.raises(ConfigurationError, match="blocks"):
            blocks(*wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="strided"):
        strided(0)


def test_alphas_are_no_weights() -> None:
    net = LayerChoice([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)], label="choice")
    asked = []
    families(net, lambda name, p: (asked.append(name), torch.zeros([1] * p.dim(), dtype=torch.int64))[1])
    assert len(list(net.parameters())) == 3
    assert len(asked) == 2


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-20, 1.0, 1e20, 1e38])
def test_norms_of_tiny_and_large_numbers(size: float) -> None:
    weight = torch.tensor([[1.5, 2.0], [0.0, 0.0]]).mul(size).requires_grad_()
    family = Family("rows", {"w": torch.tensor([[0], [1]])}, 2)
    norms = group_norms(family, {"w": weight})
    wanted = float(weight.detach().double()[0].norm())
    assert norms.detach()[0].item() == pytest.approx(wanted, rel=1e-6, abs=2e-45)
    norms.sum().backward()
    assert weight.grad is not None
    if size > 1e-40:  # below, the numbers themselves are rounded
        torch.testing.assert_close(weight.grad[0], torch.tensor([0.6, 0.8]))
    assert not weight.grad[1].any()


def test_norms_of_half_precision_and_of_nan() -> None:
    family = Family("layer", {"w": torch.zeros(1, dtype=torch.int64)}, 1)
    assert group_norms(family, {"w": torch.full((10_000,), 100.0, dtype=torch.float16)}).tolist() == [10_000.0]
    assert group_norms(family, {"w": torch.tensor([1.0, float("nan")])}).isnan().all()
    assert zero_groups(family, {"w": torch.zeros(3)}).tolist() == [True]
    assert zero_groups(family, {"w": torch.tensor([0.0, 1e-45])}).tolist() == [False]


def test_gradient_of_the_norms() -> None:
    net = nn.Conv2d(4, 4, 3, groups=2).double()
    (family,) = families(net, "input_channels")
    assert torch.autograd.gradcheck(lambda w: group_norms(family, {"weight": w}), net.weight)


def test_groups_over_several_parameters() -> None:
    parameters = {"w": torch.tensor([[3.0, 4.0], [1.0, 0.0]]), "b": torch.tensor([12.0, 5.0])}
    family = Family("joint", {"w": torch.tensor([[0], [-1]]), "b": torch.tensor([0, 1])}, 2)
    assert group_sizes(family, parameters).tolist() == [3, 1]
    assert group_norms(family, parameters).tolist() == [13.0, 5.0]


def test_which_groups_lie_in_which() -> None:
    net = nn.Conv2d(4, 6, 3)
    named = dict(net.named_parameters())
    one = {
        kind: families(net, kind)[0] for kind in ("elements", "kernels", "output_channels", "input_channels", "layer")
    }
    finer = [
        ("elements", "kernels"),
        ("kernels", "output_channels"),
        ("kernels", "input_channels"),
        ("kernels", "layer"),
    ]
    for fine, coarse in finer:
        assert inside(one[fine], one[coarse], named) is True
        assert inside(one[coarse], one[fine], named) is False
    assert inside(one["output_channels"], one["input_channels"], named) is False
    assert inside(one["layer"], one["layer"], named) is True
    assert inside(of_elements("bias", {"bias": net.bias}), one["layer"], named) is None
    top = Family("top", {"weight": torch.tensor([0, 0, 0, -1, -1, -1]).view(6, 1, 1, 1)}, 1)
    bottom = Family("bottom", {"weight": torch.tensor([-1, -1, -1, 0, 0, 0]).view(6, 1, 1, 1)}, 1)
    assert inside(top, bottom, named) is None
    assert inside(top, one["output_channels"], named) is False
    half = Family("half", {"weight": torch.tensor([0, 0, 1, 1, -1, -1]).view(6, 1, 1, 1)}, 2)
    assert inside(half, top, named) is False  # its second group is half in
