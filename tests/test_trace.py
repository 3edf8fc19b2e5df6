"""What a trace says happens, against what happens when the network is pinned to each architecture and run."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_spaces import architectures, random_space
from torch import Tensor, nn

from oneshot import BinaryGates, InputChoice, LayerChoice, OnePath, Repeat, decisions, draw, fixed_arch, set_sampler
from oneshot.errors import ShapeMismatchError, UnsupportedModelError
from oneshot.graph import Call, Condition, evaluated, intersect, parameter_conditions, trace_calls, undecided_inside


def leaf(rng: random.Random) -> nn.Module:
    n = rng.randint(0, 3)
    return nn.Sequential(nn.Linear(3, n), nn.Linear(n, 3)) if n else nn.Identity()


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def holds(when: Condition, choices: dict[str, int]) -> bool:
    return all(choices[label] in options for label, options in when.items())


@contextmanager
def counting(model: nn.Module) -> Iterator[Counter[int]]:
    """Counts the calls of every Linear by its id."""
    ran: Counter[int] = Counter()
    handles = [
        m.register_forward_hook(lambda module, *_: ran.update([id(module)])) for m in model.modules() if is_linear(m)
    ]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def happens(calls: list[Call], choices: dict[str, int]) -> Counter[int]:
    return Counter(id(call.module) for call in calls if holds(call.when, choices))


def check(model: nn.Module, x: Tensor) -> int:
    """The calls of every architecture, traced once and run one by one; returns how many calls there were."""
    calls = trace_calls(model, (x,), is_linear)
    total = 0
    for choices in architectures(model):
        for label, decision in decisions(model).items():
            decision.set_sampler(OnePath(choices[label]))
        with counting(model) as ran, torch.no_grad():
            model(x)
        assert happens(calls, choices) == ran, choices
        total += ran.total()
    return total


# --- conditions -------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_a_call_happens_exactly_when_its_condition_holds(seed: int) -> None:
    check(random_space(seed, leaf), torch.rand(2, 3))


class Shared(nn.Module):
    """One Linear as both candidates of a choice, inside one of them too, and outside."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.choice = LayerChoice([self.one, self.one, nn.Sequential(self.one, nn.Linear(3, 3))])

    def forward(self, x: Tensor) -> Tensor:
        return self.one(self.choice(x))


def test_one_module_as_several_candidates_and_outside() -> None:
    # option 0: one; option 1: one; option 2: one and another Linear; always: one. 2 + 2 + 3 calls
    assert check(Shared(), torch.rand(2, 3)) == 7


def test_one_module_as_several_blocks_of_a_repeat() -> None:
    linear = nn.Linear(3, 3)
    # depths 0, 1, 2, 3 of the same block
    assert check(nn.Sequential(Repeat([linear] * 3, depth=(0, 3))), torch.rand(2, 3)) == 6


def test_one_choice_called_at_two_places() -> None:
    choice = LayerChoice([nn.Linear(3, 3), nn.Identity()])
    outer = LayerChoice([choice, nn.Sequential(choice, choice)], label="outer")
    # (outer, choice): (0, Linear) 1 + 1, (1, Linear) 2 + 1, and none with the Identity
    assert check(nn.Sequential(choice, outer), torch.rand(2, 3)) == 5


def nested_in_its_own_label() -> nn.Module:
    inner = LayerChoice({"a": nn.Sequential(nn.Linear(3, 3)), "b": nn.Sequential(nn.Linear(3, 3))}, label="x")
    return nn.Sequential(LayerChoice({"a": nn.Sequential(nn.Identity()), "b": nn.Sequential(inner)}, label="x"))


def test_a_choice_inside_a_candidate_of_its_own_label() -> None:
    # x = a: nothing; x = b: the inner choice takes b too. Its candidate a never runs, and is not in the trace.
    model = nested_in_its_own_label()
    assert check(model, torch.rand(2, 3)) == 1
    assert [dict(call.when) for call in trace_calls(model, (torch.rand(2, 3),), is_linear)] == [{"x": {1}}]


