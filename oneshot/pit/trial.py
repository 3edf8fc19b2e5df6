"""Trials: a group of dimensions is searched only once a cut of it has run and computed what the masked network does."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import OneshotError, UnsupportedModelError
from ..export.fixed import without_choices
from ..graph import evaluated, tensors_of
from ..graph.cut import copied
from ..mutables import EveryPath, OnePath, decisions
from .axes import ChannelAxis
from .mask_set import MaskSet
from .presence import holds
from .search_space import SearchSpace, call_masked, cut_network, rewriter_of

__all__ = ["NoDropout", "check_widths", "confirmed"]

_ALLOWED = {torch.float64: 1e-10}
_LOOSE = 1e-3
_TRIES = 6
_DROPOUTS = frozenset(
    getattr(owner, name)
    for owner in (F, torch)
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout",
                 "feature_dropout", "dropout_", "alpha_dropout_")
    if hasattr(owner, name)
)  # fmt: skip


class NoDropout(TorchFunctionMode):
    """Dropout as the identity: two networks of different widths cannot drop the same elements."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DROPOUTS:
            return args[0] if args else (kwargs or {})["input"]
        return func(*args, **(kwargs or {}))


def confirmed(
    space: SearchSpace, model: nn.Module, args: Sequence[Any], *, in_training: bool = False, seed: int = 0
) -> SearchSpace:
    """The axes of ``space`` of which a cut has been tried with success; the others are frozen with the reason.

    All are cut at once, with random weights and statistics, in float64 where the network runs in it: twice at random
    places, then down to the smallest that the masks allow. Where that fails, halves are tried, down to the axes that
    fail alone. An axis that fails at one unit only (a ``squeeze`` may take its dimension away) keeps two. What a cut of
    does not change the output at all has shown nothing: such an axis is frozen too. ``in_training``: try it in train
    mode as well, where other layers run.
    """
    tried = _Trial(space, model, args, seed, (False, True) if in_training else (False,))
    reasons: dict[str, str] = {}
    while space.without(reasons).labels:
        left = space.without(reasons)
        failure, smallest = tried.first_failure(left)
        if failure is None:
            reasons.update(tried.without_effect(left))
            break
        failing = tried.failing(left, left.labels, failure, smallest) or {left.labels[-1]: failure}
        with_one = [
            axis.label for axis in left.channels if axis.least == 1 and axis.units > 2 and axis.label in failing
        ]
        if smallest and with_one:
            space = space.with_two(with_one)
        else:
            reasons.update(failing)
    return space.without(reasons)


def check_widths(space: SearchSpace, model: nn.Module, args: Sequence[Any], *, seed: int = 0) -> None:
    """UnsupportedModelError where zeros behind a narrower output are not the same as an output that ends there.

    Every option of every choice between different widths is taken once, and the network without it compared with the
    one that pads, with random weights.
    """
    if not space.found.widened:
        return
    tried = _Trial(space, model, args, seed, (False,))
    masks = MaskSet(space.channels, space.kernels).to(next(tried.model.parameters()).dtype)
    for widened in space.found.widened:
        for option in widened.widths:
            others = {label: min(options) for label, options in widened.when.items()}
            choices = {**dict.fromkeys(decisions(tried.model), 0), **others, widened.label: option}
            failure = tried.failure_of_choices(space, masks, choices)
            if failure is not None:
                raise UnsupportedModelError(
                    f"{widened.label}: its candidates have outputs of different widths, {dict(widened.widths)} "
                    f"(option: width), and the network of option {option} {failure}. Only a convolution or a linear "
                    "layer may follow, perhaps after functions that keep zeros. Give the candidates one width"
                )


