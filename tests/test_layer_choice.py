"""LayerChoice against the sum written out: every candidate evaluated, multiplied by its gate, added.

What the gates of each sampler are is the matter of test_sampler_contract.py.
"""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from every_sampler import SAMPLERS
from torch import Tensor, nn
from torch.nn import functional as F

from oneshot import (
    Argmax,
    BinaryGates,
    EveryPath,
    GumbelSoftmax,
    LayerChoice,
    OnePath,
    Softmax,
    UniformPath,
    decisions,
    draw,
    set_sampler,
)
from oneshot.errors import ConfigurationError, LabelError, ShapeMismatchError, UnsupportedModelError
from oneshot.mutables import Sampler

every_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=str)


class Scale(nn.Module):
    """y = c x, without parameters."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Same(nn.Module):
    """Its input, under another view."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape)


def drawn(model: nn.Module, sampler: Sampler, seed: int = 0) -> nn.Module:
    set_sampler(model, sampler)
    draw(model, torch.Generator().manual_seed(seed))
    return model


def drawn_for(choice: LayerChoice, sampler: Sampler, active: int) -> LayerChoice:
    """Draws until the option ``active`` is the one that runs in the graph."""
    for seed in range(100):
        drawn(choice, sampler, seed)
        if choice.gate().graph == (active,):
            return choice
    raise AssertionError("not drawn")


def random_alpha(model: nn.Module) -> None:
    with torch.no_grad():
        for decision in decisions(model).values():
            decision.alpha.copy_(torch.randn(len(decision.options)))