def test_what_was_decided_at_construction_always_happens() -> None:
    with fixed_arch({"a": 1, "r": 2}):
        model = nn.Sequential(
            LayerChoice([nn.Identity(), nn.Linear(3, 3)], label="a"),
            Repeat([nn.Linear(3, 3) for _ in range(3)], depth=(1, 3), label="r"),
        )
    calls = trace_calls(model, (torch.rand(2, 3),), is_linear)
    assert [dict(call.when) for call in calls] == [{}, {}, {}]
    assert len(parameter_conditions(model)) == 6
    assert all(conditions == [{}] for _, conditions in parameter_conditions(model))


def test_conditions_of_parameters_by_hand() -> None:
    shared = nn.Linear(2, 2, bias=False)
    inner = LayerChoice([shared, nn.Linear(2, 3, bias=False)], label="inner")
    row = Repeat([nn.Linear(2, 4, bias=False), nn.Linear(2, 5, bias=False)], depth=(1, 2), label="row")
    model = nn.Sequential(LayerChoice([inner, shared], label="outer"), row, InputChoice(2, label="in"))
    found = {p.shape[0]: conditions for p, conditions in parameter_conditions(model)}
    assert found == {
        2: [{"outer": {0}, "inner": {0}}, {"outer": {1}}],
        3: [{"outer": {0}, "inner": {1}}],
        4: [{"row": {0, 1}}],  # depths 1 and 2
        5: [{"row": {1}}],  # depth 2
    }


@given(*(st.dictionaries(st.sampled_from("abc"), st.frozensets(st.integers(0, 2), min_size=1)) for _ in range(2)))
def test_intersect_holds_when_both_hold(one: Condition, other: Condition) -> None:
    both = intersect(one, other)
    for i in range(27):
        choices = {"a": i % 3, "b": i // 3 % 3, "c": i // 9}
        expected = holds(one, choices) and holds(other, choices)
        assert (both is not None and holds(both, choices)) == expected


# --- calls ------------------------------------------------------------------------------------------------------


def test_paths_shapes_and_parents_of_calls() -> None:
    inner = LayerChoice([nn.Linear(3, 5), nn.Linear(3, 5)], label="inner")
    outer = LayerChoice({"plain": nn.Linear(3, 5), "nested": nn.Sequential(nn.ReLU(), inner)}, label="outer")
    model = nn.Sequential(outer, Repeat([nn.Linear(5, 5)], depth=(0, 1), label="row"))
    calls = trace_calls(model, (torch.rand(2, 7, 3),), lambda m: isinstance(m, nn.Linear | LayerChoice | Repeat))
    assert [(c.path, c.input_shape, c.output_shape, c.number, c.parent) for c in calls] == [
        ("0.candidates.plain", (2, 7, 3), (2, 7, 5), -1, (0, {0})),
        ("0.candidates.nested.1.candidates.0", (2, 7, 3), (2, 7, 5), -1, (1, {0})),
        ("0.candidates.nested.1.candidates.1", (2, 7, 3), (2, 7, 5), -1, (1, {1})),
        ("0.candidates.nested.1", (2, 7, 3), (2, 7, 5), 1, (0, {1})),
        ("0", (2, 7, 3), (2, 7, 5), 0, None),
        ("1.blocks.0", (2, 7, 5), (2, 7, 5), -1, (2, {1})),
        ("1", (2, 7, 5), (2, 7, 5), 2, None),
    ]
    assert all(leaf.device.type == "meta" for call in calls for leaf in (*call.args, call.output))


def test_calls_inside_a_unit_are_not_reported() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 3))
    calls = trace_calls(model, (torch.rand(2, 3),), lambda m: m is not model)
    assert [call.path for call in calls] == ["0", "1"]


class Named(nn.Module):
    def forward(self, *, x: Tensor, scale: float) -> Tensor:
        return x * scale


class Wants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.named = Named()

    def forward(self, x: Tensor) -> Tensor:
        return self.named(scale=2.0, x=x)


def test_keep_keeps_the_tensors_and_keywords() -> None:
    x = torch.rand(2, 3)
    (call,) = trace_calls(Wants(), (x,), lambda m: isinstance(m, Named), keep=True)
    assert (call.args, call.kwargs["scale"], call.input_shape) == ((), 2.0, (2, 3))
    assert torch.equal(call.kwargs["x"], x)
    assert torch.equal(call.output, 2 * x)


