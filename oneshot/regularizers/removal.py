"""Removal of channels that are zero: the smaller network, which computes the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..errors import ConfigurationError, ExportError
from ..graph.cut import copied
from ..graph.dimensions import Dimension
from ..mutables.base import Mutable
from ..pit import PIT
from ..pit.axes import ChannelAxis
from .influence import TOLERANCE, Influence, Reading, Unit, largest_difference

__all__ = ["Removed", "remove_zero_channels"]

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
_NAMED = 5  # channels in a message


@final
@dataclass(frozen=True)
class Removed:
    """The smaller network, and of each channel axis (the first layer that makes its channels) what became of them.

    ``kept``, ``removed``: the numbers of its channels. ``constant``: those of the kept ones whose weights are zero,
    and that are a constant all the same. ``before``, ``after``: how many ``"channels"`` and ``"parameters"`` there are.
    """

    network: nn.Module
    kept: Mapping[str, tuple[int, ...]]
    removed: Mapping[str, tuple[int, ...]]
    constant: Mapping[str, tuple[int, ...]]
    before: Mapping[str, int]
    after: Mapping[str, int]

    def __str__(self) -> str:
        rows = [f"{label}: {len(self.kept[label])} of {len(self.kept[label]) + len(gone)} channels kept"
                for label, gone in self.removed.items()]  # fmt: skip
        rows += [f"{name}: {self.before[name]} before, {self.after[name]} after" for name in self.before]
        return "\n".join(rows)


def remove_zero_channels(
    model: nn.Module,
    input_shape: tuple[Any, ...] | None = None,
    *,
    example_input: Any = None,
    constant: Literal["refuse", "keep"] = "refuse",
) -> Removed:
    """The network without the channels that are exactly zero, with the outputs that ``model`` has.

    Channels to remove are those whose weights are zero in all layers that make them (of a residual sum: in all addends,
    depthwise convolutions among them), those that only zero weights read, and those of which all weights and biases of
    norms are zero. What is cut with a channel is found as in ``coupled_channels``.

    A channel with zero weights is not zero if a bias is left, or the shift of a BatchNorm, or if an activation makes
    something of zero (sigmoid): it is a constant, and to drop it would change the outputs. Such a channel is an error,
    or stays. So the networks with and without the channels are compared: the outputs of both, on the example and on
    random inputs, and with random numbers in place of the other weights, are within 1e-5 (max |difference| / max
    |output|; in float64 if the network runs in that). A channel with zeros in the norms alone that fails this stays.

    Args:
        model: the network, which stays as it is. ``network`` of the result is in the same modes, of the same classes or
            (where numbers in the code had to change) a ``torch.fx`` graph.
        input_shape: of one sample, without the batch; or ``example_input``: a tensor, or a tuple of all arguments.
        constant: ``'refuse'``: ExportError for a channel with zero weights that is a constant; ``'keep'``: leave it in.

    Raises ExportError for a constant channel, if nothing would be left of a layer, or if the smaller network computes
    something else; ConfigurationError without a shape, or for a network with undecided choices; UnsupportedModelError
    for one that does not run on the input, or of which nothing can be cut.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    >>> with torch.no_grad():
    ...     _ = net[0].weight[1:3].zero_(), net[0].bias[1:3].zero_()
    >>> removed = remove_zero_channels(net, (1, 4, 4))
    >>> print(removed)  # (9 + 1) * 4 + 16 * 2 + 2 parameters, (9 + 1) * 2 + 8 * 2 + 2
    0: 2 of 4 channels kept
    channels: 4 before, 2 after
    parameters: 74 before, 38 after
    >>> removed.kept, removed.network[3].in_features
    ({'0': (0, 3)}, 8)
    """
    _check(model, constant)
    pit = PIT(model, input_shape, example_input=example_input)
    zero = {axis.label: _Zero.of(axis, pit.network) for axis in pit.space.channels}
    candidates = [Unit(label, n) for label, flags in zero.items() for n in _numbers(flags.any)]
    if not candidates:
        return _result(model, pit, copied(model), {}, {})
    if constant == "refuse":  # before one of these channels is named as a constant
        for axis in pit.space.channels:
            _check_some_left(axis, _numbers(zero[axis.label].made | zero[axis.label].read))
    made = {unit for unit in candidates if bool(zero[unit.axis].made[unit.number])}
    influence = Influence(pit, candidates, list(made))
    staying = dict.fromkeys(influence.influential())
    constants = _constants(influence, [unit for unit in staying if unit in made])
    if constants and constant == "refuse":
        raise ExportError(_refusal(pit, constants, influence.of(list(constants))))
    gone = _by_axis([unit for unit in candidates if unit not in staying])
    network = _without(model, pit, gone)
    return _result(model, pit, network, gone, _by_axis(list(constants)))


def _check(model: nn.Module, constant: str) -> None:
    if constant not in ("refuse", "keep"):
        raise ConfigurationError(f"remove_zero_channels(constant={constant!r}): allowed are 'refuse' and 'keep'")
    undecided = [path for path, module in model.named_modules() if isinstance(module, Mutable)]
    if undecided:
        raise ConfigurationError(
            f"remove_zero_channels: {undecided[:_NAMED]} are undecided; give it the plain network, fixed(model, arch)"
        )


def _without(model: nn.Module, pit: PIT, gone: dict[str, tuple[int, ...]]) -> nn.Module:
    """The smaller network, compared with the user's. ``gone`` becomes what was taken out."""
    for axis in pit.space.channels:
        if axis.label in gone:
            _check_some_left(axis, gone[axis.label])
            # An axis that has to keep two (a squeeze would take its dimension away) keeps a zero one.
            gone[axis.label] = gone[axis.label][: axis.units - axis.least]
            pit.masks[axis.label].keep(_others(axis.units, gone[axis.label]))
    network = pit.export()
    difference = largest_difference(model, network, pit.example)
    if not difference <= TOLERANCE:
        raise ExportError(
            f"{type(model).__name__} without its {sum(map(len, gone.values()))} zero channels computes something else: "
            f"{difference:.3g} relative, allowed is {TOLERANCE:g}. Nothing was removed"
        )
    return network


