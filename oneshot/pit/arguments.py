"""The arguments of searched networks: an example input, and costs by name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..cost.counts import COUNTED
from ..cost.spec import CostSpec
from ..errors import ConfigurationError, InputTypeError
from ..mutables.base import Mutable, SearchModel

__all__ = ["CostArgument", "check_model", "cost_argument", "example_of", "named_costs"]

CostArgument = str | CostSpec | Sequence[str | CostSpec] | Mapping[str, str | CostSpec]
_REGULARIZERS = {"size": "params_no_bias", "macs": "macs"}


def check_model(model: nn.Module, name: str) -> None:
    """An error for what ``name``, PIT or SuperNet, cannot make a network of."""
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"{name}: a torch.nn.Module is needed, got {type(model).__name__}")
    if isinstance(model, SearchModel):
        raise ConfigurationError(f"{name}: this network is one already; give the plain network it was made of")
    for path, module in model.named_modules():
        if isinstance(module, Mutable) and module.decided is not None:
            raise ConfigurationError(
                f"{name}: {path or 'the network'} was decided under fixed_arch; give it fixed(model), the plain network"
            )


def example_of(
    name: str, network: nn.Module, input_shape: tuple[Any, ...] | None, example_input: Any
) -> tuple[Any, ...]:
    """The inputs to follow the network with."""
    if example_input is not None:
        if input_shape is not None:
            warnings.warn(f"{name}: input_shape and example_input are both given; example_input is taken", stacklevel=4)
        given = tuple(example_input) if isinstance(example_input, tuple | list) else (example_input,)
        kept: tuple[Any, ...] = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), given)
        return kept
    if input_shape is None:
        raise ConfigurationError(f"{name}: the shape of an input is needed: input_shape=(3, 32, 32), without the batch")
    if not isinstance(input_shape, tuple):
        raise InputTypeError(
            f"{name}: input_shape={input_shape!r} is a {type(input_shape).__name__}; a tuple is needed"
        )
    shapes = input_shape if input_shape and all(isinstance(s, tuple) for s in input_shape) else (input_shape,)
    wrong = [n for shape in shapes for n in shape if not isinstance(n, int) or isinstance(n, bool) or n < 1]
    if wrong:
        raise ConfigurationError(f"{name}: input_shape={input_shape!r}: integers of at least 1 are needed, got {wrong}")
    parameter = next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, *shape, generator=generator).to(parameter) for shape in shapes)


def cost_argument(name: str, cost: CostArgument | None, regularizer: str | None) -> CostArgument | None:
    if regularizer is None:
        return cost
    if cost is not None:
        raise ConfigurationError(f"{name}: cost={cost!r} and regularizer={regularizer!r}: give one of them")
    if regularizer not in _REGULARIZERS:
        raise ConfigurationError(f"{name}: regularizer={regularizer!r}: allowed are {sorted(_REGULARIZERS)}")
    return _REGULARIZERS[regularizer]


def named_costs(name: str, cost: CostArgument | None) -> dict[str, str | CostSpec]:
    if cost is None:
        return {"params": "params"}
    if isinstance(cost, Mapping):
        named = dict(cost)
    elif not isinstance(cost, str | CostSpec | Sequence):
        raise InputTypeError(f"{name}: cost={cost!r}: a name, a CostSpec, several of them, or name -> one of them")
    else:
        several = [cost] if isinstance(cost, str | CostSpec) else list(cost)
        named = {one.name if isinstance(one, CostSpec) else one: one for one in several}
    for key, one in named.items():
        if not isinstance(one, CostSpec) and (not isinstance(one, str) or one not in COUNTED):
            raise ConfigurationError(f"cost {key!r}: {one!r} is none; allowed are {sorted(COUNTED)} and a CostSpec")
    return named