class Silent(nn.Module):
    def forward(self) -> float:
        return 1.0


class Asks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.silent = Silent()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.silent()


def test_a_call_without_tensors_has_no_shape() -> None:
    (call,) = trace_calls(Asks(), (torch.rand(2, 3),), lambda m: isinstance(m, Silent))
    with pytest.raises(UnsupportedModelError, match=r"silent .*is called without a tensor"):
        call.input_shape
    with pytest.raises(UnsupportedModelError, match=r"silent .*returns no tensor"):
        call.output_shape


def test_undecided_inside_names_the_choice() -> None:
    with fixed_arch({"done": 0}):
        done = LayerChoice([nn.ReLU(), nn.Tanh()], label="done")
    assert undecided_inside(nn.Sequential(done, nn.ReLU(), InputChoice(2))) is None
    model = nn.Sequential(done, nn.Sequential(Repeat([nn.ReLU()], depth=(0, 1), label="row")))
    assert undecided_inside(model) == "Repeat(label='row', depth=(0, 1))"


# --- the model is left as it was --------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Random in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ZeroDivisionError("on purpose")


def prepared(last: nn.Module) -> nn.Sequential:
    choice = LayerChoice([nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3), Noisy()), nn.Identity()], label="a")
    model = nn.Sequential(nn.BatchNorm1d(3), choice, Repeat([nn.Linear(3, 3)], depth=(0, 1), label="r"), last)
    model.train()
    model[0].eval()  # frozen by its owner
    set_sampler(model, BinaryGates(2))
    draw(model, torch.Generator().manual_seed(0))
    return model


def snapshot(model: nn.Module) -> tuple[object, ...]:
    mutables = [d.members[0] for d in decisions(model).values()]
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()],
        [module.training for module in model.modules()],
        [(m.sampler, m.drawn, m.alpha_at_draw) for m in mutables],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        torch.get_rng_state(),
        torch.is_grad_enabled(),
    )


def same(one: object, other: object) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def test_a_trace_leaves_the_model_as_it_was() -> None:
    model = prepared(nn.Linear(3, 3))
    before = snapshot(model)
    assert len(trace_calls(model, (torch.rand(4, 3, generator=torch.Generator()),), is_linear)) == 3
    assert same(before, snapshot(model))


def test_a_trace_that_fails_leaves_the_model_as_it_was() -> None:
    model = prepared(Fails())
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"\(4, 3\).*ZeroDivisionError: on purpose") as caught:
        trace_calls(model, (torch.rand(4, 3, generator=torch.Generator()),), is_linear)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert same(before, snapshot(model))


def test_a_bad_question_leaves_no_hook_behind() -> None:
    model = prepared(nn.Linear(3, 3))
    before = snapshot(model)

    def is_unit(module: nn.Module) -> bool:
        return 1 / (not isinstance(module, Repeat)) > 0

    with pytest.raises(ZeroDivisionError):
        trace_calls(model, (torch.rand(4, 3, generator=torch.Generator()),), is_unit)
    assert same(before, snapshot(model))


def test_evaluated_restores_after_an_exception() -> None:
    model = prepared(nn.Linear(3, 3))
    before = snapshot(model)

    def stopped() -> None:
        with evaluated(model, OnePath(0)):
            assert not any(m.training for m in model.modules())
            assert not torch.is_grad_enabled()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert same(before, snapshot(model))


def test_a_model_that_does_not_run_names_the_shape() -> None:
    model = nn.Sequential(LayerChoice([nn.Linear(3, 3), nn.Identity()]), nn.Linear(3, 2))
    with pytest.raises(UnsupportedModelError, match=r"Sequential does not run on an input of shape \[\(1, 5\)\]"):
        trace_calls(model, (torch.rand(1, 5),), is_linear)
    with pytest.raises(UnsupportedModelError, match=r"shape \['str'\]"):
        trace_calls(model, ("text",), is_linear)


def test_an_error_of_the_library_comes_out_as_it_is() -> None:
    model = nn.Sequential(LayerChoice([nn.Linear(3, 3), nn.Linear(3, 4)]))
    with pytest.raises(ShapeMismatchError):
        trace_calls(model, (torch.rand(1, 3),), is_linear)
