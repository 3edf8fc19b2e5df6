"""Groups by their meaning in a layer: channels, kernels, rows, blocks, heads, or an index of the user's own."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import TypeAlias, cast, final

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from .groups import Family, check_family, check_index
from .patterns import as_patterns, matching, spellings, weights_of

__all__ = ["GROUPINGS", "Grouping", "Groups", "blocks", "families", "strided"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


@final
@dataclass(frozen=True)
class Grouping:
    """What a group is in a layer. name: in words. index: layer -> its parameter -> index as in ``Family``; {} if the
    layer has no such groups."""

    name: str
    index: Callable[[nn.Module], dict[str, Tensor]]


Groups: TypeAlias = "str | Grouping | Callable[[str, Tensor], Tensor | None] | Family | Sequence[Family]"


def families(model: nn.Module, groups: Groups, patterns: str | Iterable[str] | None = None) -> list[Family]:
    """The groups of a model: one family per layer, or, of a function of the user's own, one per parameter.

    ``groups``: a name of ``GROUPINGS``, ``blocks(...)``, ``strided(...)``, families, or a function
    ``(name, parameter) -> index or None``: int64, broadcastable to the parameter, groups numbered in any way, -1 for
    no group. ``patterns`` choose among the layers, by the names of their modules or parameters; ``"features"`` means
    all that is in that module. A shared parameter is there once. ConfigurationError for an unknown name, a pattern that
    fits nothing, and groups that no layer has.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))
    >>> [(family.name, family.n) for family in families(net, "output_channels")]
    [('0.weight: output channels', 8), ('1.weight: output channels', 4)]
    """
    parameters = weights_of(model)
    chosen = as_patterns("groups", patterns)
    if isinstance(groups, Family) or not (isinstance(groups, str | Grouping) or callable(groups)):
        if chosen is not None:
            raise ConfigurationError(f"patterns={patterns!r}: families say themselves what is in them; leave it out")
        return _given(groups, parameters)
    if isinstance(groups, str | Grouping):
        grouping = _named(groups) if isinstance(groups, str) else groups
        found, what = _of_layers(model, grouping), grouping.name
    else:
        found = [own for name, p in parameters.items() if (own := _own(groups, name, p)) is not None]
        what = getattr(groups, "__name__", type(groups).__name__)
    if not found:
        raise ConfigurationError(f"groups: no layer of this {type(model).__name__} has {what}")
    names = spellings(model)
    kept = matching(f"groups of {what}", chosen, {f.name: [n for key in f.index for n in names[key]] for f in found})
    return [family for family in found if family.name in kept]


def blocks(*shape: int | Sequence[int]) -> Grouping:
    """Blocks of the weights of convolutions and linear layers: ``blocks(out, in)``, a kernel being one entry, or a
    length for each dimension, ``blocks(out, in, height, width)``, then of layers with as many dimensions only.

    Blocks at the end of a dimension may be smaller. ``in`` of a grouped convolution counts within its group of rows, as
    its weight is stored.

    >>> [family.n for family in families(nn.Linear(10, 6), blocks(4, 4))]  # 2 x 3, the last ones smaller
    [6]
    """
    lengths: list[int] = []
    for length in shape:
        lengths += list(length) if isinstance(length, Sequence) else [length]
    if len(lengths) < 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in lengths):
        raise ConfigurationError(f"blocks{shape}: two or more lengths of at least 1 are needed: out, in")
    return Grouping(f"blocks of {' x '.join(map(str, lengths))}", partial(_blocks, tuple(lengths)))


def strided(stride: int | Sequence[int]) -> Grouping:
    """Positions of a kernel at a stride, shared by all kernels of a layer (Anwar, Hwang, Sung 2015, section 3).

    ``stride`` s: the positions, numbered row by row, with the same remainder modulo s are a group; the offset of the
    paper is the group's number. One stride per axis: those with the same remainder along every axis. All kernels of a
    layer then have their zeros at the same places, so the matrix product of a lowered convolution loses whole rows.
    Layers whose kernel is one position have none.

    >>> [family.n for family in families(nn.Conv2d(3, 8, 3), strided(2))]  # {0, 2, 4, 6, 8} and {1, 3, 5, 7}
    [2]
    """
    strides = [stride] if isinstance(stride, int) else list(stride)
    if not strides or not all(isinstance(s, int) and not isinstance(s, bool) and s >= 1 for s in strides):
        raise ConfigurationError(f"strided({stride!r}): a stride of at least 1, or one per axis, is needed")
    every = " x ".join(map(str, strides))
    return Grouping(f"positions at stride {every}", partial(_strided, stride if isinstance(stride, int) else strides))


def _first(size: int, layer: nn.Module) -> Tensor:
    """The index that numbers the first dimension of the weight."""
    return torch.arange(size).view(size, *[1] * (_weight(layer).dim() - 1))


def _second(layer: nn.Module) -> Tensor:
    """The index that numbers the channels of the second dimension, those of each group of a grouped convolution anew.

    Its first dimension is cut into ``groups`` parts; part g meets the channels g * size, ..., g * size + size - 1.
    """
    weight, groups = _weight(layer), getattr(layer, "groups", 1)
    size, rest = weight.shape[1], [1] * (weight.dim() - 2)
    if groups == 1:
        return torch.arange(size).view(1, size, *rest)
    part = torch.arange(weight.shape[0]) // (weight.shape[0] // groups)
    return (part[:, None] * size + torch.arange(size)).view(weight.shape[0], size, *rest)


def _output_channels(layer: nn.Module) -> dict[str, Tensor]:
    if not isinstance(layer, _CONVOLUTIONS):
        return {}
    return {"weight": _second(layer) if isinstance(layer, _TRANSPOSED) else _first(len(_weight(layer)), layer)}


def _input_channels(layer: nn.Module) -> dict[str, Tensor]:
    if not isinstance(layer, _CONVOLUTIONS):
        return {}
    return {"weight": _first(len(_weight(layer)), layer) if isinstance(layer, _TRANSPOSED) else _second(layer)}


def _kernels(layer: nn.Module) -> dict[str, Tensor]:
    if not isinstance(layer, _CONVOLUTIONS):
        return {}
    a, b, *positions = _weight(layer).shape
    return {"weight": torch.arange(a * b).view(a, b, *[1] * len(positions))}


def _rows(layer: nn.Module) -> dict[str, Tensor]:
    return {"weight": _first(len(_weight(layer)), layer)} if isinstance(layer, nn.Linear) else {}


def _columns(layer: nn.Module) -> dict[str, Tensor]:
    return {"weight": _second(layer)} if isinstance(layer, nn.Linear) else {}


def _layer(layer: nn.Module) -> dict[str, Tensor]:
    weight = _weight(layer) if isinstance(layer, (*_CONVOLUTIONS, nn.Linear)) else None
    return {} if weight is None else {"weight": torch.zeros([1] * weight.dim(), dtype=torch.int64)}


def _elements(layer: nn.Module) -> dict[str, Tensor]:
    weight = _weight(layer) if isinstance(layer, (*_CONVOLUTIONS, nn.Linear)) else None
    return {} if weight is None else {"weight": torch.arange(weight.numel()).view(weight.shape)}


def _heads(layer: nn.Module) -> dict[str, Tensor]:
    """A head owns rows of the projections of q, k and v with their biases, and columns of the output projection."""
    if not isinstance(layer, nn.MultiheadAttention):
        return {}
    head = torch.arange(layer.embed_dim) // layer.head_dim
    each = {
        "in_proj_weight": head.repeat(3)[:, None],
        "q_proj_weight": head[:, None],
        "k_proj_weight": head[:, None],
        "v_proj_weight": head[:, None],
        "in_proj_bias": head.repeat(3),
        "bias_k": head,
        "bias_v": head,
        "out_proj.weight": head[None],
    }
    return {name: index for name, index in each.items() if attrgetter(name)(layer) is not None}


def _blocks(lengths: tuple[int, ...], layer: nn.Module) -> dict[str, Tensor]:
    if not isinstance(layer, (*_CONVOLUTIONS, nn.Linear)):
        return {}
    shape = _weight(layer).shape
    if len(lengths) not in (2, len(shape)):
        return {}
    each = [*lengths, *[0] * (len(shape) - len(lengths))]
    if isinstance(layer, _TRANSPOSED):
        each[:2] = each[1], each[0]
    index = torch.zeros([1] * len(shape), dtype=torch.int64)
    for d, (size, length) in enumerate(zip(shape, each, strict=True)):
        if length:
            places = (torch.arange(size) // length).view([-1 if i == d else 1 for i in range(len(shape))])
            index = index * math.ceil(size / length) + places
    return {"weight": index}


def _strided(stride: int | Sequence[int], layer: nn.Module) -> dict[str, Tensor]:
    if not isinstance(layer, _CONVOLUTIONS):
        return {}
    sizes = _weight(layer).shape[2:]
    if math.prod(sizes) == 1 or not (isinstance(stride, int) or len(stride) == len(sizes)):
        return {}
    if isinstance(stride, int):
        return {"weight": (torch.arange(math.prod(sizes)) % stride).view(1, 1, *sizes)}
    index = torch.zeros([1] * len(sizes), dtype=torch.int64)
    for d, (size, step) in enumerate(zip(sizes, stride, strict=True)):
        places = (torch.arange(size) % step).view([-1 if i == d else 1 for i in range(len(sizes))])
        index = index * min(step, size) + places
    return {"weight": index[None, None]}


GROUPINGS = {
    "output_channels": Grouping("output channels", _output_channels),
    "input_channels": Grouping("input channels", _input_channels),
    "kernels": Grouping("kernels", _kernels),
    "rows": Grouping("rows", _rows),
    "out_features": Grouping("rows", _rows),
    "columns": Grouping("columns", _columns),
    "in_features": Grouping("columns", _columns),
    "layer": Grouping("layer", _layer),
    "elements": Grouping("elements", _elements),
    "heads": Grouping("heads", _heads),
}
"""Name -> what a group is. Of weights only: a bias, or the BatchNorm behind, is not in the group of a channel.

