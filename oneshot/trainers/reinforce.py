"""REINFORCE for the alphas: the reward of a sampled network, its baseline, and the gradient they give.

J(alpha) = E[R(k)], where every decision l draws its option k_l from p_l = softmax(alpha_l). No gradient goes through a
network: grad J = E[(R(k) - b) grad log p(k)] for every b that does not depend on k. Source: Williams 1992, "Simple
statistical gradient-following algorithms"; ProxylessNAS, arXiv 1812.00332, section 3.3.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigurationError
from .cost_loss import DEFAULT_REFERENCE

__all__ = [
    "DEFAULT_EXPONENT",
    "Reward",
    "RewardLike",
    "check_estimator",
    "check_method",
    "check_reference",
    "moved_baseline",
    "policy_gradient",
]

DEFAULT_EXPONENT = 0.1  # of the authors' code
RewardLike = str | Callable[[Mapping[str, float]], float]


def policy_gradient(probabilities: Tensor, chosen: Sequence[int], advantages: Tensor) -> Tensor:
    """(1/m) sum_i A_i (p - e_{k_i}): the gradient of -(1/m) sum_i A_i log p_{k_i} by the logits of p.

    ``probabilities``: shape (n,), p = softmax(alpha). ``chosen``: the options k_i of m samples; ``advantages``: shape
    (m,), A_i = R_i - b. Shape (n,); going down this gradient goes up the expected reward.

    >>> policy_gradient(torch.tensor([0.25, 0.75]), [0, 1], torch.tensor([1.0, 0.0]))  # (p - e_0) / 2
    tensor([-0.3750,  0.3750])
    """
    taken = F.one_hot(torch.tensor(chosen, device=probabilities.device), len(probabilities)).to(probabilities)
    return advantages.to(probabilities) @ (probabilities - taken) / len(chosen)


def moved_baseline(baseline: float | None, mean: float, decay: float) -> float:
    """b + decay (mean - b), or the mean itself where there is no b yet.

    In the authors' code ``decay`` is 0.99 and is the share of the new mean, so that b is nearly the last mean.

    >>> moved_baseline(None, 0.5, 0.99), moved_baseline(0.5, 1.0, 0.75)
    (0.5, 0.875)
    """
    return mean if baseline is None else baseline + decay * (mean - baseline)


@final
class Reward:
    """R = task prod_j (ref_j / C_j)^w_j of a sampled network with the costs C_j.

    Args:
        task: a name among what is measured: one of the metrics, the larger the better, or ``'loss'``, which counts as
            exp(-loss): for cross-entropy the geometric mean of the true classes' probabilities. Or a function from
            all that is measured to a number. None: the first metric, or exp(-loss) where there are none.
        exponent: w_j, at least 0, one number or a mapping by cost. ``names``: the costs of the run.

    ConfigurationError for anything else, and for a negative task while there are costs: a cheaper network would then
    be rewarded less.

    >>> reward = Reward("acc1", 0.5, ["macs"])
    >>> reward({"loss": 0.3, "acc1": 0.8}, {"macs": 400.0}, {"macs": 100.0})  # 0.8 * (100 / 400)^0.5
    0.4
    """

    def __init__(self, task: RewardLike | None, exponent: float | Mapping[str, float], names: Sequence[str]) -> None:
        if task is not None and not isinstance(task, str) and not callable(task):
            raise ConfigurationError(f"reward={task!r}: the name of a metric, 'loss', a function or None is needed")
        given = dict(exponent) if isinstance(exponent, Mapping) else dict.fromkeys(names, exponent)
        if set(given) != set(names):
            raise ConfigurationError(f"cost_exponent={given}: the costs of this run are {list(names)}, one number each")
        for name, number in given.items():
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if not is_number or not math.isfinite(number) or number < 0:
                raise ConfigurationError(f"cost_exponent of {name!r}={number!r}: a finite number >= 0 is needed")
        self._task, self.exponents = task, {name: float(given[name]) for name in names}

    @property
    def name(self) -> str:
        """What the reward is made from, as text."""
        return self._task if isinstance(self._task, str) else "default" if self._task is None else "a function"

    def task(self, measured: Mapping[str, float]) -> float:
        """The task's part; ``measured``: ``'loss'`` and the metrics of a network, by name."""
        if callable(self._task):
            found = float(self._task(measured))
        else:
            name = self._task or next((key for key in measured if key != "loss"), "loss")
            if name not in measured:
                raise ConfigurationError(f"reward={name!r}: measured are {list(measured)}; name one of them")
            found = math.exp(-measured["loss"]) if name == "loss" else float(measured[name])
        if found < 0 and any(self.exponents.values()):
            raise ConfigurationError(
                f"reward {self.name!r} is {found}; with costs it is multiplied by (ref / cost)^w and must not be "
                "negative. Give a function that returns a number of at least 0, such as lambda m: math.exp(m['score'])"
            )
        return found

    def __call__(
        self, measured: Mapping[str, float], costs: Mapping[str, float], references: Mapping[str, float]
    ) -> float:
        """R; ``costs`` and ``references`` by name, in one unit each."""
        factors = [(references[name] / costs[name]) ** w for name, w in self.exponents.items() if w]
        return self.task(measured) * math.prod(factors)


