"""Parameters that become shorter in place, with the state of their optimizers; all of it can be put back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ConfigurationError

__all__ = ["Changes", "Slice", "check_states", "cut_tensor", "forget_parameters", "take_slice"]

Slice = Mapping[int, Tensor]
"""Dimension -> the indices of it that stay."""


@final
class Changes:
    """What was written over, in its order.

    >>> layer, changes = nn.Linear(2, 3), Changes()
    >>> changes.set(layer, "out_features", 2)
    >>> changes.undo()
    >>> layer.out_features
    3
    """

    def __init__(self) -> None:
        self._back: list[Callable[[], None]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """``owner.name = value``."""
        self._back.append(partial(setattr, owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def set_item(self, owner: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """``owner[key] = value`` for a key that is there."""
        self._back.append(partial(owner.__setitem__, key, owner[key]))
        owner[key] = value

    def replace_items(self, owner: Any, items: Any) -> None:
        """Other contents of a mutable list or mapping, which stays the same object."""
        self._back.append(partial(_refill, owner, owner.copy()))
        _refill(owner, items)

    def set_data(self, tensor: Tensor, data: Tensor) -> None:
        """Other numbers, and perhaps another shape, of the same parameter or buffer."""
        self._back.append(partial(_set_data, tensor, tensor.data))
        _set_data(tensor, data)

    def undo(self) -> None:
        """Put everything back as it was at first."""
        while self._back:
            self._back.pop()()


def _refill(owner: Any, items: Any) -> None:
    owner.clear()
    if isinstance(owner, list):
        owner.extend(items)
    else:
        owner.update(items)


def _set_data(tensor: Tensor, data: Tensor) -> None:
    if tensor.shape != data.shape:
        # What collects the gradients of a parameter knows its shape, and is made anew where the type changes only.
        other = torch.float16 if tensor.dtype != torch.float16 else torch.float32
        tensor.data = torch.empty(0, dtype=other, device=data.device)
    tensor.data = data


def take_slice(tensor: Tensor, kept: Slice) -> Tensor:
    """A copy with the ``kept`` indices only, contiguous.

    >>> take_slice(torch.arange(6).view(2, 3), {1: torch.tensor([0, 2])}).tolist()
    [[0, 2], [3, 5]]
    """
    small = tensor.detach()
    for dim, indices in kept.items():
        small = small.index_select(dim, indices.to(small.device))
    return small.contiguous()


def check_states(optimizers: Sequence[Optimizer], parameters: Sequence[Tensor]) -> None:
    """ConfigurationError for an optimizer with state of these parameters that has no element for each of theirs."""
    cut = {id(parameter) for parameter in parameters}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if not _is_known(value, parameter, id(parameter) in cut):
                    what = (
                        f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
                    )
                    raise ConfigurationError(
                        f"{type(optimizer).__name__} keeps {name!r} of {what} for a parameter of shape "
                        f"{tuple(parameter.shape)}: nothing can be taken out of it. Take an optimizer whose state has "
                        "the shape of the parameter (SGD, Adam, AdamW, RMSprop), or do not make the network smaller"
                    )


def _is_known(value: Any, parameter: Tensor, is_cut: bool) -> bool:
    if isinstance(value, Tensor):
        # What is of all parameters together lies somewhere, in LBFGS at the first one.
        return (
            value.shape == parameter.shape or value.numel() == 1 or (not is_cut and value.numel() < parameter.numel())
        )
    return value is None or isinstance(value, bool | int | float | str)


def cut_tensor(changes: Changes, tensor: Tensor, kept: Slice, optimizers: Sequence[Optimizer]) -> None:
    """A parameter or buffer, its gradient, and what optimizers keep of it: all lose the same indices."""
    shape, gradient = tensor.shape, tensor.grad
    if gradient is not None:
        changes.set(tensor, "grad", None)
    changes.set_data(tensor, take_slice(tensor, kept))
    if gradient is not None:
        changes.set(tensor, "grad", take_slice(gradient, kept))
    for optimizer in optimizers:
        state = optimizer.state.get(tensor, {})
        for name, value in list(state.items()):
            if isinstance(value, Tensor) and value.shape == shape:
                changes.set_item(state, name, take_slice(value, kept))


def forget_parameters(changes: Changes, parameters: Sequence[nn.Parameter], optimizers: Sequence[Optimizer]) -> None:
    """Optimizers without these parameters: neither in a group, nor state of them."""
    gone = {id(parameter) for parameter in parameters}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            left = [parameter for parameter in group["params"] if id(parameter) not in gone]
            if len(left) < len(group["params"]):
                changes.replace_items(group["params"], left)
        states = {key: state for key, state in optimizer.state.items() if id(key) not in gone}
        if len(states) < len(optimizer.state):
            changes.replace_items(optimizer.state, states)
