"""InputChoice against the enumeration of subsets, written with itertools and plain tensor arithmetic."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from every_sampler import SAMPLERS
from torch import Tensor, nn
from torch.func import functional_call

from oneshot import (
    InputChoice,
    OnePath,
    draw,
    set_sampler,
)
from oneshot.errors import ConfigurationError, ShapeMismatchError
from oneshot.mutables import Sampler

SPACES = [(3, 1), (4, 2), (3, 3), (3, None)]
REDUCTIONS = ["sum", "mean", "concat", "none"]


def subsets(n: int, k: int | None) -> list[tuple[int, ...]]:
    return [s for size in ([k] if k else range(1, n + 1)) for s in combinations(range(n), size)]


def reduced(tensors: list[Tensor], reduction: str) -> list[Tensor]:
    """The output of one subset, as a list of tensors."""
    if reduction == "none":
        return tensors
    if reduction == "concat":
        return [torch.cat(tensors, dim=1)]
    total = torch.stack(tensors).sum(0)
    return [total / len(tensors) if reduction == "mean" else total]


def outputs_of(output: Any) -> list[Tensor]:
    return output if isinstance(output, list) else [output]


def possible() -> list[Any]:
    """A free number of inputs has no concatenation: the width would depend on the subset."""
    return [(n, k, r) for n, k in SPACES for r in REDUCTIONS if k is not None or r in ("sum", "mean")]


@pytest.mark.parametrize(
    ("n", "k", "options"),
    [
        (3, 1, ((0,), (1,), (2,))),
        (3, 2, ((0, 1), (0, 2), (1, 2))),
        (2, 2, ((0, 1),)),
        (1, 1, ((0,),)),
        (3, None, ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2))),
    ],
)
def test_the_options_are_the_subsets(n: int, k: int | None, options: tuple[Any, ...]) -> None:
    choice = InputChoice(n_candidates=n, n_chosen=k)
    assert choice.options == options
    assert choice.alpha.shape == (len(options),)


def test_one_input_is_chosen_by_default() -> None:
    assert InputChoice(3).n_chosen == 1
    assert InputChoice(3).reduction == "sum"


@pytest.mark.parametrize(("n", "k", "reduction"), possible())
def test_value_is_the_mean_over_the_subsets(n: int, k: int | None, reduction: Any) -> None:
    choice = InputChoice(n, n_chosen=k, reduction=reduction).double()
    with torch.no_grad():
        choice.alpha.copy_(torch.randn(len(choice.options)))
    inputs = [torch.randn(2, 3, 2, dtype=torch.float64) for _ in range(n)]
    p = choice.alpha.detach().exp() / choice.alpha.detach().exp().sum()
    columns = zip(*(reduced([inputs[i] for i in s], reduction) for s in subsets(n, k)), strict=True)
    expected = [sum(q * t for q, t in zip(p, column, strict=True)) for column in columns]
    got = outputs_of(choice(inputs))
    assert len(got) == len(expected)
    assert all(torch.allclose(g, e, rtol=1e-12) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize(("n", "k", "reduction"), possible())
def test_gradients_are_finite_differences(n: int, k: int | None, reduction: Any) -> None:
    choice = InputChoice(n, n_chosen=k, reduction=reduction).double()
    alpha = torch.randn(len(choice.options), dtype=torch.float64, requires_grad=True)
    inputs = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(n)]

    def output(alpha: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(outputs_of(functional_call(choice, {"alpha": alpha}, (list(inputs),))))

    assert torch.autograd.gradcheck(output, (alpha, *inputs))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize(("n", "k", "reduction"), [(3, 1, "sum"), (3, 2, "none"), (3, 2, "concat"), (3, None, "mean")])
def test_every_sampler_weighs_the_subsets(sampler: Sampler, n: int, k: int | None, reduction: Any) -> None:
    """Value, input gradients and alpha gradient of sum_k w_k o_k with the gates w; what w is, is tested elsewhere."""
    choice = InputChoice(n, n_chosen=k, reduction=reduction).double()
    set_sampler(choice, sampler)
    for seed in range(3):
        draw(choice, torch.Generator().manual_seed(seed))
        inputs = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(n)]
        learning = [choice.alpha, *inputs]
        weights = choice.gate().weights
        columns = zip(*(reduced([inputs[i] for i in s], reduction) for s in subsets(n, k)), strict=True)
        mixed = [sum(w * t for w, t in zip(weights, column, strict=True)) for column in columns]
        sums = [sum((t**3).sum() for t in outputs) for outputs in (outputs_of(choice(inputs)), mixed)]
        assert torch.allclose(*sums, rtol=1e-12)
        found = [torch.autograd.grad(s, learning, allow_unused=True) for s in sums]
        for got, expected in zip(*found, strict=True):
            zero = torch.zeros(1, dtype=torch.float64)
            pair = [zero if g is None else g for g in (got, expected)]
            assert torch.allclose(*pair, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_what_follows_may_be_in_place(sampler: Sampler) -> None:
    """The default hands one input on; adding to the output must not add to that input."""
    choice = InputChoice(2)
    set_sampler(choice, sampler)
    draw(choice, torch.Generator().manual_seed(0))
    inputs = [torch.ones(2), torch.ones(2)]
    output = choice(inputs)
    output += 5
    assert [t.tolist() for t in inputs] == [[1.0, 1.0], [1.0, 1.0]]


def test_named_inputs_come_in_any_order() -> None:
    choice = InputChoice(choose_from=["skip", "main", "side"], n_chosen=2)
    set_sampler(choice, OnePath(2))
    inputs = {"side": torch.tensor([5.0]), "skip": torch.tensor([1.0]), "main": torch.tensor([3.0])}
    assert choice(inputs).tolist() == [8.0]
    assert choice.names == ("skip", "main", "side")
    assert choice.n_candidates == 3


@pytest.mark.parametrize(
    ("choice", "inputs", "words"),
    [
        (InputChoice(2), [torch.ones(1)], "list of 2 tensors, got 1"),
        (InputChoice(2), [torch.ones(1)] * 3, "list of 2 tensors, got 3"),
        (InputChoice(2), torch.ones(2), "list of 2 tensors, got a Tensor"),
        (InputChoice(2), {0: torch.ones(1), 1: torch.ones(1)}, "list of 2 tensors, got a dict"),
        (InputChoice(2), [torch.ones(1), None], "input 1 is a NoneType"),
        (InputChoice(2), [(torch.ones(1),), torch.ones(1)], "input 0 is a tuple"),
        (InputChoice(choose_from=["a", "b"]), [torch.ones(1)] * 2, r"exactly \['a', 'b'\], got a list"),
        (InputChoice(choose_from=["a", "b"]), {"a": torch.ones(1)}, r"exactly \['a', 'b'\], got \['a'\]"),
        (
            InputChoice(choose_from=["a", "b"]),
            dict.fromkeys("abc", torch.ones(1)),
            r"exactly \['a', 'b'\], got \['a', 'b', 'c'\]",
        ),
        (InputChoice(choose_from=["a", "b"]), {"a": torch.ones(1), "b": 3}, "input 1 is a int"),
    ],
)
def test_calls_of_the_wrong_form(choice: InputChoice, inputs: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        choice(inputs)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "exactly one"),
        ({"n_candidates": 2, "choose_from": ["a", "b"]}, "exactly one"),
        ({"n_candidates": 0}, "at least 1"),
        ({"n_candidates": -1}, "at least 1"),
        ({"n_candidates": 2.5}, "integer"),
        ({"n_candidates": "3"}, "integer"),
        ({"n_candidates": True}, "integer"),
        ({"choose_from": []}, "different names"),
        ({"choose_from": ["a", "a"]}, "different names"),
        ({"choose_from": "ab"}, "different names"),
        ({"choose_from": [1, 2]}, "different names"),
        ({"n_candidates": 3, "n_chosen": 0}, "at least 1"),
        ({"n_candidates": 3, "n_chosen": 4}, "1 to 3"),
        ({"n_candidates": 3, "n_chosen": 1.0}, "integer"),
        ({"n_candidates": 3, "reduction": "max"}, "allowed are"),
        ({"n_candidates": 3, "n_chosen": None, "reduction": "concat"}, "different size"),
        ({"n_candidates": 3, "n_chosen": None, "reduction": "none"}, "different size"),
        ({"n_candidates": 11, "n_chosen": None}, "more than 1023"),
        ({"n_candidates": 60, "n_chosen": 30}, "more than 1023"),
    ],
)
def test_arguments_that_cannot_be(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        InputChoice(**arguments)


def test_ten_inputs_are_all_subsets() -> None:
    assert len(InputChoice(10, n_chosen=None).options) == 1023


def test_inputs_of_different_shapes() -> None:
    narrow, wide = torch.ones(2, 3), torch.ones(2, 4)
    with pytest.raises(ConfigurationError, match=r"\(2, 3\), \(2, 4\)"):
        InputChoice(2, n_chosen=2)([narrow, wide])
    assert InputChoice(2, n_chosen=2, reduction="concat")([narrow, wide]).shape == (2, 7)
    with pytest.raises(ShapeMismatchError, match=r"inputs \[1\] .*\(2, 4\).*inputs \[0\] .*\(2, 3\)"):
        InputChoice(2)([narrow, wide])


def test_gradients_reach_what_was_chosen_only() -> None:
    choice = InputChoice(3, n_chosen=2)
    set_sampler(choice, OnePath(1))  # inputs 0 and 2
    layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    choice([layer(torch.ones(1, 2)) for layer in layers]).sum().backward()
    assert [layer.weight.grad is not None for layer in layers] == [True, False, True]
