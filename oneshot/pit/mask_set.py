"""All masks of one network, computed together: one flat vector of zeros and ones per step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import ArchMismatchError, ConfigurationError
from ..graph.dimensions import Dimension
from ..mutables.base import keeping_precision
from ..mutables.masks import (
    THRESHOLD,
    ChannelMask,
    DilationMask,
    KernelMask,
    Mask,
    dilation_count,
    kept_units,
    longest_gap,
    magnitude,
    octaves,
)
from .axes import ChannelAxis, KernelAxis

__all__ = ["FlatMasks", "MaskSet"]


class FlatMasks(NamedTuple):
    """Every unit and tap of a network, then a one: ``hard`` 0 or 1, straight through; ``soft`` its relaxed share."""

    hard: Tensor
    soft: Tensor


class MaskSet(nn.Module):
    """The masks of some axes by label, and where they lie in the flat vector.

    Units of channel axes come first, then the taps of kernel axes, then one element that is always 1, for all indices
    that are not searched. ``places(dimension)``: for each index of a dimension its element. ``own``: masks placed by
    hand, by label; the others are made here. ``keys``: what masks are called in a ``state_dict``, if they have been in
    another set.

    In the vector, a tap is h(theta^beta) h(theta^gamma), h(x) = 1[x > 0.5]; its relaxed share is
    theta^beta_j / (j + 1) * theta^gamma_j / n_j, so that the relaxed size of a kernel of K taps starts at K.
    """

    segments: Tensor
    granularity: Tensor
    least: Tensor
    scores: Tensor
    offset: Tensor
    divisor: Tensor
    one: Tensor
    axis_of: Tensor
    count_of: Tensor

    def __init__(
        self,
        channels: Sequence[ChannelAxis],
        kernels: Sequence[KernelAxis],
        own: Mapping[str, Mask] | None = None,
        keys: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.kernels = tuple(channels), tuple(kernels)
        own = own or {}
        made: dict[str, Mask] = {}
        for axis in channels:
            mask = own.get(axis.label) or ChannelMask(axis.units, granularity=axis.granularity)
            assert isinstance(mask, ChannelMask)
            mask.least = max(mask.least, axis.least)
            made[axis.label] = mask
        for kernel in kernels:
            made[kernel.kernel_label] = own.get(kernel.kernel_label) or KernelMask(kernel.taps, sizes=kernel.sizes)
            if kernel.dilated:
                made[kernel.dilation_label] = own.get(kernel.dilation_label) or DilationMask(kernel.taps)
        # The names of modules have no dots, and a ModuleDict takes no "keys" or "items".
        known = keys or {}
        self._keys = {x: known.get(x, f"of:{x.replace('.', '/')}:{i}") for i, x in enumerate(made)}
        self.by_label = nn.ModuleDict({self._keys[label]: mask for label, mask in made.items()})
        labels = [axis.label for axis in channels] + [kernel.kernel_label for kernel in kernels]
        labels += [kernel.dilation_label for kernel in kernels if kernel.dilated]
        self._order = [self._keys[label] for label in labels]
        self._set_channel_buffers()
        self._set_kernel_buffers()
        self._starts = self._flat_starts()
        self._set_size_buffers()

    # ---- a mapping of labels to masks ----------------------------------------------------------------------------

    def __getitem__(self, label: str) -> Any:
        if label not in self._keys:
            raise ConfigurationError(f"no mask {label!r}; there are {list(self)}")
        return self.by_label[self._keys[label]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self.by_label)

    def items(self) -> list[tuple[str, Mask]]:
        return [(label, self[label]) for label in self]

    @torch.no_grad()
    def decisions(self) -> dict[str, Any]:
        """Label -> kept units, kernel size or dilation, JSON-ready."""
        alphas = self.alphas()
        n, k = len(self.channels), len(self.kernels)
        found: dict[str, Any] = {}
        if n:
            kept, _ = self.kept(magnitude(torch.cat(alphas[:n])))
            pieces = zip(self.channels, kept.split([axis.units for axis in self.channels]), strict=True)
            for axis, flags in pieces:
                left = self[axis.label].left
                found[axis.label] = [left[i] for i in flags.nonzero().flatten().tolist()]
        if k:
            flags = self.tap_scores(torch.cat(alphas[n:]).abs()) > THRESHOLD
            lengths = [kernel.taps for kernel in self.kernels]
            of_all = flags.split([*lengths, *lengths])
            for kernel, of_beta, of_gamma in zip(self.kernels, of_all[:k], of_all[k:], strict=True):
                found[kernel.kernel_label] = kernel.sizes[int(of_beta.sum()) - 1]
                if kernel.dilated:
                    found[kernel.dilation_label] = 1 + longest_gap(of_gamma.tolist())
        return {label: found[label] for label in self}

    def decide(self, arch: Mapping[str, Any]) -> None:
        """Set every mask; ArchMismatchError, with nothing changed, unless it has one fitting decision for each."""
        missing, extra = [x for x in self if x not in arch], [x for x in arch if x not in set(self)]
        if missing or extra:
            raise ArchMismatchError(
                f"missing labels {missing}, labels {extra} that the model does not have; its labels are {list(self)}"
            )
        before = {label: mask.alpha.detach().clone() for label, mask in self.items()}
        try:
            for label, mask in self.items():
                mask.decide(arch[label])
        except ConfigurationError as error:
            with torch.no_grad():
                for changed, mask in self.items():
                    mask.alpha.copy_(before[changed])
            raise ArchMismatchError(f"label {label!r}: {error}") from error

    @torch.no_grad()
    def clip_(self) -> None:
        """All alphas back into [0, 1]."""
        alphas = self.alphas()
        if alphas:
            torch._foreach_clamp_min_(alphas, 0.0)
            torch._foreach_clamp_max_(alphas, 1.0)

    # ---- the flat vector -----------------------------------------------------------------------------------------

    def _set_channel_buffers(self) -> None:
        sizes = torch.tensor([axis.units for axis in self.channels], dtype=torch.int64)
        self._keep("segments", torch.repeat_interleave(torch.arange(len(sizes)), sizes))
        self._keep("granularity", torch.tensor([self[a.label].granularity for a in self.channels], dtype=torch.int64))
        self._keep("least", torch.tensor([self[a.label].least for a in self.channels], dtype=torch.int64))
        self._exact = all(self[a.label].granularity == self[a.label].least == 1 for a in self.channels)

    def _set_kernel_buffers(self) -> None:
        """(theta^beta, theta^gamma) = S (|beta|, |gamma|) + s over the taps of all kernels: one block for each."""
        taps, steps = sum(k.taps for k in self.kernels), sum(octaves(k.taps) for k in self.kernels if k.dilated)
        scores, offset = torch.zeros(2 * taps, taps + steps), torch.zeros(2 * taps)
        divisor = torch.ones(taps)
        at, step = 0, taps
        for kernel in self.kernels:
            k, g = kernel.taps, octaves(kernel.taps)
            of_beta, of_gamma = slice(at, at + k), slice(taps + at, taps + at + k)
            scores[of_beta, at : at + k - 1] = torch.ones(k, k - 1).tril()
            offset[at + k - 1] = 1  # the newest tap always stays
            divisor[of_beta] = torch.arange(1, k + 1)
            if kernel.dilated:
                reached = dilation_count(k)
                scores[of_gamma, step : step + g - 1] = reached[:-1].T
                offset[of_gamma] = reached[-1]
                divisor[of_beta] *= reached.sum(0)
                step += g
            else:
                offset[of_gamma] = 1
            at += k
        self._keep("scores", scores)
        self._keep("offset", offset)
        self._keep("divisor", divisor)
        self._keep("one", torch.ones(1))

    def _keep(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskSet:
        if recurse:
            for child in self.children():
                child._apply(fn)
        super()._apply(partial(keeping_precision, fn), recurse=False)
        return self

    def _flat_starts(self) -> dict[str, int]:
        starts, at = {}, 0
        for axis in self.channels:
            starts[axis.label], at = at, at + axis.units
        for kernel in self.kernels:
            starts[kernel.kernel_label], at = at, at + kernel.taps
        self.size, self.units = at + 1, sum(axis.units for axis in self.channels)
        return starts

    def _set_size_buffers(self) -> None:
        """Of each element of the vector: its axis, and how many indices of a dimension follow it."""
        axes = [torch.full((axis.units,), i) for i, axis in enumerate(self.channels)]
        counts = [torch.ones(axis.units, dtype=torch.int64) for axis in self.channels]
        for i, kernel in enumerate(self.kernels, start=len(self.channels)):
            axes.append(torch.full((kernel.taps,), i))
            counts.append(torch.bincount(next(iter(kernel.positions.values())), minlength=kernel.taps))
        self._keep("axis_of", torch.cat([*axes, torch.tensor([len(self.channels) + len(self.kernels)])]))
        self._keep("count_of", torch.cat([*counts, torch.zeros(1, dtype=torch.int64)]).to(torch.float64))

    @property
    def n_axes(self) -> int:
        return len(self.channels) + len(self.kernels)

    def full(self) -> list[int]:
        """The size of each axis: units of channels, taps of a side of a kernel."""
        sides = [len(next(iter(kernel.positions.values()))) for kernel in self.kernels]
        return [axis.units for axis in self.channels] + sides

    def made_with(self) -> list[int]:
        """The size that each axis had at first."""
        return [self[axis.label].made_with for axis in self.channels] + self.full()[len(self.channels) :]

    def lowest(self, learning: bool = False) -> list[int]:
        """The smallest size of each axis that its masks allow; ``learning``: if only those move that learn now."""

        def moves(label: str) -> bool:
            return not learning or bool(self[label].alpha.requires_grad)

        lowest = [
            _multiple(self[a.label], a.units) if moves(a.label) else int(self[a.label].hard().detach().sum())
            for a in self.channels
        ]
        for kernel, full in zip(self.kernels, self.full()[len(self.channels) :], strict=True):
            searched = moves(kernel.kernel_label)
            longest = kernel.dilated and moves(kernel.dilation_label)
            # With the largest dilation alone, two taps are left of a kernel of more than two.
            lowest.append(
                1 if searched else (kernel.taps - 1) // 2 ** (octaves(kernel.taps) - 1) + 1 if longest else full
            )
        return lowest

    def sizes(self, flat: Tensor) -> Tensor:
        """The size of each axis, float64 of shape (axes,), from the flat vector, hard or soft."""
        total = torch.zeros(self.n_axes + 1, dtype=torch.float64, device=flat.device)
        return total.index_add(0, self.axis_of, flat.to(torch.float64) * self.count_of)[:-1]

    def forward(self) -> FlatMasks:
        """The vector, of shape (units + taps + 1,)."""
        if not self._order:
            return FlatMasks(self.one, self.one)
        hard, soft = _FlatMasks.apply(self, *self.alphas())
        return FlatMasks(hard, soft)

    def alphas(self) -> list[Tensor]:
        """Of masks of channels, of kernel sizes, of dilations: in the order of the flat vector."""
        masks = self.by_label._modules
        return [masks[key]._parameters["alpha"] for key in self._order]  # type: ignore[misc]

    def kept(self, theta: Tensor) -> tuple[Tensor, Tensor | None]:
        """Which units of all channel axes stay, 0 or 1 of shape (units,), and which of them below the threshold.

        The latter are flags, or None if there is no such unit.
        """
        above = theta > THRESHOLD
        if not self._exact:
            kept = kept_units(theta, self.segments, self.granularity, self.least)
        else:
            flags = above.to(theta.dtype)
            if theta.device.type == "cpu" and not torch.compiler.is_compiling():
                counts = theta.new_zeros(len(self.channels)).index_add_(0, self.segments, flags)
                if counts.all():
                    return flags, None
            kept = above | _largest(theta, self.segments, len(self.channels))
        return kept.to(theta.dtype), kept & ~above

    def tap_scores(self, size: Tensor) -> Tensor:
        """(theta^beta, theta^gamma) of all taps, of shape (2 taps,), from |beta| and |gamma|."""
        if size.dtype == self.scores.dtype:
            return torch.addmv(self.offset, self.scores, size)
        return torch.addmv(self.offset.to(size.dtype), self.scores.to(size.dtype), size)

    # ---- where dimensions lie in it ------------------------------------------------------------------------------

    def places(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[Dimension, Tensor]:
        """For each searched dimension the element of the vector that each of its indices follows."""
        found: dict[Dimension, Tensor] = {}
        for axis in self.channels:
            for dimension, indices in axis.dimensions.items():
                if dimension not in found:
                    n = shapes[dimension.name][dimension.dim]
                    found[dimension] = torch.full((n,), self.size - 1, dtype=torch.int64)
                units = torch.arange(axis.units)[:, None].expand_as(indices)
                found[dimension][indices.flatten()] = self._starts[axis.label] + units.flatten()
        for kernel in self.kernels:
            for dimension, places in kernel.positions.items():
                found[dimension] = self._starts[kernel.kernel_label] + places
        return found

    def start(self, label: str) -> int:
        return self._starts[label]


class _FlatMasks(torch.autograd.Function):
    """The flat vectors of a MaskSet, as one node of the autograd graph.

    With theta = |alpha| of a channel, hard = h(theta) has the gradient of theta, and so has soft, except where a unit
    stays only because one has to. A tap has hard = h(theta^beta) h(theta^gamma), soft = theta^beta theta^gamma / n, and
    the scores theta are linear in |beta| and |gamma|.

    What the backward pass needs is kept on ``ctx`` itself, and stays after it: the loss and the costs of one step share
    this node, and may call ``backward`` one after the other.
    """

    @staticmethod
    def forward(ctx: Any, masks: MaskSet, *alphas: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.masks, ctx.sizes = masks, [len(alpha) for alpha in alphas]
        ctx.alpha = alpha = torch.cat(alphas)
        size, units = alpha.abs(), masks.units
        one = masks.one if masks.one.dtype == size.dtype else masks.one.to(size.dtype)
        hard, soft = [one], [one]
        ctx.forced = None
        if masks.kernels:
            scores = masks.tap_scores(size[units:] if units else size)
            beta, gamma = ctx.scores = scores.chunk(2)
            of_beta, of_gamma = ctx.flags = (scores > THRESHOLD).to(size.dtype).chunk(2)
            hard.insert(0, of_beta * of_gamma)
            soft.insert(0, (beta * gamma).div_(masks.divisor))
        if units:
            theta = size[:units] if masks.kernels else size
            kept, ctx.forced = masks.kept(theta)
            hard.insert(0, kept)
            soft.insert(0, theta if ctx.forced is None else theta.masked_fill(ctx.forced, 1.0))
        return torch.cat(hard), torch.cat(soft)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_hard: Tensor | None, of_soft: Tensor | None) -> Any:
        masks: MaskSet = ctx.masks
        units = masks.units
        total = of_hard if of_soft is None else of_soft
        if total is None:
            return None, *(None for _ in ctx.sizes)
        parts = []
        if units:
            of_units = total[:units]
            if of_soft is not None and ctx.forced is not None:
                of_units = of_units.masked_fill(ctx.forced, 0.0)
            parts.append(of_units if of_hard is None or of_soft is None else of_units + of_hard[:units])
        if masks.kernels:
            parts.append(_of_taps(masks, of_hard, of_soft, ctx.scores, ctx.flags))
        flat = torch.cat(parts) if len(parts) > 1 else parts[0]
        return None, *(flat * torch.copysign(masks.one, ctx.alpha)).split(ctx.sizes)


def _of_taps(
    masks: MaskSet,
    of_hard: Tensor | None,
    of_soft: Tensor | None,
    scores: tuple[Tensor, Tensor],
    flags: tuple[Tensor, Tensor],
) -> Tensor:
    """The gradient of |beta| and |gamma|, from those of the taps."""
    of_scores = None
    if of_hard is not None:
        hard = of_hard[masks.units : -1]
        of_scores = torch.cat([hard * flags[1], hard * flags[0]])
    if of_soft is not None:
        soft = of_soft[masks.units : -1] / masks.divisor
        of_relaxed = torch.cat([soft * scores[1], soft * scores[0]])
        of_scores = of_relaxed if of_scores is None else of_scores + of_relaxed
    assert of_scores is not None
    matrix = masks.scores if masks.scores.dtype == of_scores.dtype else masks.scores.to(of_scores.dtype)
    return of_scores @ matrix


def _multiple(mask: ChannelMask, units: int) -> int:
    """The smallest number of units that a mask can keep."""
    return min(units, -(-mask.least // mask.granularity) * mask.granularity)


@torch.no_grad()
def _largest(theta: Tensor, segments: Tensor, masks: int) -> Tensor:
    """The largest unit of each mask, of equal ones the last: bool of shape (units,)."""
    places = torch.arange(len(theta), device=theta.device)
    largest = torch.zeros(masks, dtype=theta.dtype, device=theta.device).scatter_reduce_(0, segments, theta, "amax")
    last = torch.zeros(masks, dtype=torch.int64, device=theta.device).scatter_reduce_(
        0, segments, torch.where(theta == largest[segments], places, -1), "amax"
    )
    return places == last[segments]