def gradients(loss: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Zero where nothing flows: a candidate that does not run has no gradient, its term of the sum has zero."""
    found = torch.autograd.grad(loss, tensors, allow_unused=True) if loss.requires_grad else [None] * len(tensors)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


# ---- candidates and names ------------------------------------------------------------------------------------------


def test_a_list_has_indices_and_a_mapping_names() -> None:
    a, b = nn.Linear(2, 2), nn.Identity()
    listed = LayerChoice([a, b])
    assert listed.options == (0, 1)
    assert len(listed) == 2
    assert list(listed) == [a, b]
    assert listed[1] is b
    for mapping in ({"z": a, "a": b}, OrderedDict(z=a, a=b), nn.ModuleDict({"z": a, "a": b})):
        named = LayerChoice(mapping)
        assert named.options == ("z", "a")
        assert list(named) == [a, b]
        assert named["a"] is b
    assert LayerChoice(nn.ModuleList([a, b])).options == (0, 1)
    assert LayerChoice([a, b])(torch.ones(1, 2)).shape == (1, 2)


@pytest.mark.parametrize(
    ("candidates", "words"),
    [
        ([], "at least one"),
        ({}, "at least one"),
        (nn.Identity(), "a list or a mapping"),
        ([nn.Identity(), lambda x: x], "candidate '1' is a function"),
        ({"a": nn.Identity, "b": nn.Identity()}, "candidate 'a' is a type"),
        ({"a": None}, "candidate 'a' is a NoneType"),
        ({1: nn.Identity()}, "must be strings"),
        ({"a.b": nn.Identity()}, "module names"),
        ({"": nn.Identity()}, "module names"),
        ({"keys": nn.Identity()}, "module names"),
        ({"forward": nn.Identity()}, "module names"),
    ],
)
def test_candidates_that_cannot_be(candidates: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        LayerChoice(candidates)


@pytest.mark.parametrize("label", ["", 3, b"a", ("a",)])
def test_labels_that_cannot_be(label: Any) -> None:
    with pytest.raises(LabelError, match="non-empty string"):
        LayerChoice([nn.Identity()], label=label)


# ---- what goes in and what comes out -------------------------------------------------------------------------------


class Many(nn.Module):
    """Several inputs, positional and by keyword, tensors and others; a dict with a tuple in it as output."""

    def __init__(self, swap: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.swap = swap

    def forward(self, x: Tensor, power: int, pair: list[Tensor], *, mode: str, shift: Tensor, none: None) -> Any:
        assert (power, mode, none) == (2, "tanh", None)
        y = torch.tanh(self.linear(x) * pair[0]) ** power
        both = (pair[1] * y, y + shift)
        return {"both": both, "y": y.sum(1)} if self.swap else {"y": y.sum(1), "both": both}


def flat(output: Any) -> list[Tensor]:
    return [output["y"], *output["both"]]


@every_sampler
def test_several_inputs_and_outputs_equal_the_sum_written_out(sampler: Sampler) -> None:
    torch.manual_seed(1)
    choice = LayerChoice({"a": Many(False), "b": Many(True), "c": Many(False)}).double()
    random_alpha(choice)
    drawn(choice, sampler)
    x, one, two, shift = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(4))
    args, kwargs = (x, 2, [one, two]), {"mode": "tanh", "shift": shift, "none": None}
    learning = [x, one, two, shift, *choice.parameters()]
    targets = [torch.randn(4, dtype=torch.float64), *(torch.randn(4, 3, dtype=torch.float64) for _ in range(2))]

    def loss(outputs: list[Tensor]) -> Tensor:
        return sum(((o - t) ** 2).sum() for o, t in zip(outputs, targets, strict=True))

    output = choice(*args, **kwargs)
    assert isinstance(output["both"], tuple)
    got = loss(flat(output))
    columns = zip(*(flat(candidate(*args, **kwargs)) for candidate in choice), strict=True)
    weights = choice.gate().weights
    expected = loss([sum(w * o for w, o in zip(weights, column, strict=True)) for column in columns])
    assert torch.allclose(got, expected, rtol=1e-12)
    for g, e in zip(gradients(got, learning), gradients(expected, learning), strict=True):
        assert torch.allclose(g, e, rtol=1e-9, atol=1e-12)


def test_nested_choices_by_hand() -> None:
    """(1 + (2 + (3 + 5) / 2) / 2) / 2 = 2; pinned to 1, 1, 0 it is 3."""
    inner = LayerChoice([Scale(3), Scale(5)])
    middle = LayerChoice([Scale(2), nn.Sequential(nn.Identity(), inner)])
    outer = LayerChoice([Scale(1), middle])
    x = torch.tensor([1.0, -2.0])
    assert torch.equal(outer(x), 2 * x)
    found = decisions(outer)
    assert list(found) == ["root", "candidates.1", "candidates.1.candidates.1.1"]
    for decision, option in zip(found.values(), (1, 1, 0), strict=True):
        decision.set_sampler(OnePath(option))
    assert torch.equal(outer(x), 3 * x)


def test_first_layer_and_no_parameters() -> None:
    """p = 1/2 each, c = (3, 0), so dL/dalpha = p (c - p.c) = (0.75, -0.75); the input needs no gradient."""
    choice = drawn(LayerChoice([nn.Identity(), Scale(0)]), BinaryGates("all"))
    choice(torch.tensor([1.0, 2.0])).sum().backward()
    assert torch.allclose(choice.alpha.grad, torch.tensor([0.75, -0.75]))


def test_batch_statistics_of_candidates_that_do_not_run_stay() -> None:
    for sampler in (BinaryGates(1), UniformPath(), Argmax(), OnePath(2)):
        choice = drawn(LayerChoice([nn.BatchNorm1d(2) for _ in range(3)]), sampler, seed=3)
        choice(torch.randn(4, 2)).sum().backward()
        ran = [int(norm.num_batches_tracked) for norm in choice]
        assert ran == [int(k == choice.gate().graph[0]) for k in range(3)]


@every_sampler
def test_one_candidate_is_a_choice_of_one(sampler: Sampler) -> None:
    sampler = OnePath(0) if isinstance(sampler, OnePath) else sampler
    choice = drawn(LayerChoice({"only": Scale(3)}), sampler)
    y = choice(torch.ones(2))
    assert y.tolist() == [3.0, 3.0]
    if y.requires_grad:
        y.sum().backward()
        assert choice.alpha.grad.tolist() == [0.0]


# ---- outputs that do not fit ---------------------------------------------------------------------------------------


def test_shapes_that_differ_are_named_in_the_forward_pass() -> None:
    choice = LayerChoice({"narrow": nn.Linear(2, 3), "wide": nn.Linear(2, 4)}, label="width")
    for sampler in (Softmax(), EveryPath()):
        with pytest.raises(ShapeMismatchError, match=r"'wide'.*'width'.*\(5, 4\).*'narrow'.*\(5, 3\)"):
            drawn(choice, sampler)(torch.randn(5, 2))


@pytest.mark.parametrize("sampler", [BinaryGates(2), BinaryGates("all"), GumbelSoftmax(1.0, hard=True)], ids=str)
def test_shapes_that_differ_are_named_in_the_backward_pass(sampler: Sampler) -> None:
    choice = LayerChoice({"narrow": nn.Linear(2, 3), "wide": nn.Linear(2, 4)}, label="width")
    y = drawn_for(choice, sampler, 0)(torch.randn(5, 2))
    with pytest.raises(ShapeMismatchError, match=r"'wide'.*'width'.*\(5, 4\).*'narrow'.*\(5, 3\)"):
        y.sum().backward()


class Returns(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: (x, x), lambda x: x),
        (lambda x: (x, x), lambda x: (x, x, x)),
        (lambda x: (x, x), lambda x: [x, x]),
        (lambda x: {"a": x}, lambda x: {"b": x}),
        (lambda x: {"a": x}, lambda x: (x,)),
    ],
)
def test_structures_that_differ(one: Callable[[Tensor], Any], other: Callable[[Tensor], Any]) -> None:
    choice = LayerChoice([Returns(one), Returns(other)])
    with pytest.raises(ShapeMismatchError, match=r"candidate 1 .* structure .*candidate 0"):
        choice(torch.ones(1))
    y = drawn_for(choice, BinaryGates("all"), 0)(torch.ones(1))
    with pytest.raises(ShapeMismatchError, match=r"candidate 1 .* structure .*candidate 0"):
        next(iter(y.values() if isinstance(y, dict) else y)).sum().backward()


def test_dicts_are_added_by_key_and_not_by_order() -> None:
    choice = LayerChoice([Returns(lambda x: {"a": x, "b": 10 * x}), Returns(lambda x: {"b": 30 * x, "a": 3 * x})])
    output = choice(torch.ones(1))
    assert output["a"].tolist() == [2.0]
    assert output["b"].tolist() == [20.0]


@pytest.mark.parametrize("make", [lambda x: (x, None), lambda x: (x, x.argmax()), lambda x: 3, lambda x: ()])
def test_outputs_that_cannot_be_added(make: Callable[[Tensor], Any]) -> None:
    choice = LayerChoice({"one": Returns(make), "two": Returns(make)})
    with pytest.raises(UnsupportedModelError, match=r"'one'.*cannot be weighted and added"):
        choice(torch.ones(2))
    with pytest.raises(UnsupportedModelError, match=r"'one'.*cannot be weighted and added"):
        drawn_for(choice, BinaryGates(2), 0)(torch.ones(2))


# ---- in place ------------------------------------------------------------------------------------------------------


def in_place_second() -> LayerChoice:
    return LayerChoice({"plain": nn.Linear(2, 2), "inplace": nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 2))})


def test_a_candidate_that_changes_its_input_is_an_error_where_others_read_it() -> None:
    for sampler in (Softmax(), EveryPath(), GumbelSoftmax()):
        with pytest.raises(UnsupportedModelError, match=r"'inplace'.*in place"):
            drawn(in_place_second(), sampler)(torch.randn(3, 2))
    for sampler in (BinaryGates(2), BinaryGates("all"), GumbelSoftmax(hard=True)):
        with pytest.raises(UnsupportedModelError, match=r"'inplace'.*in place"):
            drawn_for(in_place_second(), sampler, 1)(torch.randn(3, 2))
        y = drawn_for(in_place_second(), sampler, 0)(torch.randn(3, 2))
        with pytest.raises(UnsupportedModelError, match=r"'inplace'.*in place"):
            y.sum().backward()
    first = LayerChoice([nn.ReLU(inplace=True), nn.Tanh()])
    with pytest.raises(UnsupportedModelError, match=r"candidate 0 .*in place"):
        first(torch.randn(3, 2))


def test_a_candidate_that_changes_the_output_of_another_one_is_an_error() -> None:
    """The identity hands its input on; what changes that, changes the first term of the sum."""
    choice = LayerChoice([nn.Identity(), nn.ReLU(inplace=True)])
    with pytest.raises(UnsupportedModelError, match=r"candidate 1 .*in place"):
        choice(torch.randn(3, 2))


def test_a_candidate_may_change_its_input_where_it_runs_alone() -> None:
    choice = drawn(in_place_second(), OnePath(1))
    x = torch.tensor([[-1.0, 2.0]])
    expected = choice["inplace"][1](torch.tensor([[0.0, 2.0]]))
    assert torch.equal(choice(x), expected)


def relu_(x: Tensor, y: Tensor) -> Tensor:
    return F.relu_(y) + x


def add_(x: Tensor, y: Tensor) -> Tensor:
    y += x
    return y


def mul_(x: Tensor, y: Tensor) -> Tensor:
    y.mul_(3)
    return y * x


OUT_OF_PLACE = {relu_: lambda x, y: F.relu(y) + x, add_: lambda x, y: y + x, mul_: lambda x, y: 3 * y * x}


@every_sampler
@pytest.mark.parametrize("follow", OUT_OF_PLACE)
def test_what_follows_may_be_in_place(sampler: Sampler, follow: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Also where the candidate hands its input on, itself or as a view, and the input is read again."""
    torch.manual_seed(2)
    choice = LayerChoice([nn.Linear(3, 3), nn.Identity(), Same()]).double()
    random_alpha(choice)
    data = torch.randn(4, 3, dtype=torch.float64)
    for seed in range(6):
        drawn(choice, OnePath(seed % 3) if isinstance(sampler, OnePath) else sampler, seed)
        for grad in (True, False):
            x = data.clone().requires_grad_(grad)
            learning = [*choice.parameters(), *([x] if grad else [])]
            got = (follow(x, choice(x)) ** 2).sum()
            weights = choice.gate().weights
            mixed = sum(w * candidate(x) for w, candidate in zip(weights, choice, strict=True))
            expected = (OUT_OF_PLACE[follow](x, mixed) ** 2).sum()
            assert torch.allclose(got, expected, rtol=1e-12)
            for g, e in zip(gradients(got, learning), gradients(expected, learning), strict=True):
                assert torch.allclose(g, e, rtol=1e-9, atol=1e-12)
            assert torch.equal(x.detach(), data)
        with torch.no_grad():
            x = data.clone()
            follow(x, choice(x))
            assert torch.equal(x, data)


def test_an_input_changed_before_the_gates_have_read_it_is_an_error_of_autograd() -> None:
    choice = drawn(LayerChoice([Scale(2), Scale(3)]), BinaryGates("all"))
    x = torch.ones(2)
    y = choice(x)
    x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- precision -----------------------------------------------------------------------------------------------------


class Recorded(nn.Module):
    def __init__(self, dtypes: list[torch.dtype]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.dtypes = dtypes

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.dtypes.append(y.dtype)
        return y


@every_sampler
def test_candidates_run_under_autocast_also_when_they_are_recomputed(sampler: Sampler) -> None:
    dtypes: list[torch.dtype] = []
    choice = drawn(LayerChoice([Recorded(dtypes) for _ in range(3)]), sampler)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = choice(torch.randn(4, 8))
    y.float().square().sum().backward()
    runs = {GumbelSoftmax(0.8, hard=True): 3, BinaryGates(2): 2, BinaryGates("all"): 3, Softmax(): 3}
    assert len(dtypes) >= runs.get(sampler, 1)
    assert set(dtypes) == {torch.bfloat16}
    dtypes.clear()
    choice(torch.randn(4, 8)).sum().backward()
    assert set(dtypes) == {torch.float32}


def test_gate_gradients_are_summed_in_the_precision_of_alpha() -> None:
    """c = (<g, x>, <g, 2x>) with 1000 terms of 100 * 10 and 100 * 20: (1e6, 2e6), too large for half precision.

    p = 1/2 each: dL/dalpha = p (c - p.c) = (-0.25e6, 0.25e6).
    """
    for dtype in (torch.float16, torch.bfloat16):
        choice = drawn(LayerChoice([nn.Identity(), Scale(2)]).to(dtype), BinaryGates("all"))
        choice(torch.full((1000,), 10.0, dtype=dtype)).backward(torch.full((1000,), 100.0, dtype=dtype))
        assert choice.alpha.grad.tolist() == [-0.25e6, 0.25e6]


def test_alpha_keeps_its_precision_and_follows_double() -> None:
    net = nn.Sequential(LayerChoice([nn.Linear(2, 2), nn.Identity()]))
    alpha = net[0].alpha
    with torch.no_grad():
        alpha.copy_(torch.tensor([0.1, 1 / 3]))
    net(torch.randn(3, 2)).sum().backward()
    before, gradient = alpha.detach().clone(), alpha.grad.clone()
    for half in (nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.float16), lambda m: m.to("cpu", torch.half)):
        half(net)
        assert net[0][0].weight.dtype in (torch.float16, torch.bfloat16)
        assert net[0].alpha is alpha
        assert alpha.dtype == torch.float32
        assert torch.equal(alpha, before)
        assert torch.equal(alpha.grad, gradient)
    for sampler in SAMPLERS:
        assert drawn(net, sampler)(torch.randn(3, 2).half()).dtype == torch.float16
    net.double()
    assert alpha.dtype == alpha.grad.dtype == torch.float64
    assert torch.equal(alpha, before.double())
    net.half()
    assert alpha.dtype == torch.float64
    net.float()
    assert alpha.dtype == torch.float32


def test_alpha_is_single_precision_under_a_half_default() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert LayerChoice([nn.Identity()]).alpha.dtype == torch.float32
        torch.set_default_dtype(torch.float64)
        assert LayerChoice([nn.Identity()]).alpha.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


# ---- copies and states ---------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = LayerChoice([nn.Linear(2, 2), nn.Identity()], label="shared")
        self.two = LayerChoice({"a": nn.Linear(2, 2), "b": nn.Sequential(nn.BatchNorm1d(2), nn.Tanh())})
        self.three = LayerChoice([nn.Linear(2, 2), nn.Identity()], label="shared")

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(self.one(x)))


