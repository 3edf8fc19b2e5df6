"""Decisions of a model: labels, shared alphas, clashes, and which parameter belongs to whom."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from oneshot import (
    Argmax,
    BinaryGates,
    InputChoice,
    LayerChoice,
    OnePath,
    Repeat,
    Softmax,
    UniformPath,
    arch_parameters,
    decisions,
    draw,
    fixed_arch,
    set_sampler,
    weight_parameters,
)
from oneshot.errors import LabelError


def act(label: str | None = None) -> LayerChoice:
    return LayerChoice({"relu": nn.ReLU(), "tanh": nn.Tanh()}, label=label)


def linear(label: str | None = None) -> LayerChoice:
    return LayerChoice([nn.Linear(2, 2), nn.Identity()], label=label)


def test_labels_are_given_or_are_paths() -> None:
    net = nn.Sequential()
    net.add_module("stem", act())
    net.add_module("body", nn.Sequential(nn.Linear(2, 2), act("given"), Repeat(lambda i: act(), (1, 2))))
    net.add_module("merge", InputChoice(2))
    assert list(decisions(net)) == ["stem", "given", "body.2", "body.2.blocks.0", "body.2.blocks.1", "merge"]
    assert [d.label for d in decisions(net).values()] == list(decisions(net))
    assert list(decisions(act())) == ["root"]
    assert decisions(nn.Linear(2, 2)) == {}


def test_two_models_of_one_function_have_the_same_labels() -> None:
    """No counter that goes on from model to model."""

    def build() -> nn.Module:
        return nn.Sequential(act(), act("a"), act())

    assert list(decisions(build())) == list(decisions(build())) == ["0", "a", "2"]


def test_one_label_is_one_alpha_one_draw_and_one_step() -> None:
    net = nn.Sequential(linear("same"), linear("same"), linear())
    found = decisions(net)
    assert list(found) == ["same", "2"]
    assert found["same"].members == (net[0], net[1])
    assert net[0].alpha is net[1].alpha
    assert net[0].alpha is not net[2].alpha
    assert len(arch_parameters(net)) == 2

    set_sampler(net, UniformPath())
    generator = torch.Generator().manual_seed(0)
    paths = set()
    for _ in range(20):
        draw(net, generator)
        assert net[0].drawn == net[1].drawn
        paths.add((net[0].drawn, net[2].drawn))
    assert len(paths) == 4

    set_sampler(net, Softmax())
    optimizer = torch.optim.SGD(arch_parameters(net), lr=1.0)
    net(torch.randn(3, 2)).square().sum().backward()
    expected = net[0].alpha.detach() - net[0].alpha.grad
    optimizer.step()
    assert torch.equal(net[0].alpha, expected)
    assert torch.equal(net[1].alpha, expected)
    state = net.state_dict()
    assert torch.equal(state["0.alpha"], state["1.alpha"])
    other = nn.Sequential(linear("same"), linear("same"), linear())
    other.load_state_dict(state)
    assert torch.equal(decisions(other)["same"].alpha, expected)
    assert other[0].alpha is other[1].alpha


def test_the_gradient_of_a_shared_alpha_is_the_sum_of_both_places() -> None:
    """y = (sum_k p_k c_k)^2 with c = (2, 4), p = 1/2: dy/dp_k = 2 * 3 * c_k = (12, 24), times p (c - p.c): -3, 3."""

    class Times(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor

    net = nn.Sequential(*(LayerChoice([Times(2), Times(4)], label="f") for _ in range(2)))
    decisions(net)
    net(torch.ones(())).backward()
    assert torch.allclose(net[0].alpha.grad, torch.tensor([-3.0, 3.0]))


def test_mutables_inside_each_other_may_share_a_label() -> None:
    inner = act("same")
    net = LayerChoice({"relu": nn.ReLU(), "tanh": nn.Sequential(inner)}, label="other")
    assert list(decisions(net)) == ["other", "same"]
    assert inner.alpha is not net.alpha


def conv(size: int) -> nn.Module:
    return nn.Conv2d(1, 1, size, padding=size // 2)


CLASHES: dict[str, Callable[[], nn.Module]] = {
    "number": lambda: nn.Sequential(linear("x"), LayerChoice([nn.Linear(2, 2)], label="x")),
    "names": lambda: nn.Sequential(act("x"), LayerChoice({"relu": nn.ReLU(), "elu": nn.ELU()}, label="x")),
    "order": lambda: nn.Sequential(act("x"), LayerChoice({"tanh": nn.Tanh(), "relu": nn.ReLU()}, label="x")),
    "kernels": lambda: nn.Sequential(
        LayerChoice([conv(3), conv(5)], label="x"), LayerChoice([conv(5), conv(3)], label="x")
    ),
    "types": lambda: nn.Sequential(
        LayerChoice([nn.ReLU(), nn.Tanh()], label="x"), LayerChoice([nn.Tanh(), nn.ReLU()], label="x")
    ),
    "inside": lambda: nn.Sequential(
        LayerChoice([nn.Sequential(conv(3)), nn.Identity()], label="x"),
        LayerChoice([nn.Sequential(conv(5)), nn.Identity()], label="x"),
    ),
    "dilation": lambda: nn.Sequential(
        LayerChoice([nn.Conv1d(1, 1, 3, dilation=1)], label="x"),
        LayerChoice([nn.Conv1d(1, 1, 3, dilation=2)], label="x"),
    ),
    "kinds": lambda: nn.Sequential(linear("x"), InputChoice(2, label="x")),
    "list or names": lambda: nn.Sequential(
        LayerChoice([nn.ReLU()], label="x"), LayerChoice({"0": nn.ReLU()}, label="x")
    ),
    "inputs": lambda: nn.Sequential(InputChoice(2, label="x"), InputChoice(2, n_chosen=2, label="x")),
    "reductions": lambda: nn.Sequential(
        InputChoice(2, n_chosen=2, label="x"), InputChoice(2, n_chosen=2, reduction="mean", label="x")
    ),
    "depths": lambda: nn.Sequential(
        Repeat([nn.ReLU()] * 2, (1, 2), label="x"), Repeat([nn.ReLU()] * 2, (0, 2), label="x")
    ),
    "choices inside": lambda: nn.Sequential(
        LayerChoice([act(), nn.Identity()], label="x"), LayerChoice([linear(), nn.Identity()], label="x")
    ),
}


@pytest.mark.parametrize("clash", CLASHES)
def test_one_label_for_different_candidates_is_an_error(clash: str) -> None:
    with pytest.raises(LabelError, match="label 'x' is used twice with different candidates"):
        decisions(CLASHES[clash]())


def test_widths_and_strides_may_differ_under_one_label() -> None:
    """The edges of a cell before and after a reduction."""
    net = nn.Sequential(
        LayerChoice([nn.Conv2d(4, 8, 3, stride=2), nn.Conv2d(4, 8, 5, stride=2)], label="x"),
        LayerChoice([nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 5)], label="x"),
    )
    assert list(decisions(net)) == ["x"]


@pytest.mark.parametrize("label", ["1", "2.0"])
def test_a_label_that_is_the_path_of_another_mutable_is_an_error(label: str) -> None:
    with pytest.raises(LabelError, match=f"label '{label}' is given to one mutable and is the path of another"):
        decisions(nn.Sequential(act(label), act(), nn.Sequential(act())))


def test_a_label_that_is_the_own_path_is_none() -> None:
    assert list(decisions(nn.Sequential(act("0"), act()))) == ["0", "1"]


def test_one_label_half_decided_is_an_error() -> None:
    with fixed_arch({"x": "tanh"}):
        decided = act("x")
    with pytest.raises(LabelError, match=r"label 'x'.*undecided.*decided for 'tanh'"):
        decisions(nn.Sequential(act("x"), decided))
    with fixed_arch({"x": "relu"}):
        otherwise = act("x")
    with pytest.raises(LabelError, match=r"label 'x'.*decided for 'tanh'.*decided for 'relu'"):
        decisions(nn.Sequential(decided, otherwise))


class Named(nn.Module):
    """Weights with the names that a mutable has."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(2))
        self.candidates = nn.ParameterDict({"alpha": nn.Parameter(torch.ones(1))})

    def forward(self, x: Tensor) -> Tensor:
        return x * self.alpha * self.candidates["alpha"]