``output_channels``, ``input_channels``, ``kernels`` (out x in of them): convolutions, transposed ones too. An input
channel of a grouped convolution feeds the rows of its own group only; a depthwise one has as many as it has groups.
``rows`` = ``out_features``, ``columns`` = ``in_features``: linear layers. ``layer`` (the whole weight), ``elements``
(each number): both kinds. ``heads``: ``nn.MultiheadAttention``.
"""


def _weight(layer: nn.Module) -> Tensor:
    return cast(Tensor, layer.weight)


def _named(name: str) -> Grouping:
    if name not in GROUPINGS:
        near = difflib.get_close_matches(name, GROUPINGS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigurationError(f"groups={name!r}: known are {', '.join(GROUPINGS)}, blocks(...), strided(...){hint}")
    return GROUPINGS[name]


def _of_layers(model: nn.Module, grouping: Grouping) -> list[Family]:
    """One family per layer that has such groups; a layer with another's weight adds nothing."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    taken: dict[str, Tensor] = {}
    found = []
    for path, layer in model.named_modules():
        index: dict[str, Tensor] = {}
        for attribute, of_it in grouping.index(layer).items():
            where = f"{path}.{attribute}" if path else attribute
            name = names.get(id(attrgetter(attribute)(layer)))
            if name is None:
                raise ConfigurationError(
                    f"groups of {grouping.name}: {where} is computed from other parameters (a parametrization?), so no "
                    f"step can set it to zero; give the groups of those parameters as a function"
                )
            if name in taken and not torch.equal(taken[name], of_it):
                raise ConfigurationError(
                    f"groups of {grouping.name}: {where} is the same parameter as {name}, but its groups are others "
                    f"there; give them as a function"
                )
            if name not in taken:
                taken[name] = index[name] = of_it
        if index:
            title = next(iter(index)) if len(index) == 1 else path or type(layer).__name__
            found.append(Family(f"{title}: {grouping.name}", index, 1 + max(int(i.max()) for i in index.values())))
    return found


