"""Losses and scores of a batch, and the two ways to let a hardware cost steer the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ConfigurationError

__all__ = ["LabelSmoothingLoss", "accuracy", "add_linear", "mul_log"]


class LabelSmoothingLoss(nn.Module):
    """Cross-entropy against smoothed labels, mean over the batch.

    The target distribution over n classes is q = 1 − ε + ε/n on the true class and ε/n on every other, and
    the loss of one sample is −Σ_c q_c · log softmax(output)_c.

    Args:
        smoothing: ε, 0 ≤ ε < 1. 0 is the plain cross-entropy.

    Shape: output (batch, n) logits, target (batch,) class indices; the result is 0-dim.

    Raises:
        ConfigurationError: ε is out of range.

    Source: Szegedy et al. 2016, "Rethinking the Inception Architecture", arXiv 1512.00567, section 7.

    Two classes, equal logits: log softmax is −ln 2 on both, so any ε gives ln 2 ≈ 0.6931. Logits (ln 3, 0)
    have softmax (3/4, 1/4): with ε = 0.1 the loss is 0.95 · ln(4/3) + 0.05 · ln 4 ≈ 0.3426.

    >>> import torch
    >>> output, target = torch.tensor([[3.0, 1.0]]).log(), torch.tensor([0])
    >>> round(float(LabelSmoothingLoss(0.1)(output, target)), 4)
    0.3426
    """

    def __init__(self, smoothing: float = 0.1) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise ConfigurationError(
                f"LabelSmoothingLoss: smoothing is {smoothing}; allowed is 0 to less than 1. "
                "It is the probability taken from the true class and spread over all; 0.1 is usual."
            )
        self.smoothing = smoothing

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, label_smoothing=self.smoothing)

    def extra_repr(self) -> str:
        return f"smoothing={self.smoothing}"


def accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> dict[str, Tensor]:
    """Share of samples whose true class is among the k largest outputs, for every k.

    Args:
        output: (batch, n) scores, larger is likelier.
        target: (batch,) class indices.
        topk: the k's, each 1 ≤ k ≤ n.

    Returns:
        ``{"acc1": …, "acc5": …}``, 0-dim float32 tensors from 0 to 1 on the device of the output. Nothing is
        copied to the host, so a GPU is not made to wait.

    Raises:
        ConfigurationError: a k is out of range, a shape is wrong, or the batch is empty.

    Of the true classes 0, 1, 2 only the first is the largest output, the second is second: 1/3 and 2/3.

    >>> import torch
    >>> output = torch.tensor([[9.0, 5.0, 1.0], [9.0, 5.0, 1.0], [9.0, 5.0, 1.0]])
    >>> scores = accuracy(output, torch.tensor([0, 1, 2]), topk=(1, 2))
    >>> {name: round(float(score), 4) for name, score in scores.items()}
    {'acc1': 0.3333, 'acc2': 0.6667}
    """
    if output.ndim != 2 or target.shape != output.shape[:1] or not len(target):
        raise ConfigurationError(
            f"accuracy: output has shape {tuple(output.shape)} and target {tuple(target.shape)}; allowed are "
            "(batch, classes) and (batch,) with at least 1 sample. Give logits and class indices."
        )
    n = output.shape[1]
    for k in topk:
        if not 1 <= k <= n:
            raise ConfigurationError(
                f"accuracy: topk asks for k = {k} but the output has {n} classes; allowed is 1 to {n}. "
                "Leave this k out, or widen the last layer."
            )
    predicted = output.topk(max(topk, default=1), dim=1).indices
    hit = predicted == target.unsqueeze(1)
    return {f"acc{k}": hit[:, :k].any(dim=1).float().mean() for k in topk}


def mul_log(loss: Tensor, expected: Tensor, reference: float, *, alpha: float, beta: float) -> Tensor:
    """The loss times a power of the expected cost over its reference, both as logarithms.

    L = loss · α · (ln E / ln ref)^β. Its gradient is dL/dE = L · β / (E · ln E). At E = ref the factor is α.

    Args:
        loss: the loss of the task.
        expected: E, the expected cost, 0-dim, differentiable, more than 1.
        reference: ref, more than 1, in the same unit as E (for example both in ms).
        alpha: scale of the whole loss; an optimizer that normalises gradients (Adam) does not see it.
        beta: exponent; larger pushes harder towards small costs.

    E is read on the host to check it, so a GPU is waited for.

    Raises:
        ConfigurationError: E or ref is not more than 1 (the logarithm would be zero or negative, and its
            power zero, infinite or NaN), or E is not 0-dim.

    Source: "mul#log" of the official ProxylessNAS code (search/nas_manager.py; its defaults are α = 1,
    β = 0.6); Cai, Zhu, Han 2019, arXiv 1812.00332, section 3.3, for a cost in the loss.

    ln 100 / ln 10 = 2, so a loss of 3 becomes 3 · 0.5 · 2² = 6.

    >>> import torch
    >>> round(float(mul_log(torch.tensor(3.0), torch.tensor(100.0), 10.0, alpha=0.5, beta=2.0)), 4)
    6.0
    """
    _check_scalar("mul_log", expected)
    value = float(expected.detach())
    # "not >" rather than "<=", so that NaN is refused too.
    if not value > 1 or not reference > 1:
        raise ConfigurationError(
            f"mul_log: the expected cost is {value:.6g} and the reference {reference:.6g}; the logarithm needs "
            "both > 1. Change the unit of both (for example µs instead of ms), or use 'add#linear' (add_linear)."
        )
    return loss * alpha * (expected.log() / math.log(reference)) ** beta


def add_linear(loss: Tensor, expected: Tensor, reference: float, *, weight: float) -> Tensor:
    """The loss plus the relative excess of the expected cost, L = loss + λ · (E − ref) / ref.

    Its gradient is dL/dE = λ / ref, the same on both sides of the reference: a cost below it is rewarded.

    Args:
        loss: the loss of the task.
        expected: E, the expected cost, 0-dim, differentiable.
        reference: ref, more than 0, in the same unit as E.
        weight: λ.

    Raises:
        ConfigurationError: ref is not more than 0, or E is not 0-dim.

    Source: "add#linear" of the official ProxylessNAS code (search/nas_manager.py; its default is λ = 0.2);
    it is λ₂ · E[latency] of Cai, Zhu, Han 2019, arXiv 1812.00332, section 3.3.1, in units of the reference and
    shifted to 0 there.

    A cost of 120 ms is 50 % over 80 ms: 2 + 0.1 · 0.5 = 2.05.

    >>> import torch
    >>> round(float(add_linear(torch.tensor(2.0), torch.tensor(120.0), 80.0, weight=0.1)), 4)
    2.05
    """
    _check_scalar("add_linear", expected)
    if not reference > 0:
        raise ConfigurationError(
            f"add_linear: the reference is {reference:.6g}; allowed is more than 0. It is the cost to aim at, in "
            "the unit of the expected cost."
        )
    return loss + weight * (expected - reference) / reference


def _check_scalar(where: str, expected: Tensor) -> None:
    if expected.ndim != 0:
        raise ConfigurationError(
            f"{where}: the expected cost has shape {tuple(expected.shape)}; allowed is a 0-dim tensor. "
            "Sum the costs of the layers first."
        )
