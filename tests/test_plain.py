"""A search model without its choices computes what the pinned one does, with the same weights."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_spaces import architectures, random_space
from torch import nn

from oneshot import LayerChoice, OnePath, Repeat, decisions
from oneshot.cost.plain import without_choices


def linear(rng: random.Random) -> nn.Module:
    return nn.Linear(3, 3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_it_computes_the_same_without_choices(seed: int) -> None:
    model, x = random_space(seed, linear).eval(), torch.rand(2, 3)
    known = decisions(model)
    layout = [(name, id(module)) for name, module in model.named_modules()]
    weights = {id(p) for p in model.parameters()}
    for choices in architectures(model):
        options = {id(member): choices[label] for label, d in known.items() for member in d.members}
        for label, decision in known.items():
            decision.set_sampler(OnePath(choices[label]))
        view = without_choices(model, options)
        with torch.no_grad():
            assert torch.equal(view(x), model(x))
        assert not any(isinstance(module, LayerChoice | Repeat) for module in view.modules())
        assert {id(p) for p in view.parameters()} <= weights
    assert [(name, id(module)) for name, module in model.named_modules()] == layout


def test_what_holds_no_choice_is_the_same_module() -> None:
    plain, choice = nn.Sequential(nn.Linear(2, 2)), LayerChoice([nn.Identity(), nn.ReLU()])
    model = nn.Sequential(plain, choice)
    view = without_choices(model, {id(choice): 1})
    assert view is not model
    assert (view[0], view[1]) == (plain, choice[1])
    assert without_choices(plain, {}) is plain
    assert without_choices(choice, {id(choice): 0}) is choice[0]
