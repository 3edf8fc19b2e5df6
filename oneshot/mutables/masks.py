"""Masks: mutables that say of every unit of a dimension whether it stays (PIT, arXiv 2203.14768).

A mask has one number per unit, alpha in [0, 1], 1 at the start. A unit is kept while |alpha| > 0.5; the threshold hands
its gradient on as if it were the identity (straight through). The relaxed size of a mask is the sum of |alpha|.

Masks are computed many at a time, over one flat vector of all alphas: the functions here take segments of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from .base import AlphaModule

__all__ = [
    "THRESHOLD",
    "ChannelMask",
    "DilationMask",
    "KernelMask",
    "Mask",
    "dilation_count",
    "dilation_scores",
    "kept_units",
    "kernel_scores",
    "magnitude",
    "octaves",
    "straight_through",
]

THRESHOLD = 0.5


def straight_through(x: Tensor) -> Tensor:
    """1 where x > 0.5, else 0; the gradient is that of the identity.

    >>> x = torch.tensor([0.5, 0.6], requires_grad=True)
    >>> straight_through(x).sum().backward()
    >>> straight_through(x).tolist(), x.grad.tolist()
    ([0.0, 1.0], [1.0, 1.0])
    """
    result: Tensor = x + ((x > THRESHOLD).to(x.dtype) - x).detach()
    return result


def magnitude(alpha: Tensor) -> Tensor:
    """|alpha|, with slope 1 at 0, where the slope 0 of torch.abs would keep a mask from ever coming back."""
    return torch.where(alpha < 0, -alpha, alpha)


@torch.no_grad()
def kept_units(theta: Tensor, segments: Tensor, granularity: Tensor, least: Tensor) -> Tensor:
    """Which units stay, bool of shape (n,), of several masks in one vector ``theta`` of shape (n,).

    ``segments``: (n,), the mask of each unit, ascending from 0. ``granularity``, ``least``: (masks,). In each mask the
    units above the threshold stay, and so many of the next largest that there are ``least`` >= 1, and a multiple of the
    granularity (or all there are). Of equal ones the last goes first.

    >>> theta = torch.tensor([0.9, 0.2, 0.3, 0.4, 0.4])
    >>> kept_units(theta, torch.tensor([0, 0, 0, 1, 1]), torch.tensor([2, 1]), torch.tensor([1, 1])).tolist()
    [True, False, True, False, True]
    """
    masks = len(granularity)
    sizes = torch.zeros(masks, dtype=torch.int64, device=theta.device).index_add_(
        0, segments, torch.ones_like(segments)
    )
    above = torch.zeros_like(sizes).index_add_(0, segments, (theta > THRESHOLD).to(torch.int64))
    wanted = (torch.maximum(above, least) + granularity - 1) // granularity * granularity
    # By mask, then from the largest, of equal ones from the last: two stable sorts of the reversed vector.
    backwards = torch.arange(len(theta) - 1, -1, -1, device=theta.device)
    order = backwards[torch.argsort(theta[backwards], descending=True, stable=True)]
    order = order[torch.argsort(segments[order], stable=True)]
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(theta), device=theta.device) - starts[segments[order]]
    return rank < wanted[segments]


def octaves(taps: int) -> int:
    """How many dilations a kernel can have: G = max(ceil(log2 K), 1).

    >>> [octaves(k) for k in (1, 2, 3, 4, 5, 9)]
    [1, 1, 2, 2, 3, 4]
    """
    return max((taps - 1).bit_length(), 1)


def kernel_scores(beta: Tensor) -> Tensor:
    """theta_j = sum_{i <= j} |beta_i|, over the last dimension, from the oldest tap to the newest, whose |beta| is 1.

    Non-decreasing, so that the oldest taps go first (PIT, section III-B).

    >>> kernel_scores(torch.tensor([0.25, 0.4, 0.4]))
    tensor([0.2500, 0.6500, 1.6500])
    """
    size = magnitude(beta)
    newest = torch.ones_like(size[..., -1:])
    return torch.cat([size[..., :-1], newest], -1).cumsum(-1)


def dilation_count(taps: int, device: torch.device | None = None) -> Tensor:
    """n of shape (G, K): whether step 2^p reaches the tap that lies K - 1 - j before the newest one.

    >>> dilation_count(5).sum(0).tolist()  # at distance 4, 3, 2, 1, 0 from the newest tap
    [3.0, 1.0, 2.0, 1.0, 3.0]
    """
    distance = torch.arange(taps - 1, -1, -1, device=device)
    steps = 2 ** torch.arange(octaves(taps), device=device)
    return (distance % steps[:, None] == 0).to(torch.get_default_dtype())


def dilation_scores(gamma: Tensor, taps: int) -> Tensor:
    """theta_j = sum of |gamma_p| over the p whose 2^p divides K - 1 - j; the last |gamma| is 1. Shape (K,).

    >>> dilation_scores(torch.tensor([0.2, 0.5]), 3)
    tensor([1.2000, 0.2000, 1.2000])
    """
    size = magnitude(gamma)
    full = torch.cat([size[:-1], torch.ones_like(size[-1:])])
    return full @ dilation_count(taps, gamma.device).to(full.dtype)


class Mask(AlphaModule, ABC):
    """A mutable with one alpha per unit. In an architecture its label is its place: that of the layer it is of.

    ``alpha``: shape (n,), in at least fp32 whatever the network is cast to. One object used twice is one decision.
    ``made_with``: the n that it was made with; a search that gets smaller takes units away.
    """

    alpha: nn.Parameter

    def __init__(self, n: int) -> None:
        super().__init__()
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ConfigurationError(f"{type(self).__name__}({n!r}): a number of units of at least 1 is needed")
        precision = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.alpha = nn.Parameter(torch.ones(n, dtype=precision))
        self.made_with = n

    @abstractmethod
    def decision(self) -> Any:
        """What is kept now, JSON-ready."""

    @abstractmethod
    def everything(self) -> Any:
        """The decision that keeps everything."""

    @abstractmethod
    def decide(self, decision: Any) -> None:
        """Set alpha to 1 for what a decision keeps and 0 for the rest; ConfigurationError if there is no such one."""

    def signature(self) -> tuple[Hashable, ...]:
        """What can be decided, JSON-ready."""
        return type(self).__name__, self.made_with

    @torch.no_grad()
    def clip_(self) -> None:
        """Back into [0, 1], where the straight-through gradient means what it says; after every optimizer step."""
        self.alpha.clamp_(0, 1)


@final
class ChannelMask(Mask):
    """Which of ``units`` channels, features or heads stay. A call multiplies dimension ``dim`` of a tensor by 0 or 1.

    ``granularity``: their number is a multiple of it, or all. At least ``least`` stay: the largest |alpha|, and of
    equal ones the last. ``left``: the units that alpha is of; decisions keep the numbers that units had at first.

    >>> mask = ChannelMask(4)
    >>> mask.keep([0, 3])
    >>> mask(torch.ones(1, 4)).tolist(), mask.decision()
    ([[1.0, 0.0, 0.0, 1.0]], [0, 3])
    """

    def __init__(self, units: int, *, granularity: int = 1, least: int = 1) -> None:
        super().__init__(units)
        if not isinstance(least, int) or isinstance(least, bool) or not 1 <= least <= units:
            raise ConfigurationError(f"ChannelMask(least={least!r}): an integer from 1 to {units} is needed")
        if not isinstance(granularity, int) or isinstance(granularity, bool) or granularity < 1:
            raise ConfigurationError(f"ChannelMask(granularity={granularity!r}): an integer of at least 1 is needed")
        self.granularity, self.least = granularity, least
        self.left: tuple[int, ...] = tuple(range(units))

    def forward(self, x: Tensor, dim: int = 1) -> Tensor:
        if x.shape[dim] != len(self.alpha):
            raise ConfigurationError(
                f"ChannelMask of {len(self.alpha)} units on dimension {dim} of a tensor of shape {tuple(x.shape)}, "
                f"which has {x.shape[dim]} there"
            )
        shape = [-1 if d == dim % x.dim() else 1 for d in range(x.dim())]
        return x * self.hard().to(x.dtype).reshape(shape)

    def soft(self) -> Tensor:
        """|alpha|, shape (units,); its sum is the relaxed number of channels."""
        return magnitude(self.alpha)

    def hard(self) -> Tensor:
        """1 for units that stay, else 0; the gradient is handed straight through to |alpha|. Shape (units,)."""
        theta = self.soft()
        segments = torch.zeros(len(theta), dtype=torch.int64, device=theta.device)
        granularity, least = torch.tensor([[self.granularity], [self.least]], device=theta.device)
        kept = kept_units(theta, segments, granularity, least)
        return theta + (kept.to(theta.dtype) - theta).detach()

    def decision(self) -> list[int]:
        return [self.left[i] for i in self.hard().detach().nonzero().flatten().tolist()]

    def everything(self) -> list[int]:
        return list(self.left)

    def decide(self, decision: Any) -> None:
        self.keep(decision)

    @torch.no_grad()
    def keep(self, kept: Sequence[int]) -> None:
        """Keep these units and no others: their alpha becomes 1, that of the others 0."""
        n = self.made_with
        kept = kept.tolist() if isinstance(kept, Tensor) else kept
        kept = list(kept) if isinstance(kept, Sequence) and not isinstance(kept, str) else [kept]
        wrong = [k for k in kept if not isinstance(k, int) or isinstance(k, bool) or not 0 <= k < n]
        if wrong or not kept or len(set(kept)) != len(kept):
            raise ConfigurationError(
                f"ChannelMask: units {kept} cannot be kept; needed are different integers from 0 to "
                f"{n - 1}, at least one"
            )
        if len(kept) < self.least:
            raise ConfigurationError(
                f"ChannelMask: {len(kept)} units; with less than {self.least} the network does not run"
            )
        if len(kept) % self.granularity and len(kept) != n:
            raise ConfigurationError(
                f"ChannelMask: {len(kept)} units is no multiple of {self.granularity}, nor all {n}"
            )
        place = {unit: i for i, unit in enumerate(self.left)}
        gone = sorted(set(kept) - set(place))
        if gone:
            raise ConfigurationError(
                f"ChannelMask: units {gone} have been removed in the search, of {n} there are {len(place)} left. Take "
                "a network of the full size for this architecture"
            )
        places = torch.tensor([place[unit] for unit in kept], device=self.alpha.device)
        self.alpha.copy_(torch.zeros_like(self.alpha).index_fill_(0, places, 1))


@final
class KernelMask(Mask):
    """How many taps of a kernel stay: beta of shape (K,), from the oldest tap to the newest, which always stays.

    theta = ``kernel_scores(beta)``, a tap stays while theta > 0.5, so that what goes is the oldest. ``sizes``: what a
    kernel is called that has 1, 2, ... of its positions left. For a kernel in space these are rings around its centre,
    the outermost first: a 5x5 kernel has 3, and the sizes 1, 3, 5.

    >>> mask = KernelMask(5)
    >>> mask.decide(2)
    >>> mask.hard().tolist(), mask.decision()
    ([0.0, 0.0, 0.0, 1.0, 1.0], 2)
    """

    def __init__(self, taps: int, *, sizes: Sequence[int] | None = None) -> None:
        super().__init__(taps)
        self.sizes = tuple(range(1, taps + 1) if sizes is None else sizes)
        if len(self.sizes) != taps or list(self.sizes) != sorted(set(self.sizes)):
            raise ConfigurationError(f"KernelMask(sizes={sizes}): {taps} sizes that ascend are needed")

    def hard(self) -> Tensor:
        """1 for taps that stay, else 0, of shape (K,), with a straight-through gradient."""
        return straight_through(kernel_scores(self.alpha))

    def decision(self) -> int:
        return self.sizes[int(self.hard().sum()) - 1]

    def signature(self) -> tuple[Hashable, ...]:
        return (type(self).__name__, *self.sizes)

    def everything(self) -> int:
        return self.sizes[-1]

    @torch.no_grad()
    def decide(self, decision: Any) -> None:
        if isinstance(decision, bool) or decision not in self.sizes:
            allowed = list(self.sizes)
            raise ConfigurationError(f"KernelMask: size {decision!r}, allowed are {allowed}")
        n = len(self.alpha)
        kept = 1 + self.sizes.index(decision)
        self.alpha.copy_((torch.arange(n, device=self.alpha.device) >= n - kept).to(self.alpha.dtype))


@final
class DilationMask(Mask):
    """The dilation of a kernel of ``taps``: gamma of shape (G,), G = max(ceil(log2 K), 1), the last always on.

    theta = ``dilation_scores(gamma, K)``: with m entries off from the front, the taps that stay lie 2^m apart, counted
    from the newest one. The dilation is 1 + the longest run of zeros in the thresholded theta.

    >>> mask = DilationMask(9)
    >>> mask.decide(4)
    >>> mask.hard().tolist(), mask.decision()
    ([1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0], 4)
    """

    def __init__(self, taps: int) -> None:
        is_number = isinstance(taps, int) and not isinstance(taps, bool) and taps > 0
        super().__init__(octaves(taps) if is_number else taps)
        self.taps = taps

    def hard(self) -> Tensor:
        """1 for taps that stay, else 0, of shape (K,), with a straight-through gradient."""
        return straight_through(dilation_scores(self.alpha, self.taps))

    def decision(self) -> int:
        return 1 + longest_gap(self.hard().detach().tolist())

    def everything(self) -> int:
        return 1

    @torch.no_grad()
    def decide(self, decision: Any) -> None:
        allowed = [2**p for p in range(len(self.alpha))]
        if decision not in allowed or isinstance(decision, bool):
            raise ConfigurationError(f"DilationMask: dilation {decision!r}, allowed are {allowed}")
        off = allowed.index(decision)
        self.alpha.copy_((torch.arange(len(self.alpha), device=self.alpha.device) >= off).to(self.alpha.dtype))


def longest_gap(kept: Sequence[float]) -> int:
    """The longest run of zeros.

    >>> longest_gap([1, 0, 0, 1, 0, 1])
    2
    """
    longest = run = 0
    for value in kept:
        run = 0 if value else run + 1
        longest = max(longest, run)
    return longest