def test_a_weight_called_alpha_is_a_weight() -> None:
    choice = LayerChoice([Named(), nn.PReLU()])
    net = nn.Sequential(Named(), choice)
    assert [id(p) for p in arch_parameters(net)] == [id(choice.alpha)]
    assert {id(p) for p in weight_parameters(net)} == {
        id(p) for p in (*net[0].parameters(), *choice[0].parameters(), *choice[1].parameters())
    }


trees = st.recursive(
    st.sampled_from(["linear", "named", "inputs"]),
    lambda inner: st.tuples(st.sampled_from(["choice", "names", "repeat", "row", "same"]), st.lists(inner, max_size=3)),
    max_leaves=8,
)


def built(tree: object, alphas: list[nn.Module], weights: list[nn.Parameter]) -> nn.Module:
    """Builds the module and notes down, while it does, which mutables and which weights there are."""
    if isinstance(tree, str):
        leaf: nn.Module = {"linear": nn.Linear, "named": Named, "inputs": InputChoice}[tree](
            *{"linear": (2, 2), "named": (), "inputs": (2,)}[tree]
        )
        if tree == "inputs":
            alphas.append(leaf)
        else:
            weights.extend(leaf.parameters())
        return leaf
    kind, children = tree
    modules = [built(child, alphas, weights) for child in children]
    if kind == "row" or not modules:
        return nn.Sequential(*modules)
    if kind == "same":
        pair = [LayerChoice([nn.ReLU(), nn.Tanh()], label="same") for _ in range(2)]
        alphas.extend(pair)
        return nn.Sequential(*pair, *modules)
    if kind == "repeat":
        mutable: nn.Module = Repeat(modules, (0, len(modules)))
    else:
        mutable = LayerChoice(modules if kind == "choice" else {f"c{i}": m for i, m in enumerate(modules)})
    alphas.append(mutable)
    return mutable


