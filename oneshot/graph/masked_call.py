"""A network with some of its parameters multiplied by masks, for one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from .dimensions import Dimension

__all__ = ["masked_call", "names_of_parameters"]


def names_of_parameters(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The first name of each parameter and buffer -> all its names: several of a tied weight, or a shared module."""
    names: dict[int, list[str]] = {}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, parameter in named:
        names.setdefault(id(parameter), []).append(name)
    return {all_names[0]: tuple(all_names) for all_names in names.values()}


def masked_call(
    model: nn.Module,
    factors: Mapping[Dimension, Tensor],
    names: Mapping[str, tuple[str, ...]],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """``model(*args, **kwargs)`` with each weight of ``factors`` times a vector along a dimension of it.

    ``factors``: dimension -> shape (n,). The model itself is not changed; its buffers are, as in any call of it.
    """
    masked: dict[str, Tensor] = {}
    for dimension, factor in factors.items():
        before = masked.get(dimension.name)
        weight = _tensor(model, dimension.name) if before is None else before
        shape = [1] * weight.dim()
        shape[dimension.dim] = -1
        masked[dimension.name] = weight * factor.to(weight.dtype).reshape(shape)
    replaced = {alias: weight for name, weight in masked.items() for alias in _places(model, names[name])}
    return functional_call(model, replaced, tuple(args), dict(kwargs or {}), tie_weights=False)


def _places(model: nn.Module, aliases: Sequence[str]) -> list[str]:
    """One of the names for each place: a module that stands at two paths would be put back as it was in between."""
    found: dict[tuple[int, str], str] = {}
    for alias in aliases:
        path, _, leaf = alias.rpartition(".")
        found.setdefault((id(model.get_submodule(path)), leaf), alias)
    return list(found.values())


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), leaf)
    return tensor
