"""Losses against explicit sums, accuracy against scikit-learn, cost terms against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import top_k_accuracy_score

from oneshot.errors import ConfigurationError
from oneshot.losses import LabelSmoothingLoss, accuracy, add_linear, mul_log


def number(tensor: torch.Tensor | None) -> float:
    assert tensor is not None
    return float(tensor.detach())


def double(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def smoothed_cross_entropy(output: list[list[float]], target: list[int], smoothing: float) -> float:
    """The definition, term by term in plain Python."""
    total = 0.0
    for logits, true_class in zip(output, target, strict=True):
        n = len(logits)
        log_sum = math.log(sum(math.exp(logit) for logit in logits))
        for c, logit in enumerate(logits):
            q = 1 - smoothing + smoothing / n if c == true_class else smoothing / n
            total -= q * (logit - log_sum)
    return total / len(target)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize(("batch", "n"), [(1, 2), (5, 3), (4, 10)])
def test_label_smoothing_is_the_explicit_sum(smoothing: float, batch: int, n: int) -> None:
    output = 3 * torch.randn(batch, n, dtype=torch.float64)
    target = torch.randint(n, (batch,))
    loss = LabelSmoothingLoss(smoothing)(output, target)
    assert loss.ndim == 0
    assert float(loss) == pytest.approx(smoothed_cross_entropy(output.tolist(), target.tolist(), smoothing))


def test_label_smoothing_gradient_vanishes_at_the_smoothed_target() -> None:
    # n = 4, ε = 0.2: q is 1 - 0.2 + 0.05 = 0.85 on the true class and 0.05 elsewhere; softmax(log q) = q.
    output = torch.tensor([[0.05, 0.85, 0.05, 0.05]], dtype=torch.float64).log().requires_grad_()
    LabelSmoothingLoss(0.2)(output, torch.tensor([1])).backward()
    assert output.grad is not None
    torch.testing.assert_close(output.grad, torch.zeros_like(output.grad))


def test_label_smoothing_default_is_one_tenth() -> None:
    assert LabelSmoothingLoss().smoothing == 0.1
    assert repr(LabelSmoothingLoss()) == "LabelSmoothingLoss(smoothing=0.1)"


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_label_smoothing_out_of_range(smoothing: float) -> None:
    with pytest.raises(ConfigurationError, match=rf"smoothing is {smoothing}; allowed is 0 to less than 1"):
        LabelSmoothingLoss(smoothing)


def test_accuracy_counted_by_hand() -> None:
    output = torch.tensor([[0.1, 0.9, 0.5], [0.8, 0.3, 0.2], [0.2, 0.6, 0.4], [0.3, 0.2, 0.1]])
    # Ranks of the classes: 1 2 0 | 0 1 2 | 1 2 0 | 0 1 2. True class 1 is first, 1 second, 0 third, 0 first.
    scores = accuracy(output, torch.tensor([1, 1, 0, 0]), topk=(1, 2, 3))
    assert {name: float(score) for name, score in scores.items()} == {"acc1": 0.5, "acc2": 0.75, "acc3": 1.0}
    assert all(score.ndim == 0 for score in scores.values())


def test_accuracy_agrees_with_scikit_learn() -> None:
    output, target = torch.randn(60, 7), torch.randint(7, (60,))
    scores = accuracy(output, target, topk=(5, 1, 3))
    assert list(scores) == ["acc5", "acc1", "acc3"]
    for k in (1, 3, 5):
        expected = top_k_accuracy_score(target.numpy(), output.numpy(), k=k, labels=range(7))
        assert float(scores[f"acc{k}"]) == pytest.approx(expected)


def test_accuracy_reads_nothing_on_the_host() -> None:
    # A meta tensor has no data: any .item() on the way would raise.
    output, target = torch.empty(4, 10, device="meta"), torch.empty(4, dtype=torch.long, device="meta")
    scores = accuracy(output, target, topk=(1, 5))
    assert all(score.is_meta and score.shape == () for score in scores.values())


@pytest.mark.parametrize("k", [0, 4])
def test_accuracy_k_out_of_range(k: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"k = {k} but the output has 3 classes"):
        accuracy(torch.randn(2, 3), torch.tensor([0, 1]), topk=(1, k))


@pytest.mark.parametrize(("output", "target"), [((2, 3), (3,)), ((2, 3), (2, 1)), ((2, 3, 4), (2,)), ((0, 3), (0,))])
def test_accuracy_wrong_shapes(output: tuple[int, ...], target: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError) as error:
        accuracy(torch.zeros(output), torch.zeros(target, dtype=torch.long))
    assert f"output has shape {output} and target {target}" in str(error.value)


losses = st.floats(0.01, 10)
costs = st.floats(1.5, 1e4)


@settings(deadline=None, max_examples=50)
@given(loss=losses, expected=costs, reference=costs, alpha=st.floats(0.1, 2), beta=st.floats(0.1, 2))
def test_mul_log_value_and_gradients(loss: float, expected: float, reference: float, alpha: float, beta: float) -> None:
    task, e = double(loss), double(expected)
    combined = mul_log(task, e, reference, alpha=alpha, beta=beta)
    combined.backward()
    # The logarithm to base ref is another road to ln E / ln ref.
    factor = alpha * math.log(expected, reference) ** beta
    assert number(combined) == pytest.approx(loss * factor)
    assert number(task.grad) == pytest.approx(factor)
    assert number(e.grad) == pytest.approx(loss * factor * beta / (expected * math.log(expected)))
    h = 1e-5 * expected
    above, below = (mul_log(task, double(expected + s * h), reference, alpha=alpha, beta=beta) for s in (1, -1))
    assert number(e.grad) == pytest.approx((number(above) - number(below)) / (2 * h), rel=1e-5)


@settings(deadline=None, max_examples=50)
@given(loss=losses, expected=st.floats(0, 1e4), reference=st.floats(0.01, 1e4), weight=st.floats(0.01, 2))
def test_add_linear_value_and_gradients(loss: float, expected: float, reference: float, weight: float) -> None:
    task, e = double(loss), double(expected)
    combined = add_linear(task, e, reference, weight=weight)
    combined.backward()
    assert number(combined) == pytest.approx(loss + weight * (expected / reference - 1))
    assert number(task.grad) == 1
    assert number(e.grad) == pytest.approx(weight / reference)
    h = 1e-3 * reference
    above, below = (add_linear(task, double(expected + s * h), reference, weight=weight) for s in (1, -1))
    assert number(e.grad) == pytest.approx((number(above) - number(below)) / (2 * h), rel=1e-5)


def test_at_the_reference_the_cost_terms_are_neutral() -> None:
    loss, expected = double(2.3), double(80.0)
    assert number(mul_log(loss, expected, 80.0, alpha=1.0, beta=0.6)) == pytest.approx(2.3)
    assert number(add_linear(loss, expected, 80.0, weight=0.1)) == pytest.approx(2.3)


def test_a_lower_cost_gives_a_lower_loss_on_both_sides_of_the_reference() -> None:
    values = [double(cost) for cost in (40.0, 60.0, 80.0, 100.0)]
    multiplied = [number(mul_log(double(1.0), e, 70.0, alpha=1.0, beta=0.6)) for e in values]
    added = [number(add_linear(double(1.0), e, 70.0, weight=0.1)) for e in values]
    assert multiplied == sorted(multiplied)
    assert added == sorted(added)
    assert multiplied[1] < 1 < multiplied[2]
    assert added[1] < 1 < added[2]


@pytest.mark.parametrize(
    ("expected", "reference"), [(0.5, 80.0), (1.0, 80.0), (80.0, 1.0), (80.0, 0.25), (math.nan, 80.0)]
)
def test_mul_log_needs_more_than_one(expected: float, reference: float) -> None:
    with pytest.raises(ConfigurationError) as error:
        mul_log(double(1.0), double(expected), reference, alpha=1.0, beta=0.6)
    message = str(error.value)
    assert f"expected cost is {expected:g} and the reference {reference:g}" in message
    assert "logarithm needs both > 1" in message
    assert "Change the unit" in message
    assert "'add#linear'" in message


@pytest.mark.parametrize("reference", [0.0, -1.0, math.nan])
def test_add_linear_needs_a_positive_reference(reference: float) -> None:
    with pytest.raises(ConfigurationError, match=rf"reference is {reference:g}; allowed is more than 0"):
        add_linear(double(1.0), double(2.0), reference, weight=0.1)


def test_the_expected_cost_is_one_number() -> None:
    costs_of_layers = torch.tensor([2.0, 3.0])
    with pytest.raises(ConfigurationError, match=r"mul_log: the expected cost has shape \(2,\)"):
        mul_log(double(1.0), costs_of_layers, 80.0, alpha=1.0, beta=0.6)
    with pytest.raises(ConfigurationError, match=r"add_linear: the expected cost has shape \(2,\)"):
        add_linear(double(1.0), costs_of_layers, 80.0, weight=0.1)
