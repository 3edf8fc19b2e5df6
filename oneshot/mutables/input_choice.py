"""InputChoice: some of several tensors, reduced to one output."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import reduce
from itertools import combinations
from typing import Any, Literal, final

import torch
from torch import Tensor

from ..errors import ArchMismatchError, ConfigurationError
from .base import Mutable
from .gating import combine

__all__ = ["InputChoice", "reduce_inputs"]

Reduction = Literal["sum", "mean", "concat", "none"]
_REDUCTIONS = ("sum", "mean", "concat", "none")
_MOST_SUBSETS = 1023  # every non-empty subset of 10 inputs


@final
class InputChoice(Mutable):
    """``n_chosen`` of several inputs, decided by search.

    The options are the subsets: C(n, k) of them for ``n_chosen=k``, all 2^n - 1 non-empty ones for
    ``n_chosen=None``; alpha has one logit per subset, so that any sampler, an exact expectation and an exact
    argmax work as they do for a LayerChoice. The output of an option is the reduction of its inputs in index
    order: ``'sum'``, ``'mean'``, ``'concat'`` (along dim 1) or ``'none'`` (a list).

    Called with a list of tensors; or, if ``choose_from`` names the inputs, with a mapping of these names.
    In an arch the decision is the list of chosen indices.

    >>> choice = InputChoice(n_candidates=3, n_chosen=2)
    >>> choice.options
    ((0, 1), (0, 2), (1, 2))
    >>> choice([torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([6.0])]).item()  # (3 + 7 + 8) / 3
    6.0
    """

    def __init__(
        self,
        n_candidates: int | None = None,
        choose_from: Sequence[str] | None = None,
        n_chosen: int | None = 1,
        reduction: Reduction = "sum",
        label: str | None = None,
    ) -> None:
        names = _names(n_candidates, choose_from)
        n = _count(n_candidates, "n_candidates") if names is None else len(names)
        super().__init__(_subsets(n, n_chosen, reduction), label)
        self.n_candidates, self.names, self.n_chosen = n, names, n_chosen
        self.reduction: Reduction = reduction
        self._decide()

    def forward(self, inputs: Sequence[Tensor] | Mapping[str, Tensor]) -> Any:
        if self.decided is not None:
            return self.chosen(self.decided, inputs)
        return combine(self.gate(), self._chosen, self._ordered(inputs), self._subset)

    def chosen(self, k: int, inputs: Sequence[Tensor] | Mapping[str, Tensor]) -> Any:
        """The output if option ``k`` is decided for."""
        return self._chosen(k, self._ordered(inputs))

    def _chosen(self, k: int, tensors: Sequence[Tensor]) -> Any:
        return reduce_inputs([tensors[i] for i in self.options[k]], self.reduction)

    def _ordered(self, inputs: Sequence[Tensor] | Mapping[str, Tensor]) -> list[Tensor]:
        if self.names is not None:
            if not isinstance(inputs, Mapping) or set(inputs) != set(self.names):
                got = list(inputs) if isinstance(inputs, Mapping) else f"a {type(inputs).__name__}"
                raise ConfigurationError(
                    f"{self.describe()}: call it with a mapping of exactly {list(self.names)}, got {got}"
                )
            return self._tensors([inputs[name] for name in self.names])
        if not isinstance(inputs, list | tuple) or len(inputs) != self.n_candidates:
            found = len(inputs) if isinstance(inputs, list | tuple) else f"a {type(inputs).__name__}"
            raise ConfigurationError(
                f"{self.describe()}: call it with a list of {self.n_candidates} tensors, got {found}"
            )
        return self._tensors(inputs)

    def _tensors(self, inputs: Sequence[Any]) -> list[Tensor]:
        for i, tensor in enumerate(inputs):
            if not isinstance(tensor, Tensor):
                raise ConfigurationError(f"{self.describe()}: input {i} is a {type(tensor).__name__}, not a tensor")
        return list(inputs)

    def index_of(self, decision: Any, where: str) -> int:
        chosen = decision if isinstance(decision, (list, tuple)) else [decision]
        by_name = {name: i for i, name in enumerate(self.names or ())}
        indices = tuple(by_name.get(item, item) if isinstance(item, str) else item for item in chosen)
        whole = all(isinstance(i, int) and not isinstance(i, bool) for i in indices)
        if whole and tuple(sorted(indices)) in self.options:
            return self.options.index(tuple(sorted(indices)))
        count = "one or more" if self.n_chosen is None else self.n_chosen
        raise ArchMismatchError(
            f"{where}: the arch says {decision!r}; needed is a list of {count} different indices from 0 to "
            f"{self.n_candidates - 1}. Build the model with the arguments it was searched with"
        )

    def describe(self) -> str:
        return f"InputChoice(label={self.label!r}) of {self.n_candidates} inputs, n_chosen={self.n_chosen}"

    def signature(self) -> tuple[Hashable, ...]:
        return ("InputChoice", self.n_candidates, self.names, self.n_chosen, self.reduction)

    def _subset(self, k: int) -> str:
        return f"inputs {list(self.options[k])} of {self.describe()}"


def reduce_inputs(tensors: list[Tensor], reduction: Reduction) -> Any:
    """The reduction of the chosen inputs.

    >>> reduce_inputs([torch.tensor([1.0]), torch.tensor([3.0])], "mean")
    tensor([2.])
    """
    if reduction == "none":
        return tensors
    if len(tensors) == 1:
        return tensors[0]
    if reduction == "concat":
        return torch.cat(tensors, dim=1)
    different = {tuple(t.shape) for t in tensors}
    if len(different) > 1:
        raise ConfigurationError(
            f"InputChoice(reduction={reduction!r}): inputs of different shapes {sorted(different)} cannot be "
            "added; bring them to one shape first, or use reduction='concat'"
        )
    total = reduce(torch.add, tensors)
    return total / len(tensors) if reduction == "mean" else total


def _names(n_candidates: int | None, choose_from: Sequence[str] | None) -> tuple[str, ...] | None:
    if (n_candidates is None) == (choose_from is None):
        raise ConfigurationError(
            f"InputChoice(n_candidates={n_candidates!r}, choose_from={choose_from!r}): give exactly one of them"
        )
    if choose_from is None:
        return None
    names = () if isinstance(choose_from, str) else tuple(choose_from)
    if not names or len(set(names)) != len(names) or not all(isinstance(name, str) for name in names):
        raise ConfigurationError(f"InputChoice(choose_from={choose_from!r}): a list of different names is needed")
    return names


def _count(number: Any, name: str) -> int:
    if type(number) is not int or number < 1:
        raise ConfigurationError(f"InputChoice({name}={number!r}): an integer of at least 1 is needed")
    return number


def _subsets(n: int, n_chosen: int | None, reduction: str) -> list[tuple[int, ...]]:
    if reduction not in _REDUCTIONS:
        raise ConfigurationError(f"InputChoice(reduction={reduction!r}): allowed are {list(_REDUCTIONS)}")
    if n_chosen is not None and _count(n_chosen, "n_chosen") > n:
        raise ConfigurationError(f"InputChoice(n_chosen={n_chosen}) of {n} inputs: 1 to {n} or None is needed")
    if n_chosen is None and reduction in ("concat", "none") and n > 1:
        raise ConfigurationError(
            f"InputChoice(n_chosen=None, reduction={reduction!r}): subsets of different size give outputs of "
            "different shape; use reduction='sum' or 'mean', or a number for n_chosen"
        )
    sizes = range(1, n + 1) if n_chosen is None else (n_chosen,)
    subsets = [subset for size in sizes for subset in _bounded(n, size)]
    if len(subsets) > _MOST_SUBSETS:
        raise _too_many(n, n_chosen)
    return subsets


def _bounded(n: int, size: int) -> list[tuple[int, ...]]:
    subsets = []
    for subset in combinations(range(n), size):
        subsets.append(subset)
        if len(subsets) > _MOST_SUBSETS:
            raise _too_many(n, size)
    return subsets


def _too_many(n: int, n_chosen: int | None) -> ConfigurationError:
    return ConfigurationError(
        f"InputChoice(n_chosen={n_chosen}) of {n} inputs has more than {_MOST_SUBSETS} subsets, one option "
        "each; split it into several InputChoices"
    )
