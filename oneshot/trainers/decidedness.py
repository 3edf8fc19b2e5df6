"""Terms of a loss that push choices to one of their options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ..errors import ConfigurationError
from ..pit.selection import inverse_variation

__all__ = ["Decidedness", "mean_entropy_of", "total_inverse_variation"]


def total_inverse_variation(alphas: Sequence[Tensor]) -> Tensor:
    """sum over the choices of mean(p)^2 / (var(p) + 1e-3) with p = softmax(alpha), 0-dim: PLiNIO's total icv.

    A choice of n equally probable options has 1000 / n^2; a decided one, whose variance is (n - 1) / n^2, has
    1 / (n - 1 + n^2 / 1000).

    >>> total_inverse_variation([torch.zeros(4), torch.tensor([0.0, 1e4])])  # 62.5 + 0.25 / 0.251
    tensor(63.4960)
    """
    return torch.stack([inverse_variation(alpha.softmax(0)) for alpha in alphas]).sum()


def mean_entropy_of(alphas: Sequence[Tensor]) -> Tensor:
    """Mean over the choices of - sum_k p_k ln p_k with p = softmax(alpha), in nats, 0-dim.

    >>> mean_entropy_of([torch.zeros(4), torch.tensor([0.0, 1e4])])  # (ln 4 + 0) / 2
    tensor(0.6931)
    """
    rows = [alpha.log_softmax(0) for alpha in alphas]
    return torch.stack([-(row.exp() * row).sum() for row in rows]).mean()


@final
@dataclass(frozen=True)
class Decidedness:
    """``icv_strength`` times ``total_inverse_variation`` and ``entropy_strength`` times ``mean_entropy_of``."""

    icv_strength: float = 0.0
    entropy_strength: float = 0.0

    def __post_init__(self) -> None:
        for name in ("icv_strength", "entropy_strength"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or value < 0:
                raise ConfigurationError(f"{name}={value!r}: a finite number of at least 0 is needed")

    def terms(self, alphas: Sequence[Tensor]) -> dict[str, Tensor]:
        """What is to be added to the loss, by name; only what has a strength."""
        found = {}
        if self.icv_strength and alphas:
            found["icv_penalty"] = self.icv_strength * total_inverse_variation(alphas)
        if self.entropy_strength and alphas:
            found["entropy_penalty"] = self.entropy_strength * mean_entropy_of(alphas)
        return found
