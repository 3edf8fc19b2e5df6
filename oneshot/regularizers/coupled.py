"""Groups of a network's coupled channels: all that makes a channel, or all that reads it, in every layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..graph.dimensions import Dimension
from ..graph.masked_call import names_of_parameters
from ..pit import PIT
from ..pit.axes import ChannelAxis
from .groups import Family

__all__ = ["coupled_channels", "coupled_inputs"]

Excluded = str | type[nn.Module] | Sequence[str | type[nn.Module]]


def coupled_channels(
    model: nn.Module, input_shape: tuple[Any, ...] | None = None, *, example_input: Any = None, exclude: Excluded = ()
) -> list[Family]:
    """One family for each channel axis, with one group for each channel: every parameter that makes it.

    A group holds the channel's filter in every layer that is added into it (residual sums), the biases, the weights
    and biases of norms, and depthwise filters. Where it is zero, the channel is zero behind all of these, and
    ``remove_zero_channels`` can take it out. A group of a filter alone is not enough: a bias or a norm makes a constant
    of zero, and before a BatchNorm the filter's length means nothing, so that no penalty on it ends at zero.

    What belongs together is found by following the operators that run, and confirmed by a trial cut, as in ``PIT``.
    Heads of attention are an axis of their own. Outputs of the network, and what cannot be cut for another reason, are
    in no group; nor are parameters that do not learn (``requires_grad=False``), nor buffers.

    Args:
        model: the network, which stays as it is.
        input_shape: of one sample, without the batch; or ``example_input``: a tensor, or a tuple of all arguments.
        exclude: layers whose channels are left alone, with all that is coupled to them: paths, patterns, types.

    Raises ConfigurationError without a shape, or for an entry of ``exclude`` that fits nothing; UnsupportedModelError
    for a model that does not run on the input, or of which no channel can be cut: with the reasons.

    >>> conv, norm = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
    >>> net = nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    >>> (family,) = coupled_channels(net, (1, 4, 4))
    >>> family.name, family.n, list(family.index)  # groups of 9 + 1 + 1 elements
    ('0', 4, ['0.weight', '1.weight', '1.bias'])
    >>> family.index["0.weight"].flatten().tolist()
    [0, 1, 2, 3]
    """
    return _families(model, input_shape, example_input, exclude, _made_by, "")


def coupled_inputs(
    model: nn.Module, input_shape: tuple[Any, ...] | None = None, *, example_input: Any = None, exclude: Excluded = ()
) -> list[Family]:
    """One family for each channel axis, with one group for each channel: every weight that reads it.

    The input channels of all layers behind it, taken together. Where they are zero, nothing depends on the channel,
    whatever it is, a constant too; ``remove_zero_channels`` can take it out. Arguments and errors are those of
    ``coupled_channels``.

    >>> conv, norm = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
    >>> net = nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    >>> (family,) = coupled_inputs(net, (1, 4, 4))
    >>> family.index["4.weight"].shape, family.index["4.weight"][0].tolist()  # 2 x 2 pixels of each channel
    (torch.Size([1, 16]), [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3])
    """
    return _families(model, input_shape, example_input, exclude, _read_by, ": inputs")


def _families(
    model: nn.Module,
    input_shape: tuple[Any, ...] | None,
    example_input: Any,
    exclude: Excluded,
    members: Callable[[ChannelAxis, nn.Module], list[Dimension]],
    suffix: str,
) -> list[Family]:
    pit = PIT(model, input_shape, example_input=example_input, exclude=exclude)
    ours = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = _names(model, pit.network)
    found, reasons = [], [f"{dimension}: {why}" for dimension, why in pit.space.frozen.items()]
    for axis in pit.space.channels:
        dimensions = [d for d in members(axis, pit.network) if names[d.name] in ours]
        index: dict[str, Tensor] | None = {}
        for dimension in dimensions:
            name = names[dimension.name]
            shape = ours[name].shape
            index = _with(index, name, _numbers(axis, dimension, shape))
        if index:
            found.append(Family(f"{axis.label}{suffix}", index, axis.units))
        elif index is None:
            reasons.append(f"{axis.label}: a parameter has elements of two of its channels")
        else:
            reasons.append(f"{axis.label}: none of its parameters learns")
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no channels that could be removed: {'; '.join(reasons[:5])}"
        )
    return found


def _made_by(axis: ChannelAxis, network: nn.Module) -> list[Dimension]:
    """The dimensions of parameters that make the channels of an axis."""
    dims = {name: parameter.dim() for name, parameter in network.named_parameters()}
    every = [d for d in axis.dimensions if d.name in dims]
    makers = [d for d in every if d not in axis.group.columns]
    # A tied weight both makes and reads its channels, and is a column then.
    return makers if any(dims[d.name] > 1 for d in makers) else every


def _read_by(axis: ChannelAxis, network: nn.Module) -> list[Dimension]:
    """The dimensions of parameters that are summed over."""
    names = {name for name, _ in network.named_parameters()}
    return [d for d in axis.dimensions if d in axis.group.columns and d.name in names]


def _names(model: nn.Module, network: nn.Module) -> dict[str, str]:
    """Name of each parameter of PIT's copy -> its name in ``model.named_parameters()``.

    The copy may be a graph, which goes through the modules in another order: of a tied weight it may say another name.
    """
    first = {alias: name for name, aliases in names_of_parameters(model).items() for alias in aliases}
    return {name: first[name] for name, _ in network.named_parameters()}


def _numbers(axis: ChannelAxis, dimension: Dimension, shape: Sequence[int]) -> Tensor:
    """The number of the channel of each index of a dimension, -1 for none, of shape (1, ..., n, ..., 1)."""
    numbers = torch.full((shape[dimension.dim],), -1, dtype=torch.int64)
    units = torch.arange(axis.units)[:, None].expand_as(axis.dimensions[dimension])
    numbers[axis.dimensions[dimension].flatten()] = units.flatten()
    return numbers.reshape([-1 if d == dimension.dim else 1 for d in range(len(shape))])


def _with(index: Mapping[str, Tensor] | None, name: str, numbers: Tensor) -> dict[str, Tensor] | None:
    """The index with one more dimension of a parameter; None if an element would be in two groups."""
    if index is None:
        return None
    before = index.get(name)
    if before is not None:
        if bool(((before >= 0) & (numbers >= 0) & (before != numbers)).any()):
            return None
        numbers = torch.maximum(before, numbers)
    return {**index, name: numbers}
