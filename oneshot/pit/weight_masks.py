"""What a training step adds to that of the plain network: masked weights, as one node of the autograd graph.

In a network with choices it is one node for what always runs, and one for every candidate that runs: the weights of the
others are not touched. Written by hand because a small network's step is mostly overhead of single operators: here they
are a few for the whole network, and one or two for each layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..graph.dimensions import Dimension
from ..graph.masked_call import names_of_parameters
from ..mutables import LayerChoice, Mutable, Repeat

__all__ = ["MaskedWeights"]

Owner: TypeAlias = tuple[nn.Module, str]
"""A module, and the name of a parameter or buffer in it."""


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


class Scope(nn.Module):
    """What runs together: the network outside of choices, or one candidate of a choice, but for choices inside of it.

    ``owners``: of each masked weight the modules that hold it, with its name in them. ``mutables``: the choices inside.
    """

    def __init__(
        self, masks: WeightMasks | None, owners: Sequence[Sequence[Owner]], mutables: Sequence[Mutable]
    ) -> None:
        super().__init__()
        self.masks = masks
        # In tuples: these modules are the network's, and not parts of this one.
        self.owners, self.mutables = tuple(owners), tuple(mutables)

    def masked(self, hard: Tensor) -> Sequence[Tensor]:
        if self.masks is None:
            return ()
        return self.masks(hard, [getattr(module, leaf) for (module, leaf), *_ in self.owners])


class MaskedWeights(nn.Module):
    """The masked weights of ``network``, put in their places while it runs.

    ``places``: of each masked dimension the elements of the flat vector, ``columns``: those to mask, ``one``: the
    element that is always 1.
    """

    def __init__(
        self, network: nn.Module, places: Mapping[Dimension, Tensor], columns: Sequence[Dimension], one: int
    ) -> None:
        super().__init__()
        names = names_of_parameters(network)
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        self.of_module: dict[nn.Module, Scope] = {}
        ranks = {name: tensor.dim() for name, tensor in tensors.items()}
        # Each place once: a module may stand at several paths.
        owned: dict[str, list[Owner]] = {}
        for name in {dimension.name: None for dimension in columns}:
            split = (alias.rpartition(".") for alias in names[name])
            owned[name] = list(dict.fromkeys((network.get_submodule(path), leaf) for path, _, leaf in split))
        for root, (modules, mutables) in _parts(network).items():
            inside = {name: [owner for owner in of_one if owner[0] in modules] for name, of_one in owned.items()}
            own = [dimension for dimension in columns if inside[dimension.name]]
            masks = WeightMasks(places, own, ranks, one) if own else None
            owners = [inside[name] for name in masks.names] if masks is not None else []
            self.of_module[root] = Scope(masks, owners, mutables)
        for root in [root for root, scope in self.of_module.items() if not self._has_masks(scope)]:
            del self.of_module[root]
        self.scopes = nn.ModuleList(self.of_module.values())
        self.root = (network,)  # in a tuple: the network is no part of this one
        self.entered: set[nn.Module] = set()
        self.in_place: set[tuple[int, str]] = set()

    def _has_masks(self, scope: Scope) -> bool:
        """In itself, or in what its choices call."""
        inside = [child for mutable in scope.mutables for child in _called(mutable)]
        return scope.masks is not None or any(self._has_masks(self.of_module[m]) for m in inside if m in self.of_module)

    def ran(self) -> set[str]:
        """The masked weights of what ran in the last forward with gradient."""
        scopes = [self.of_module[module] for module in self.entered]
        return {name for scope in scopes if scope.masks is not None for name in scope.masks.names}

    @contextmanager
    def entering(self, module: nn.Module, hard: Tensor) -> Iterator[None]:
        """Inside, the weights of one scope are masked by the flat vector; so are those of choices in it as they run."""
        scope = self.of_module.get(module)
        if scope is None:
            yield
            return
        is_root = module is self.root[0]
        if is_root and self.in_place:
            raise RuntimeError(
                "a PIT network is called while another call of it runs, in another thread or from inside"
            )
        if torch.is_grad_enabled():  # else, in a backward pass, a candidate runs that has no part in the output
            self.entered = {module} if is_root else {*self.entered, module}
        around = [mutable.entering for mutable in scope.mutables]
        try:
            for mutable in scope.mutables:
                mutable.entering = partial(self.entering, hard=hard)
            with self._placed(scope, hard):
                yield
        finally:
            for mutable, before in zip(scope.mutables, around, strict=True):
                mutable.entering = before

    @contextmanager
    def _placed(self, scope: Scope, hard: Tensor) -> Iterator[None]:
        """Masked tensors in the place of parameters: ``torch.func.functional_call``, without looking the names up."""
        before: list[tuple[dict[str, Any], str, Any]] = []
        own: list[tuple[int, str]] = []
        try:
            for places, tensor in zip(scope.owners, scope.masked(hard), strict=True):
                for owner, leaf in places:
                    held, key = _held(owner, leaf), (id(owner), leaf)
                    if key in self.in_place:  # what is called here stands around it too, with the same mask
                        continue
                    before.append((held, leaf, held[leaf]))
                    own.append(key)
                    held[leaf] = tensor
            self.in_place.update(own)
            yield
        finally:
            for held, leaf, tensor in before:
                held[leaf] = tensor
            self.in_place.difference_update(own)


def _parts(network: nn.Module) -> dict[nn.Module, tuple[set[nn.Module], list[Mutable]]]:
    """The network and all that undecided mutables in it call, each with the modules and mutables of its own."""
    found: dict[nn.Module, tuple[set[nn.Module], list[Mutable]]] = {}

    def visit(module: nn.Module, root: nn.Module) -> None:
        modules, mutables = found[root]
        if module in modules:
            return
        modules.add(module)
        if not isinstance(module, LayerChoice | Repeat) or module.decided is not None:
            for child in module.children():
                visit(child, root)
            return
        mutables.append(module)
        for child in _called(module):
            if child not in found:
                found[child] = (set(), [])
                visit(child, child)

    found[network] = (set(), [])
    visit(network, network)
    return found


def _called(mutable: Mutable) -> list[nn.Module]:
    """The modules that a choice calls."""
    if isinstance(mutable, Repeat):
        return list(mutable.blocks)
    return list(mutable) if isinstance(mutable, LayerChoice) else []


def _held(owner: nn.Module, leaf: str) -> dict[str, Any]:
    """Where a module keeps a tensor: in fact in one of two mappings that forward looks at."""
    return owner._parameters if leaf in owner._parameters else owner._buffers


class _MaskedWeights(torch.autograd.Function):
    """W_l' = W_l M_l, and M the product of a few elements of the flat vector m: M_e = m_a(e) m_b(e) ...

    dL/dW_l = G_l M_l with G_l = dL/dW_l'. dL/dM_e is the sum of G_l W_l over what shares e, and dL/dm collects
    dL/dM_e m_b(e) ... at a(e), and so on.
    """

    @staticmethod
    def forward(ctx: Any, hard: Tensor, masks: WeightMasks, *weights: Tensor) -> tuple[Tensor, ...]:
        factors = hard.index_select(0, masks.factors.view(-1)).view(masks.factors.shape).unbind()
        vector = factors[0]
        for factor in factors[1:]:
            vector = vector * factor
        pieces = masks.pieces(vector)
        ctx.masks, ctx.size, ctx.pieces = masks, len(hard), pieces
        # The weights are parameters, which stay anyway: kept by hand, and watched by hand, they are not saved twice.
        ctx.factors, ctx.vector, ctx.weights = factors, vector, weights
        ctx.versions = None if torch.compiler.is_compiling() else [weight._version for weight in weights]
        return tuple(torch._foreach_mul(weights, _of_type(pieces, weights)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        masks: WeightMasks = ctx.masks
        factors, vector, weights = ctx.factors, ctx.vector, ctx.weights
        if ctx.versions is not None and ctx.versions != [weight._version for weight in weights]:
            raise RuntimeError(
                "weights of a PIT network were changed in place between its forward and its backward pass"
            )
        of_weights: list[Tensor | None] = [None] * len(weights)
        due = [(i, g) for i, g in enumerate(gradients) if g is not None and ctx.needs_input_grad[2 + i]]
        if due:
            pieces = _of_type([ctx.pieces[i] for i, _ in due], [weights[i] for i, _ in due])
            for (i, _), product in zip(due, torch._foreach_mul([g for _, g in due], pieces), strict=True):
                of_weights[i] = product
        if not ctx.needs_input_grad[0]:
            return None, None, *of_weights
        given = [torch.zeros_like(w) if g is None else g for g, w in zip(gradients, weights, strict=True)]
        products = torch._foreach_mul(given, weights)
        sums = [
            (product.sum(dims) if dims else product).flatten()
            for product, dims in zip(products, masks.sums, strict=True)
        ]
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