@settings(deadline=None, max_examples=60)
@given(trees)
def test_every_parameter_is_an_alpha_or_a_weight(tree: object) -> None:
    mutables: list[nn.Module] = []
    expected: list[nn.Parameter] = []
    net = nn.Sequential(built(tree, mutables, expected))
    arch, weights = arch_parameters(net), weight_parameters(net)
    assert {id(p) for p in arch} == {id(m.alpha) for m in mutables}
    assert {id(p) for p in weights} == {id(p) for p in expected}
    assert len(arch) == len({id(p) for p in arch}) == len(decisions(net))
    assert len(weights) == len({id(p) for p in weights})
    assert {id(p) for p in net.parameters()} == {id(p) for p in (*arch, *weights)}


def test_a_decision_knows_its_options_and_probabilities() -> None:
    net = nn.Sequential(act("a"), InputChoice(3, n_chosen=2, label="i"), Repeat([nn.ReLU()] * 3, (1, 3), label="r"))
    found = decisions(net)
    assert {label: d.options for label, d in found.items()} == {
        "a": ("relu", "tanh"),
        "i": ((0, 1), (0, 2), (1, 2)),
        "r": (1, 2, 3),
    }
    assert [found["a"].index_of("tanh"), found["i"].index_of([2, 0]), found["r"].index_of(3)] == [1, 1, 2]
    with torch.no_grad():
        found["a"].alpha.copy_(torch.tensor([0.0, 3.0]).log())  # the first one never
        found["i"].alpha.copy_(torch.tensor([1.0, 2.0, 5.0]).log())
    assert torch.allclose(found["i"].probabilities(), torch.tensor([1 / 8, 2 / 8, 5 / 8]))
    assert found["a"].probabilities().tolist() == [0.0, 1.0]
    found["i"].set_sampler(Argmax())
    assert found["i"].probabilities().tolist() == [0.0, 0.0, 1.0]
    assert found["i"].sampler == Argmax()
    set_sampler(found, OnePath(0))
    assert [d.sampler for d in found.values()] == [OnePath(0)] * 3


def test_a_new_sampler_forgets_the_draw() -> None:
    net = nn.Sequential(act("a"), act("a"))
    set_sampler(net, BinaryGates(2))
    draw(net)
    assert net[1].drawn is not None
    set_sampler(net, BinaryGates(2))
    assert net[0].drawn is None
    assert net[1].drawn is None
    assert net[1].alpha_at_draw is None


def test_a_seed_draws_the_same_paths_and_spends_none_of_the_global_numbers() -> None:
    net = nn.Sequential(*(linear() for _ in range(8)))
    set_sampler(net, UniformPath())
    state = torch.random.get_rng_state()
    paths = []
    for _ in range(2):
        draw(net, torch.Generator().manual_seed(4))
        paths.append([choice.drawn for choice in net])
    assert paths[0] == paths[1]
    assert len(set(paths[0])) == 2
    assert torch.equal(state, torch.random.get_rng_state())
