"""Published searches as arguments of ``SuperNetTrainer``: ``SuperNetTrainer(model, **gdas(50), loss=..., ...)``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..errors import ConfigurationError
from ..mutables.temperature import Temperature

__all__ = ["fbnet", "gdas"]

_FALL = 0.956  # of FBNet's temperature per epoch, exp(-0.045)


def gdas(num_epochs: int = 250) -> dict[str, Any]:
    """GDAS (Dong and Yang, arXiv 1910.04465): one path per weight step, drawn by Gumbel-max, straight through.

    In a step of the alphas the other candidates are evaluated too, without gradient, for the exact gradient of the
    straight-through gates.

    The temperature falls linearly from 10 in the first epoch to 0.1 in the last one. Half of the data are for the
    alphas, whose optimizer is Adam with a learning rate of 3e-4, betas (0.5, 0.999) and a weight decay of 1e-3.

    >>> gdas(10)["temperature"].at(1.0)
    0.1
    """
    return {
        "sampling": "gumbel",
        "hard": True,
        "temperature": Temperature(10.0, 0.1, "linear"),
        "num_epochs": num_epochs,
        "arch_fraction": 0.5,
        "arch_optimizer": _gdas_adam,
    }


def fbnet(
    num_epochs: int = 80, warmup_epochs: int = 10, *, alpha: float = 0.2, beta: float = 0.6, floor: float = 0.05
) -> dict[str, Any]:
    """FBNet (Wu et al., arXiv 1812.03443): Gumbel softmax over all candidates, and a table of latencies.

    The loss of the alphas is CE alpha (ln E)^beta with the expected latency E, which is ``'mul#log'`` with the
    reference e: E has to be above 1 in its unit for every network (ms; or hand over a table in microseconds). The
    temperature is 5, times 0.956 after each search epoch, and not below ``floor``. 20 % of the data are for the alphas,
    whose optimizer is Adam with a learning rate of 0.01; they rest in the first 10 of 90 epochs. Other than in the
    paper, a step of the alphas follows each step of the weights instead of an epoch of them each epoch, and alphas have
    no weight decay. The latency itself: ``applied_hardware`` or ``cost`` of the trainer.

    >>> settings = fbnet(3)
    >>> [round(settings["temperature"].at(epoch / 2), 3) for epoch in range(3)]
    [5.0, 4.78, 4.57]
    """
    if num_epochs < 1:
        raise ConfigurationError(f"fbnet(num_epochs={num_epochs}): at least 1 is needed")
    return {
        "sampling": "gumbel",
        "hard": False,
        "temperature": Temperature(5.0, 5.0 * _FALL ** (num_epochs - 1), "exponential", floor),
        "num_epochs": num_epochs,
        "warmup_epochs": warmup_epochs,
        "arch_fraction": 0.2,
        "arch_learning_rate": 0.01,
        "grad_reg_loss_type": "mul#log",
        "grad_reg_loss_params": {"alpha": alpha, "beta": beta},
        "ref_latency": math.e,
    }


def _gdas_adam(alphas: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(alphas, lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3)
