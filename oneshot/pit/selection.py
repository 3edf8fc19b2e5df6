"""Which option of each choice is taken: how an own loop samples, and how decided it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..cost.decode import best_under_budget, best_use
from ..cost.memory import Cost
from ..errors import ArchMismatchError
from ..mutables import Decision, GumbelSoftmax, Softmax, lead_
from ..mutables.samplers import first_argmax

__all__ = ["USED", "choose_", "fixed_options", "inverse_variation", "sampler_of", "set_choices", "taken"]

USED = 0.95  # of a target that held a search back, or of the most that any architecture uses of it

_DECIDED = 50.0  # of a logit above zeros: exp(-50) is 2e-22


def sampler_of(temperature: float, *, gumbel: bool, hard: bool) -> Softmax | GumbelSoftmax:
    """Softmax or Gumbel softmax; ``hard``: one option runs, and alpha has the gradient of the soft weights."""
    return GumbelSoftmax(temperature, hard) if gumbel else Softmax(temperature, hard)


def inverse_variation(probabilities: Tensor, eps: float = 1e-3) -> Tensor:
    """mean(p)^2 / (var(p) + eps): the squared inverse of the coefficient of variation; small where p is one-hot.

    ``probabilities``: shape (n,). The variance is that of the n numbers, divided by n.

    >>> inverse_variation(torch.full((4,), 0.25)), inverse_variation(torch.tensor([1.0, 0.0]))  # 0.25 / 0.251
    (tensor(62.5000), tensor(0.9960))
    """
    return probabilities.mean() ** 2 / (probabilities.var(correction=0) + eps)


def taken(decision: Decision, probabilities: Tensor) -> Tensor:
    """The weights that the options of a decision run with in this step, shape (n,), without gradient.

    Of a path that was drawn they are one-hot: what did not run has no part in it, whatever its probability.
    """
    with torch.no_grad():
        if isinstance(decision.sampler, Softmax | GumbelSoftmax) and not decision.sampler.hard:
            return probabilities.detach()
        return decision.members[0].gate().weights.detach()


@torch.no_grad()
def set_choices(choices: Mapping[str, Decision], indices: Mapping[str, int]) -> None:
    """Let every alpha say clearly which option is taken: softmax gives all others 2e-22 of its probability."""
    for label, decision in choices.items():
        decision.alpha.zero_()
        decision.alpha[indices[label]] = _DECIDED


def choose_(
    choices: Mapping[str, Decision], costs: Mapping[str, Cost], targets: Mapping[str, float], *, fills: bool
) -> None:
    """Let the most probable options lead that keep all targets; exact.

    ``fills``: those of them that use, of the target that can be used best, 95 % of the most that any do. Choices that
    do not learn stay as they are. InfeasibleTargetError if nothing is within the targets.
    """
    still = fixed_options(choices)
    use = best_use(costs, targets, still) if fills else None
    least = None if use is None else {use[0]: USED * use[1]}
    log_p = {label: d.alpha.detach().double().log_softmax(0).tolist() for label, d in choices.items()}
    lead_(choices, best_under_budget(log_p, costs, targets, least=least, fixed=still))


def fixed_options(choices: Mapping[str, Decision]) -> dict[str, int]:
    """Label -> option of the choices that do not learn."""
    still = {label: d.alpha.detach().tolist() for label, d in choices.items() if not d.alpha.requires_grad}
    return {label: first_argmax(alpha) for label, alpha in still.items()}


def check_labels(choices: Sequence[str], masks: Sequence[str]) -> None:
    """ArchMismatchError for a choice that has the label of a mask: an architecture could not hold both."""
    both = sorted(set(choices) & set(masks))
    if both:
        raise ArchMismatchError(
            f"labels {both} name a choice and, as the path of a layer, a mask: give these choices other labels"
        )