class _Trial:
    def __init__(
        self, space: SearchSpace, model: nn.Module, args: Sequence[Any], seed: int, modes: Sequence[bool]
    ) -> None:
        self.modes = modes
        self.generator = torch.Generator().manual_seed(seed)
        self.model, self.args = self._prepared(model, args)
        randomize(self.model, self.generator)
        self.rewriter = rewriter_of(space, self.model, self.args)

    def _prepared(self, model: nn.Module, args: Sequence[Any]) -> tuple[nn.Module, list[Any]]:
        """A copy on the CPU, in float64 if it runs in that."""
        wide = copied(model).cpu().double()
        arguments = pytree.tree_map_only(Tensor, _wide, list(args))
        try:
            with evaluated(wide, EveryPath()):
                wide(*arguments)
        except Exception:  # noqa: BLE001  (the forward is the user's: anything may be raised by it)
            narrow = copied(model).cpu()
            return narrow, pytree.tree_map_only(Tensor, lambda t: t.detach().cpu(), list(args))
        return wide, arguments

    def masks(self, space: SearchSpace, smallest: bool) -> MaskSet:
        """Random decisions: at least one unit of each axis goes, and one stays; ``smallest``: no more than has to."""
        masks = MaskSet(space.channels, space.kernels)
        for axis in space.channels:
            most = axis.units - 1  # a single unit is tried in the round of the smallest networks, for itself
            kept = axis.least if smallest else max(1, self._number(min(2, most), most))
            masks[axis.label].keep(_some(axis, kept, self.generator))
        for kernel in space.kernels:
            size = 1 if smallest else self._number(1, kernel.taps - 1)
            masks[kernel.kernel_label].decide(kernel.sizes[size - 1])
            if kernel.dilated:
                octave = self._number(0, len(masks[kernel.dilation_label].alpha) - 1)
                masks[kernel.dilation_label].decide(2**octave)
        return masks.to(next((p.dtype for p in self.model.parameters()), torch.float32))

    def _number(self, low: int, high: int) -> int:
        return int(torch.randint(low, max(low, high) + 1, (), generator=self.generator))

    def first_failure(self, space: SearchSpace) -> tuple[str | None, bool]:
        """Of several rounds, and whether it was in the one with the smallest networks."""
        for smallest in (False, False, True):
            failure = self.failure(space, smallest)
            if failure is not None:
                return failure, smallest
        return None, False

    def failure(self, space: SearchSpace, smallest: bool = False) -> str | None:
        """What goes wrong when all axes of a space are cut at once; None if nothing does."""
        masks = self.masks(space, smallest)
        expected: list[Any] = []
        failure = ""
        for renumber in (True,) if space.as_graph else (True, False):
            try:
                got = self._of_cut(space, masks, renumber)
            except OneshotError as error:
                failure = failure or f"a cut of it cannot be made: {_first_line(error)}"
                continue
            except Exception as error:  # noqa: BLE001  (the forward is the user's: anything may be raised by it)
                failure = failure or f"a cut of it does not run: {type(error).__name__}: {_first_line(error)}"
                continue
            if not expected:  # not before, because a cut that does not run is found out sooner
                call = partial(call_masked, space, masks, masks().hard, self.model)
                expected = [self._run(self.model, mode, call) for mode in self.modes]
            difference, allowed = relative_difference(expected, got)
            if difference <= allowed:
                return None
            failure = f"a cut of it computes something else: {difference:.1g} relative"
        return failure

    def _of_cut(self, space: SearchSpace, masks: MaskSet, renumber: bool) -> list[Any]:
        small = cut_network(space, masks, self.model, renumber=renumber, rewriter=self.rewriter)
        outputs = [self._run(small, mode, partial(_call, small)) for mode in self.modes]
        if space.as_graph:  # a GraphModule is full of cycles, and each of these holds the weights of a network
            del small
            gc.collect()
        return outputs

    def failure_of_choices(self, space: SearchSpace, masks: MaskSet, choices: Mapping[str, int]) -> str | None:
        """What goes wrong with one network of the choices, where no mask removes anything."""
        absent = [label for label, presence in space.presence.items() if not holds(presence, choices)]
        small = cut_network(space, masks, self.model, rewriter=self.rewriter, absent=absent)
        plain = without_choices(small, choices)
        with evaluated(self.model), NoDropout():
            for label, decision in decisions(self.model).items():
                decision.set_sampler(OnePath(choices[label]))
            expected = self.model(*_cloned(self.args))
        try:
            with evaluated(plain), NoDropout():
                got = plain(*_cloned(self.args))
        except Exception as error:  # noqa: BLE001  (the forward is the user's: anything may be raised by it)
            return f"does not run: {type(error).__name__}: {_first_line(error)}"
        difference, allowed = relative_difference(expected, got)
        return None if difference <= allowed else f"computes something else: {difference:.1g} relative"

    def _run(self, model: nn.Module, mode: bool, call: Callable[[Sequence[Any]], Any]) -> Any:
        """With the same random numbers and buffers every time; ``mode``: of training."""
        before = [(buffer, buffer.clone()) for buffer in model.buffers()] if mode else []
        with torch.random.fork_rng(devices=[]), evaluated(model, EveryPath()), NoDropout():
            torch.manual_seed(0)
            model.train(mode)
            output = call(_cloned(self.args))
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
        return output

    def failing(self, space: SearchSpace, labels: Sequence[str], failure: str, smallest: bool) -> dict[str, str]:
        """The axes that fail alone, or the smallest sets that fail together, by halving.

        Of layers of one name in modules of one class, two that fail alone stand for all: the blocks of a network are
        written by one piece of code.
        """
        if len(labels) == 1:
            return {labels[0]: failure}
        if len(labels) > 2 and len({self._kind(label) for label in labels}) == 1:
            ends = {label: self.failure(space.only([label]), smallest) for label in (labels[0], labels[-1])}
            if all(ends.values()):
                alike = f"{ends[labels[0]]} (so it is with {labels[0]})"
                return {label: ends.get(label) or alike for label in labels}
        found: dict[str, str] = {}
        ordered = sorted(labels, key=self._kind)
        half = len(ordered) // 2
        for part in (ordered[:half], ordered[half:]):
            of_part = self.failure(space.only(part), smallest)
            if of_part is not None:
                found.update(self.failing(space, part, of_part, smallest))
        return found

    def _kind(self, label: str) -> tuple[str, str]:
        """The class of the module that a layer stands in, and its name there."""
        path, _, name = label.partition(":")[0].rpartition(".")
        modules = dict(self.model.named_modules())
        return type(modules.get(path)).__qualname__, name

    def without_effect(self, space: SearchSpace) -> dict[str, str]:
        """Axes whose masks the outputs do not depend on: a zero gradient for every unit."""
        if not space.channels:
            return {}
        space = space.only([axis.label for axis in space.channels])
        masks = MaskSet(space.channels, ()).to(next(self.model.parameters()).dtype)
        left = list(space.channels)
        for _ in range(_TRIES):  # with other weights each time: a unit may be dead for one input
            effects = [self._run(self.model, mode, partial(self._effect, space, masks)) for mode in self.modes]
            gradient = torch.stack(effects).abs().sum(0)
            left = [axis for axis in left if not bool(gradient[masks.start(axis.label) :][: axis.units].any())]
            if not left:
                break
            randomize(self.model, self.generator)
        return {axis.label: "the outputs do not depend on it" for axis in left}

    def _effect(self, space: SearchSpace, masks: MaskSet, args: Sequence[Any]) -> Tensor:
        """The derivative of a random sum of the outputs by the flat vector."""
        with torch.enable_grad():
            flat = masks().hard.detach().requires_grad_()
            try:
                outputs = call_masked(space, masks, flat, self.model, args)
            except RuntimeError:  # it runs without a gradient only (something is written into a view): nothing is known
                return torch.ones_like(flat)
            floats = [t for t in tensors_of(outputs) if t.requires_grad]
            parts = [(t * torch.randn(t.shape, dtype=t.dtype)).sum() for t in floats]
            total = torch.stack([part.double() for part in parts]).sum() if parts else flat.sum() * 0
            (gradient,) = torch.autograd.grad(total, flat, allow_unused=True)
            return torch.zeros_like(flat) if gradient is None else gradient


