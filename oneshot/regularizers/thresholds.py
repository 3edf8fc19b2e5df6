"""Hard thresholds: small groups are set to zero at once, and zeros may be held there while the rest goes on learning.

The level is a number of its own; the strength of a penalty has another unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..errors import ConfigurationError, InputTypeError
from .after_step import held
from .base import check_strength
from .groups import Family, group_largest, group_norms, group_sizes, group_sums, spread
from .layer_groups import Groups, families
from .patterns import as_patterns, matching, spellings, weights_of

__all__ = ["HeldZeros", "Zeroed", "hold_zeros", "threshold_"]

Criterion = Literal["Max", "Mean_Abs", "L1", "L2"]


@final
@dataclass(frozen=True)
class Zeroed:
    """Of one family of groups: which are zero after a threshold, by number, of how many."""

    family: str
    zero: tuple[int, ...]
    n: int


def threshold_(
    model: nn.Module,
    groups: Groups,
    level: float,
    criterion: Criterion = "Max",
    patterns: str | Iterable[str] | None = None,
) -> list[Zeroed]:
    """Set to zero, in place, each group whose norm is not greater than ``level``; what is zero then, by family.

    ``groups``, ``patterns``: see ``families``. ``criterion``: max |w_i|, mean |w_i|, sum |w_i| or the l2 norm of the
    group; one with NaN stays. The weights are free to grow again; see ``hold_zeros``.

    >>> net = nn.Linear(3, 4, bias=False)
    >>> _ = net.weight.data.copy_(torch.arange(1.0, 13.0).view(4, 3))
    >>> threshold_(net, "rows", 7.0)
    [Zeroed(family='weight: rows', zero=(0, 1), n=4)]
    """
    level = check_strength("threshold_(level)", level)
    if criterion not in _CRITERIA:
        raise ConfigurationError(f"threshold_(criterion={criterion!r}): allowed are {', '.join(_CRITERIA)}")
    weights: Mapping[str, Tensor] = weights_of(model)
    found = families(model, groups, patterns)
    with torch.no_grad():
        zero = [_CRITERIA[criterion](family, weights) <= level for family in found]  # all seen before any is changed
        for family, gone in zip(found, zero, strict=True):
            for name, index in family.index.items():
                weight = weights[name]
                weight.masked_fill_(spread(gone.to(weight.device), index.to(weight.device), 0.0).bool(), 0.0)
    return [
        Zeroed(family.name, tuple(gone.nonzero().flatten().tolist()), family.n)
        for family, gone in zip(found, zero, strict=True)
    ]


@final
class HeldZeros:
    """Zeros that stay: after each step of the optimizer they are set back, until ``release()``.

    A context manager, too: released at its end.
    """

    def __init__(self, kept: Mapping[str, tuple[nn.Parameter, Tensor]], optimizer: Optimizer) -> None:
        self._kept = dict(kept)
        self._handle: RemovableHandle = optimizer.register_step_post_hook(self._set_back)

    @property
    def n(self) -> dict[str, int]:
        """Parameter name -> how many of its elements are held."""
        return {name: int((~alive).sum()) for name, (_, alive) in self._kept.items()}

    def release(self) -> None:
        """The weights may grow again from now on."""
        self._handle.remove()

    def __enter__(self) -> HeldZeros:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @torch.no_grad()
    def _set_back(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for weight, alive in self._kept.values():
            weight.masked_fill_(~alive.to(weight.device), 0.0)


def hold_zeros(model: nn.Module, optimizer: Optimizer, patterns: str | Iterable[str] | None = None) -> HeldZeros:
    """Keep the weights that are exactly zero now at zero after every step of ``optimizer``, until released.

    Zeroing once is not enough: momentum moves a weight whose gradient is zero. Released, the weights learn again from
    zero, which is dense-sparse-dense training (Han et al. 2017): train, ``threshold_``, hold and train, release and
    train. ``patterns``: of parameter or module names; all weights otherwise. ConfigurationError if nothing is zero, or
    the optimizer holds none of them.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[0.0, 1.0]]))
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    >>> with hold_zeros(net, optimizer):
    ...     net(torch.ones(1, 2)).sum().backward()
    ...     _ = optimizer.step()
    >>> [round(w, 3) for w in net.weight.flatten().tolist()]
    [0.0, 0.9]
    """
    if not isinstance(optimizer, Optimizer):
        raise InputTypeError(f"hold_zeros(model, {type(optimizer).__name__}): a torch.optim.Optimizer is needed")
    weights, names = weights_of(model), spellings(model)
    chosen = as_patterns("hold_zeros", patterns)
    some = matching("hold_zeros", chosen, {name: names[name] for name in weights})
    alive = {name: weights[name].detach() != 0 for name in some}
    kept = {name: (weights[name], found) for name, found in alive.items() if not bool(found.all())}
    if not kept:
        raise ConfigurationError("hold_zeros: no chosen weight is zero; a threshold or a regularizer comes first")
    if not held(optimizer, {name: weight for name, (weight, _) in kept.items()}):
        raise ConfigurationError(f"hold_zeros: the {type(optimizer).__name__} holds none of {', '.join(kept)}")
    return HeldZeros(kept, optimizer)


def _l1(family: Family, weights: Mapping[str, Tensor]) -> Tensor:
    return group_sums(family, {name: weights[name].abs() for name in family.index})


def _mean(family: Family, weights: Mapping[str, Tensor]) -> Tensor:
    found = _l1(family, weights)
    return found / group_sizes(family, weights).to(found.device)


_CRITERIA: dict[str, Callable[[Family, Mapping[str, Tensor]], Tensor]] = {
    "Max": group_largest,
    "Mean_Abs": _mean,
    "L1": _l1,
    "L2": group_norms,
}