def _own(function: Callable[[str, Tensor], Tensor | None], name: str, parameter: Tensor) -> Family | None:
    """The family that a function of the user's own makes of a parameter, numbered without gaps."""
    index = function(name, parameter)
    if index is None:
        return None
    title = getattr(function, "__name__", type(function).__name__)
    check_index(f"groups by {title}", name, index, parameter)
    if int(index.max()) < 0:
        raise ConfigurationError(f"groups by {title}: no element of {name} is in a group; return None for such a one")
    numbers = index[index >= 0].unique()
    places = torch.searchsorted(numbers, index.clamp_min(int(numbers[0])).contiguous())
    return Family(f"{name}: {title}", {name: torch.where(index < 0, index, places)}, len(numbers))


def _given(groups: object, parameters: dict[str, nn.Parameter]) -> list[Family]:
    found = [groups] if isinstance(groups, Family) else list(groups) if isinstance(groups, Sequence) else []
    if not found or not all(isinstance(family, Family) for family in found):
        raise ConfigurationError(
            f"groups={groups!r}: a name ({', '.join(GROUPINGS)}), blocks(...), strided(...), a function, or families "
            f"are needed"
        )
    names = [family.name for family in found]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigurationError(f"groups: two families are called {twice!r}; names are what reports tell them by")
    for family in found:
        check_family(family, parameters)
    return found