def _result(
    model: nn.Module,
    pit: PIT,
    network: nn.Module,
    gone: Mapping[str, tuple[int, ...]],
    constants: Mapping[str, tuple[int, ...]],
) -> Removed:
    units = {axis.label: axis.units for axis in pit.space.channels}
    removed = {label: gone.get(label, ()) for label in units}
    kept = {label: _others(n, removed[label]) for label, n in units.items()}
    counts = [
        {"channels": sum(channels), "parameters": sum(p.numel() for p in one.parameters())}
        for one, channels in ((model, units.values()), (network, map(len, kept.values())))
    ]
    return Removed(network, kept, removed, constants, *counts)


# ---- which channels are zero -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Zero:
    """Flags of the channels of an axis. ``made``: the weights that make it are zero; ``read``: those that read it;
    ``norm``: the weights and biases of its norms are."""

    made: Tensor
    read: Tensor
    norm: Tensor

    @staticmethod
    def of(axis: ChannelAxis, network: nn.Module) -> _Zero:
        parameters = dict(network.named_parameters())
        columns = [d for d in axis.dimensions if d in axis.group.columns]
        makers = [d for d in axis.dimensions if d not in columns and d.name in parameters]
        norms = [d for d in makers if isinstance(_owner(network, d), _NORMS)]
        weights = [d for d in makers if parameters[d.name].dim() > 1 and d not in norms]
        tensors = {**parameters, **dict(network.named_buffers())}
        return _Zero(*(_all_zero(axis, tensors, dimensions) for dimensions in (weights, columns, norms)))

    @property
    def sure(self) -> Tensor:
        return self.made | self.read

    @property
    def any(self) -> Tensor:
        return self.made | self.read | self.norm


def _all_zero(axis: ChannelAxis, tensors: Mapping[str, Tensor], dimensions: Sequence[Dimension]) -> Tensor:
    """(units,) bool: the channels at which all of these dimensions are zero; none, if there is no dimension."""
    zero = torch.full((axis.units,), bool(dimensions))
    for dimension in dimensions:
        tensor = tensors[dimension.name].detach()
        of_index = (tensor == 0).movedim(dimension.dim, 0).reshape(tensor.shape[dimension.dim], -1).all(1)
        zero &= of_index.cpu()[axis.dimensions[dimension]].all(1)
    return zero


def _owner(network: nn.Module, dimension: Dimension) -> nn.Module:
    return network.get_submodule(dimension.name.rpartition(".")[0])


def _numbers(flags: Tensor) -> tuple[int, ...]:
    return tuple(flags.nonzero().flatten().tolist())


def _others(n: int, some: Sequence[int]) -> tuple[int, ...]:
    """The numbers below n that are not among some."""
    return tuple(sorted(set(range(n)) - set(some)))


def _by_axis(units: Sequence[Unit]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for unit in units:
        found[unit.axis] = (*found.get(unit.axis, ()), unit.number)
    return {label: tuple(sorted(numbers)) for label, numbers in found.items()}


# ---- what stands in the way ------------------------------------------------------------------------------------


def _check_some_left(axis: ChannelAxis, zero: Sequence[int]) -> None:
    if len(zero) == axis.units:
        raise ExportError(
            f"all {axis.units} channels of {axis.label!r} are zero: nothing would be left of it. Lower the strength of "
            "the regularizer, or let it keep some: GroupLasso(least=1)"
        )


def _constants(influence: Influence, units: Sequence[Unit]) -> dict[Unit, Reading | None]:
    """Those of the channels that are a constant, with what is read of them; others depend on the input."""
    found = influence.readings(units)
    return {unit: reading for unit, reading in found.items() if reading is None or reading.constant}


def _refusal(pit: PIT, constants: Mapping[Unit, Reading | None], difference: float) -> str:
    named = [_described(pit, unit, reading) for unit, reading in list(constants.items())[:_NAMED]]
    more = f", and {len(constants) - _NAMED} more" if len(constants) > _NAMED else ""
    return (
        f"channels with zero weights that are not zero: {'; '.join(named)}{more}. Without them the outputs could "
        f"change by {difference:.2g} (relative; allowed is {TOLERANCE:g}). Put biases and norms into the groups "
        "(GroupLasso(coupled_channels(model, ...))), set them to zero too, or leave such channels in: constant='keep'"
    )


def _described(pit: PIT, unit: Unit, reading: Reading | None) -> str:
    axis = next(axis for axis in pit.space.channels if axis.label == unit.axis)
    path = unit.axis.partition(":")[0]
    own = [indices for d, indices in axis.dimensions.items() if d.name.startswith(f"{path}.")]
    channel = int((own or list(axis.dimensions.values()))[0][unit.number][0])
    value = "a constant" if reading is None else f"{reading.value:.4g} where {reading.reader!r} reads it"
    return f"channel {channel} of {path!r} is {value}"