KEYS = [
    "one.alpha",
    "one.candidates.0.weight",
    "one.candidates.0.bias",
    "two.alpha",
    "two.candidates.a.weight",
    "two.candidates.a.bias",
    "two.candidates.b.0.weight",
    "two.candidates.b.0.bias",
    "two.candidates.b.0.running_mean",
    "two.candidates.b.0.running_var",
    "two.candidates.b.0.num_batches_tracked",
    "three.alpha",
    "three.candidates.0.weight",
    "three.candidates.0.bias",
]


@every_sampler
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])  # noqa: S301
def test_a_copy_in_the_middle_of_a_search_goes_on_alike(sampler: Sampler, copied: Callable[[Any], Any]) -> None:
    net = Net().eval()
    random_alpha(net)
    drawn(net, sampler, seed=5)
    twin = copied(net)
    assert twin.one.sampler == sampler
    assert twin.one.alpha is twin.three.alpha
    assert twin.one.alpha is not net.one.alpha
    x = torch.randn(3, 2)
    outputs = [m(x) for m in (net, twin)]
    assert torch.equal(*outputs)
    found = [gradients(m(x).sum(), list(m.parameters())) for m in (net, twin)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with torch.no_grad():
        twin.one.alpha += 1
    assert not torch.equal(net.one.alpha, twin.one.alpha)


@every_sampler
def test_the_state_dict_holds_weights_and_alphas_only(sampler: Sampler) -> None:
    net = Net()
    random_alpha(net)
    drawn(net, sampler)
    net(torch.randn(3, 2))
    state = net.state_dict()
    assert list(state) == KEYS
    assert all(isinstance(value, Tensor) for value in state.values())
    other = Net()
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), state.values(), strict=True))
    assert other.one.sampler == Softmax()