def check_method(
    method: str, regularizer: str | None, params: object, reward: object, exponent: float | Mapping[str, float]
) -> None:
    """ConfigurationError for arguments of ``ProxylessTrainer`` that its ``arch_method`` does not read."""
    if method not in ("gradient", "reinforce"):
        raise ConfigurationError(f"arch_method={method!r}: allowed are 'gradient' and 'reinforce'")
    if method == "gradient" and (reward is not None or exponent != DEFAULT_EXPONENT):
        raise ConfigurationError(
            "arch_method='gradient' has no reward: reward and cost_exponent are for 'reinforce'. Its costs are weighed "
            "by grad_reg_loss_params"
        )
    if method == "reinforce" and (params is not None or regularizer not in ("add#linear", None)):
        raise ConfigurationError(
            f"grad_reg_loss_type={regularizer!r}, grad_reg_loss_params={params}: arch_method='reinforce' has costs in "
            "its reward, (ref / cost)^cost_exponent; leave these two out, or give grad_reg_loss_type=None to reward "
            "the task alone"
        )


def check_estimator(rl_batch_size: int, baseline_decay: float) -> None:
    """ConfigurationError for a number of samples or a decay that leaves no gradient."""
    if not isinstance(rl_batch_size, int) or isinstance(rl_batch_size, bool) or rl_batch_size < 2:
        raise ConfigurationError(
            f"rl_batch_size={rl_batch_size!r}: an integer of at least 2 is needed; the baseline is nearly the mean of "
            "these rewards, and of a single one nothing would be left"
        )
    is_number = isinstance(baseline_decay, int | float) and not isinstance(baseline_decay, bool)
    if not is_number or not 0 < baseline_decay <= 1:
        raise ConfigurationError(f"baseline_decay={baseline_decay!r}: a number above 0, at most 1, is needed")


def check_reference(references: float | Mapping[str, float] | None, units: Mapping[str, str]) -> None:
    """ConfigurationError for a reference that a reward cannot divide by a cost; CostLoss looks at the rest."""
    given = references.values() if isinstance(references, Mapping) else [references]
    if units and any(isinstance(number, int | float) and not number > 0 for number in given):
        raise ConfigurationError(f"ref_latency={references}: the reward (ref / cost)^w needs it above 0")
    ((name, unit),) = units.items() if len(units) == 1 else (("", "ms"),)
    if references == DEFAULT_REFERENCE and unit != "ms":
        raise ConfigurationError(
            f"ref_latency={DEFAULT_REFERENCE} is the default in ms; the cost is {name!r}, so give the reference in "
            f"{unit}"
        )
