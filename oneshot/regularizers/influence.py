"""Which channels the outputs of a network depend on, by leaving channels out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils import _pytree as pytree

from ..errors import ExportError
from ..graph import evaluated, tensors_of
from ..graph.cut import copied
from ..graph.dimensions import Dimension
from ..pit import PIT
from ..pit.axes import ChannelAxis
from ..pit.search_space import call_masked
from ..pit.trial import NoDropout, randomize, relative_difference

__all__ = ["TOLERANCE", "Influence", "Reading", "Unit", "largest_difference"]

TOLERANCE = 1e-5  # of max |difference| / max |output|
_SHAKEN = 2


class Unit(NamedTuple):
    """A channel, or channels that go together: the label of its axis, and its number there."""

    axis: str
    number: int


class Reading(NamedTuple):
    """What the layer ``reader`` gets of a channel: the largest value, and whether it is the same for every input."""

    reader: str
    value: float
    constant: bool


class _Run(NamedTuple):
    """A network, an input, and what the one returns for the other."""

    model: nn.Module
    args: list[Any]
    expected: Any


class Influence:
    """Whether the outputs of the network of ``pit`` stay as they are without some of ``candidates``.

    A channel is left out by zeros in all weights that read it. That is tried on the example input and on random ones,
    with the network as it is, and with random numbers in place of all but the zeros in it: what another weight or input
    would make alive is not zero. Numbers that belong to ``fixed``, candidates that do not depend on the input, stay
    (a negative bias before a ReLU). On the CPU, in float64 where the network runs in it.
    """

    def __init__(self, pit: PIT, candidates: Sequence[Unit], fixed: Sequence[Unit], seed: int = 0) -> None:
        self.space, self.masks, self.candidates = pit.space, pit.masks, list(candidates)
        generator = torch.Generator().manual_seed(seed)
        model, args = _wide(pit.network, pit.example)
        self.runs: list[_Run] = []
        models = [model, model, *(self._shaken(model, fixed, generator) for _ in range(_SHAKEN))]
        for number, one in enumerate(models):
            given = args if number == 0 else _random(args, generator)
            expected = _call(one, given)
            if all(bool(t.isfinite().all()) for t in tensors_of(expected) if t.is_floating_point()):
                self.runs.append(_Run(one, given, expected))
            elif number == 0:
                raise ExportError("the outputs on the example input are not finite; there is nothing to compare with")

    def of(self, units: Sequence[Unit]) -> float:
        """The largest relative difference of the outputs when ``units`` are left out, of all runs."""
        return max(relative_difference(run.expected, self._without(run, units))[0] for run in self.runs)

    def influential(self) -> list[Unit]:
        """The candidates that have to stay; all others can be left out together."""
        if self.of(self.candidates) <= TOLERANCE:
            return []
        slopes = [slope for slope in map(self._slope, self.runs) if slope is not None]
        found = [u for u in self.candidates if any(bool(slope[self._place(u)]) for slope in slopes)]
        found += self._by_halving(_others(self.candidates, found))
        others = _others(self.candidates, found)
        return found if self.of(others) <= TOLERANCE else self.candidates

    def _by_halving(self, units: list[Unit]) -> list[Unit]:
        """Those of ``units`` that alone change the outputs."""
        if not units or self.of(units) <= TOLERANCE:
            return []
        if len(units) == 1:
            return units
        half = len(units) // 2
        return self._by_halving(units[:half]) + self._by_halving(units[half:])

    def readings(self, units: Sequence[Unit]) -> dict[Unit, Reading | None]:
        """What convolutions and linear layers get of each channel, the largest; None where that is not seen."""
        axes = {axis.label: axis for axis in self.space.channels}
        readers = {label: self._readers(axes[label]) for label in {unit.axis for unit in units}}
        paths = {_path(dimension) for dimensions in readers.values() for dimension in dimensions}
        seen = [_inputs(run, paths) for run in self.runs[:2]]
        found: dict[Unit, Reading | None] = {}
        for unit in units:
            of_unit = []
            for d in readers[unit.axis]:
                if all(_path(d) in inputs for inputs in seen):
                    columns = axes[unit.axis].dimensions[d][unit.number]
                    of_unit.append(_reading(_path(d), [inputs[_path(d)][..., columns] for inputs in seen]))
            largest = max(of_unit, key=lambda reading: abs(reading.value), default=None)
            found[unit] = largest and largest._replace(constant=all(reading.constant for reading in of_unit))
        return found

    def _readers(self, axis: ChannelAxis) -> list[Dimension]:
        """The weights that read the channels of an axis, of the layers whose input shows them one by one."""
        found = []
        for dimension in axis.dimensions:
            layer = self.runs[0].model.get_submodule(_path(dimension))
            linear = isinstance(layer, nn.Linear) and dimension.dim == 1
            plain = isinstance(layer, _ConvNd) and layer.groups == 1
            if linear or (plain and dimension.dim == (0 if isinstance(layer, _ConvTransposeNd) else 1)):
                found += [dimension] if dimension in axis.group.columns else []
        return found

    # ---- runs ----------------------------------------------------------------------------------------------------

    def _place(self, unit: Unit) -> int:
        return self.masks.start(unit.axis) + unit.number

    def _without(self, run: _Run, units: Sequence[Unit]) -> Any:
        flat = torch.ones(self.masks.size, dtype=torch.float64)
        flat[[self._place(unit) for unit in units]] = 0
        with _quiet(run.model):
            return call_masked(self.space, self.masks, flat, run.model, _cloned(run.args))

    def _slope(self, run: _Run) -> Tensor | None:
        """|d (a random sum of the outputs) / d mask| of every unit: 0 for a channel that is 0 wherever it is read."""
        flat = torch.ones(self.masks.size, dtype=torch.float64, requires_grad=True)
        with _quiet(run.model), torch.enable_grad():
            try:
                outputs = tensors_of(call_masked(self.space, self.masks, flat, run.model, _cloned(run.args)))
            except RuntimeError:  # it runs without a gradient only
                return None
            floats = [t for t in outputs if t.requires_grad]
            if not floats:
                return None
            total = torch.stack([(t * torch.randn(t.shape, dtype=t.dtype)).sum().double() for t in floats]).sum()
            (gradient,) = torch.autograd.grad(total, flat)
        found: Tensor = gradient.abs()
        return found

    def _shaken(self, model: nn.Module, fixed: Sequence[Unit], generator: torch.Generator) -> nn.Module:
        """The network with random numbers in place of all that is not zero and not of ``fixed``."""
        shaken = copied(model)
        randomize(shaken, generator)
        before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        stays = {name: tensor == 0 for name, tensor in before.items()}
        units: dict[str, list[int]] = {}
        for unit in fixed:
            units.setdefault(unit.axis, []).append(unit.number)
        for axis in self.space.channels:
            for dimension, indices in axis.dimensions.items():
                of_units = indices[units.get(axis.label, [])].flatten()
                stays[dimension.name].movedim(dimension.dim, 0)[of_units] = True
        with torch.no_grad():
            for name, tensor in (*shaken.named_parameters(), *shaken.named_buffers()):
                tensor.copy_(torch.where(stays[name], before[name], tensor))
        return shaken


def _others(units: Sequence[Unit], some: Iterable[Unit]) -> list[Unit]:
    there = set(some)
    return [unit for unit in units if unit not in there]


def _path(dimension: Dimension) -> str:
    return dimension.name.rpartition(".")[0]


def _reading(path: str, seen: Sequence[Tensor]) -> Reading:
    values = torch.cat([x.flatten(1) for x in seen])  # (samples, places)
    value = float(values.flatten()[values.abs().argmax()])
    # Of one place at a time: next to a border another value may stand.
    spread = float((values - values[:1]).abs().max())
    return Reading(path or "the network", value, spread <= TOLERANCE * abs(value))


def _inputs(run: _Run, paths: Iterable[str]) -> dict[str, Tensor]:
    """The first input of each of these layers, with the channels as the last dimension."""
    found: dict[str, Tensor] = {}

    def keep(path: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        channels = -1 - len(layer.kernel_size) if isinstance(layer, _ConvNd) else -1
        if args and args[0].dim() >= 1 - channels:
            found.setdefault(path, args[0].movedim(channels, -1))

    handles = [run.model.get_submodule(p).register_forward_pre_hook(partial(keep, p)) for p in paths]
    try:
        _call(run.model, run.args)
    finally:
        for handle in handles:
            handle.remove()
    return found


def largest_difference(one: nn.Module, other: nn.Module, args: Sequence[Any], seed: int = 0) -> float:
    """max |difference| / max |output| of two networks, on ``args`` and on random inputs, in float64 where both run."""
    wide, given = _wide(one, args)
    other_wide = copied(other).cpu().to(next((p.dtype for p in wide.parameters()), torch.float32))
    inputs = (given, _random(given, torch.Generator().manual_seed(seed)))
    return max(relative_difference(_call(wide, x), _call(other_wide, x))[0] for x in inputs)


def _wide(model: nn.Module, args: Sequence[Any]) -> tuple[nn.Module, list[Any]]:
    """A copy on the CPU, in float64 if it runs in that."""
    wide = copied(model).cpu().double()
    given: list[Any] = pytree.tree_map_only(Tensor, lambda t: t.detach().cpu(), list(args))
    doubled = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, given)
    try:
        _call(wide, doubled)
    except Exception:  # noqa: BLE001  (the forward is the user's: anything may be raised by it)
        return copied(model).cpu(), given
    return wide, doubled


def _random(args: Sequence[Any], generator: torch.Generator) -> list[Any]:
    def drawn(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=generator).to(tensor)

    found: list[Any] = pytree.tree_map_only(Tensor, drawn, list(args))
    return found


def _call(model: nn.Module, args: Sequence[Any]) -> Any:
    with _quiet(model):
        return model(*_cloned(args))


def _cloned(args: Sequence[Any]) -> list[Any]:
    cloned: list[Any] = pytree.tree_map_only(Tensor, torch.clone, list(args))
    return cloned


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode without dropout and gradients, with the same random numbers every time."""
    with torch.random.fork_rng(devices=[]), evaluated(model), NoDropout():
        torch.manual_seed(0)
        yield