def _call(model: nn.Module, args: Sequence[Any]) -> Any:
    return model(*args)


def _some(axis: ChannelAxis, count: int, generator: torch.Generator) -> list[int]:
    count = min(axis.units, math.ceil(count / axis.granularity) * axis.granularity)
    return sorted(torch.randperm(axis.units, generator=generator)[:count].tolist())


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.double() if tensor.is_floating_point() else tensor


def _cloned(args: Sequence[Any]) -> list[Any]:
    cloned: list[Any] = pytree.tree_map_only(Tensor, torch.clone, list(args))
    return cloned


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


@torch.no_grad()
def randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Weights and statistics of a trained network's size, none of them zero or equal, so that every wrong cut shows."""
    vectors = {id(t) for m in model.modules() if isinstance(m, _NormBase) for t in (m.running_mean, m.running_var)}
    for module in model.modules():
        if isinstance(module, _NormBase) and module.running_var is not None and module.running_mean is not None:
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.running_mean.normal_(0, 0.3, generator=generator)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or id(parameter) in vectors:
            continue
        if parameter.dim() < 2:
            low, high = (0.5, 1.5) if name.endswith("weight") else (-0.5, 0.5)
            parameter.uniform_(low, high, generator=generator)
        else:
            fan_in = parameter[0].numel()
            # In float32, where random numbers take half the time.
            noise = torch.randn(parameter.shape, generator=generator).mul_(math.sqrt(2 / max(fan_in, 1)))
            parameter.copy_(noise)


def relative_difference(one: Any, other: Any) -> tuple[float, float]:
    """The largest difference of two outputs over the largest number in them, and what is allowed for their dtype."""
    ones, others = tensors_of(one), tensors_of(other)
    if [(t.shape, t.dtype) for t in ones] != [(t.shape, t.dtype) for t in others]:
        return math.inf, 0.0
    worst, allowed = 0.0, _LOOSE
    for a, b in zip(ones, others, strict=True):
        if not a.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(a, b) else math.inf)
            continue
        allowed = _ALLOWED.get(a.dtype, _LOOSE)
        scale = float(a.abs().max()) if a.numel() else 1.0
        difference = float((a - b).abs().max()) if a.numel() else 0.0
        if not math.isfinite(scale) or not math.isfinite(difference):
            return math.inf, allowed
        worst = max(worst, difference / max(scale, 1e-30))
    return worst, allowed
