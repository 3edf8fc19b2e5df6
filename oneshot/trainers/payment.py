"""What the architecture pays in a step, besides the loss of the task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from .gradients import add_gradients, weighted_gradients
from .targets import Pull

__all__ = ["Payment", "payment"]


@final
@dataclass(frozen=True)
class Payment:
    """L(CE, C_1, C_2, ...) at the values of a step, without the part of its gradient that goes through CE.

    ``total``: L. ``of_task``: dL/dCE, which the gradients of the task are multiplied by. ``of_costs``: for each
    parameter of the architecture sum_k dL/dC_k dC_k/d(parameter). ``pull``: of targets.
    """

    total: Tensor
    of_task: Tensor
    of_costs: Sequence[Tensor | None]
    pull: Pull | None

    def add_to(self, learning: Sequence[nn.Parameter], pull: Callable[[], Tensor | None]) -> dict[str, Tensor | float]:
        """Add it to the gradients of the task, which are there; the shares of costs and targets.

        ``pull``: adds what targets pull to the gradients that are there then.
        """
        gradients = [parameter.grad for parameter in learning if parameter.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, self.of_task.to(gradients[0]))
        pulled = pull()
        shares: dict[str, Tensor | float] = {"cost_share": add_gradients(learning, self.of_costs)}
        return shares if pulled is None else {**shares, "target_share": pulled}


def payment(
    task: Tensor,
    costs: Mapping[str, Tensor],
    learning: Sequence[nn.Parameter],
    loss: Callable[[Tensor, Mapping[str, Tensor]], Tensor],
    pull: Pull | None,
) -> Payment:
    """What ``loss(task, costs)`` makes the parameters in ``learning`` pay; the graphs of the costs are kept.

    >>> theta = nn.Parameter(torch.tensor(3.0))
    >>> paid = payment(torch.tensor(2.0), {"c": theta**2}, [theta], lambda task, costs: task * costs["c"], None)
    >>> paid.total.item(), paid.of_task.item(), paid.of_costs[0].item()  # 2 * 9, 9, 2 * 2 * 3
    (18.0, 9.0, 12.0)
    """
    # The loss sees each part as a variable of its own, so that their shares of the gradient are known.
    of_task = task.detach().clone().requires_grad_()
    # A cost that nothing moves may be a number on the CPU.
    variables = {name: cost.detach().to(task.device, copy=True).requires_grad_() for name, cost in costs.items()}
    total = loss(of_task, variables)
    total.backward()
    slopes = {name: None if v.grad is None else v.grad.to(costs[name].device) for name, v in variables.items()}
    factor = torch.zeros_like(task) if of_task.grad is None else of_task.grad
    return Payment(total.detach(), factor, weighted_gradients(costs, slopes, learning), pull)
