"""What a training step adds to that of the plain network: masked weights, as one node of the autograd graph.

Written by hand because a small network's step is mostly overhead of single operators: here they are a few for the whole
network, and one or two for each layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..graph.dimensions import Dimension

__all__ = ["WeightMasks"]


class WeightMasks(nn.Module):
    """The masks of all weights of a network, from its flat vector.

    The mask of a weight has one element for every combination of indices of its masked dimensions, the product of their
    elements in the vector, and size 1 along the others. All masks together are one long vector.

    ``shapes``: weight -> the shape of its mask. ``sums``: weight -> the dimensions along which its mask is the same.
    """

    factors: Tensor

    def __init__(
        self, places: Mapping[Dimension, Tensor], columns: Sequence[Dimension], ranks: Mapping[str, int], one: int
    ) -> None:
        super().__init__()
        of_weight: dict[str, list[Dimension]] = {}
        for dimension in columns:
            of_weight.setdefault(dimension.name, []).append(dimension)
        self.names = list(of_weight)
        most = max(len(dimensions) for dimensions in of_weight.values())
        self.shapes: list[list[int]] = []
        self.sums: list[list[int]] = []
        rows: list[Tensor] = []
        for name, dimensions in of_weight.items():
            sizes = {d.dim: len(places[d]) for d in dimensions}
            shape = [sizes.get(d, 1) for d in range(ranks[name])]
            factors = []
            for dimension in dimensions:
                along = [-1 if d == dimension.dim else 1 for d in range(ranks[name])]
                factors.append(places[dimension].view(along).expand(shape).flatten())
            factors += [torch.full_like(factors[0], one)] * (most - len(factors))
            rows.append(torch.stack(factors))
            self.shapes.append(shape)
            self.sums.append([d for d in range(ranks[name]) if d not in sizes])
        self.lengths = [row.shape[1] for row in rows]
        self.register_buffer("factors", torch.cat(rows, 1), persistent=False)

    def forward(self, hard: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Each weight times its mask, in the order of ``names``; ``hard``: the flat vector."""
        masked: tuple[Tensor, ...] = _MaskedWeights.apply(hard, self, *weights)
        return masked

    def pieces(self, vector: Tensor) -> list[Tensor]:
        """The long vector, as one mask for each weight."""
        return [piece.view(shape) for piece, shape in zip(vector.split(self.lengths), self.shapes, strict=True)]


class _MaskedWeights(torch.autograd.Function):
    """W_l' = W_l M_l, and M the product of a few elements of the flat vector m: M_e = m_a(e) m_b(e) ...

    dL/dW_l = G_l M_l with G_l = dL/dW_l'. dL/dM_e is the sum of G_l W_l over what shares e, and dL/dm collects
    dL/dM_e m_b(e) ... at a(e), and so on.
    """

    @staticmethod
    def forward(ctx: Any, hard: Tensor, masks: WeightMasks, *weights: Tensor) -> tuple[Tensor, ...]:
        factors = hard.index_select(0, masks.factors.flatten()).view(masks.factors.shape).unbind()
        vector = factors[0]
        for factor in factors[1:]:
            vector = vector * factor
        ctx.masks, ctx.size = masks, len(hard)
        # The weights are parameters, which stay anyway: kept by hand, and watched by hand, they are not saved twice.
        ctx.factors, ctx.vector, ctx.weights = factors, vector, weights
        ctx.versions = None if torch.compiler.is_compiling() else [weight._version for weight in weights]
        return tuple(w * m for w, m in zip(weights, _of_type(masks.pieces(vector), weights), strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        masks: WeightMasks = ctx.masks
        factors, vector, weights = ctx.factors, ctx.vector, ctx.weights
        if ctx.versions is not None and ctx.versions != [weight._version for weight in weights]:
            raise RuntimeError(
                "weights of a PIT network were changed in place between its forward and its backward pass"
            )
        given = [torch.zeros_like(w) if g is None else g for g, w in zip(gradients, weights, strict=True)]
        of_weights: list[Tensor | None] = [None] * len(weights)
        if any(ctx.needs_input_grad[2:]):
            pieces = _of_type(masks.pieces(vector), weights)
            of_weights = [
                None if g is None or not needed else g * m
                for g, m, needed in zip(gradients, pieces, ctx.needs_input_grad[2:], strict=True)
            ]
        if not ctx.needs_input_grad[0]:
            return None, None, *of_weights
        products = [(g * w, dims) for g, w, dims in zip(given, weights, masks.sums, strict=True)]
        sums = [(product.sum(dims) if dims else product).flatten() for product, dims in products]
        of_vector = torch.cat(sums).to(vector.dtype)
        of_hard = vector.new_zeros(ctx.size)
        for i, places in enumerate(masks.factors):
            others = [factors[j] for j in range(len(factors)) if j != i]
            of_place = of_vector
            for other in others:
                of_place = of_place * other
            of_hard.index_add_(0, places, of_place)
        return of_hard, None, *of_weights


def _of_type(masks: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    return [m if m.dtype == w.dtype else m.to(w.dtype) for m, w in zip(masks, weights, strict=True)]
