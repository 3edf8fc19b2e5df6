"""What a training step adds to that of the plain network, each as one node of the autograd graph.

Written by hand because a small network's step is mostly overhead of single operators: masks, masked weights and costs
are some ten operators forward and backward each, whatever the number of layers. All three are once differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["MaskedWeights", "Masking"]


class Masking(NamedTuple):
    """How one weight is masked: its dimensions, and for each the first and last place among the gathered factors."""

    rank: int
    dims: tuple[int, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]

    def factors(self, gathered: Tensor, weight: Tensor) -> list[Tensor]:
        """One factor per masked dimension, ready to be broadcast."""
        found = []
        for dim, start, end in zip(self.dims, self.starts, self.ends, strict=True):
            shape = [1] * self.rank
            shape[dim] = end - start
            found.append(gathered[start:end].view(shape).to(weight.dtype))
        return found


class MaskedWeights(torch.autograd.Function):
    """W_l' = W_l prod_d m_ld for all layers l, where m_ld are pieces of ``gathered``.

    dL/dW_l = G_l prod_d m_ld, and dL/dm_ld = sum over the other dimensions of G_l W_l prod_{e != d} m_le, with
    G_l = dL/dW_l'.
    """

    @staticmethod
    def forward(ctx: Any, gathered: Tensor, maskings: Sequence[Masking], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.maskings = maskings
        ctx.save_for_backward(gathered, *weights)
        masked = []
        for masking, weight in zip(maskings, weights, strict=True):
            factors = masking.factors(gathered, weight)
            mask = factors[0] if len(factors) == 1 else _product(factors)
            masked.append(weight * mask)
        return tuple(masked)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        gathered, *weights = ctx.saved_tensors
        pieces: list[Tensor] = []
        of_weights: list[Tensor | None] = []
        for i, (masking, weight, gradient) in enumerate(zip(ctx.maskings, weights, gradients, strict=True)):
            if gradient is None:
                of_weights.append(None)
                pieces += [gathered.new_zeros(e - s) for s, e in zip(masking.starts, masking.ends, strict=True)]
                continue
            factors = masking.factors(gathered, weight)
            mask = factors[0] if len(factors) == 1 else _product(factors)
            of_weights.append(gradient * mask if ctx.needs_input_grad[2 + i] else None)
            if ctx.needs_input_grad[0]:
                pieces += _of_factors(gradient * weight, masking, factors, gathered.dtype)
        return torch.cat(pieces) if ctx.needs_input_grad[0] else None, None, *of_weights


def _product(factors: Sequence[Tensor]) -> Tensor:
    product = factors[0]
    for factor in factors[1:]:
        product = product * factor
    return product


def _of_factors(
    product: Tensor, masking: Masking, factors: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """The gradient of each factor, in the order of their places."""
    found = []
    for i, dim in enumerate(masking.dims):
        others = [factor for j, factor in enumerate(factors) if j != i]
        rest = product * _product(others) if others else product
        found.append(rest.sum([d for d in range(masking.rank) if d != dim]).to(dtype))
    return found
