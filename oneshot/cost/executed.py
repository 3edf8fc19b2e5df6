"""What a module executes: its operators with their shapes. Two modules that execute the same take the same time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["executed_operators", "operators_key"]


def executed_operators(
    module: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> list[str]:
    """One run as text: a line for the inputs, then one per operator of torch, with shapes, dtypes and arguments.

    Tensors are ``dtype[shape]``, with their strides where they are not contiguous (channels last, say).

    >>> from torch import nn
    >>> for line in executed_operators(nn.Sequential(nn.ReLU(), nn.Tanh()), (torch.rand(1, 3),)):
    ...     print(line)
    input(float32[1, 3])
    aten.relu.default(float32[1, 3])
    aten.tanh.default(float32[1, 3])
    """
    kwargs = dict(kwargs or {})
    recorder = _Recorder()
    with torch.no_grad(), recorder:
        module(*args, **kwargs)
    return [f"input({_arguments(args, kwargs)})", *recorder.lines]


def operators_key(lines: Sequence[str]) -> str:
    """The sha256 of the lines, in hexadecimal."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _Recorder(TorchDispatchMode):
    """Notes every operator that runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.lines.append(f"{func}({_arguments(args, kwargs or {})})")
        return func(*args, **(kwargs or {}))


def _arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    return ", ".join([*map(_shown, args), *(f"{name}={_shown(value)}" for name, value in kwargs.items())])


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        strides = "" if value.is_contiguous() else f" strides {list(value.stride())}"
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{strides}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_shown(item)}' for key, item in value.items())}}}"
    plain = value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device | torch.layout)
    if plain or isinstance(value, torch.memory_format):
        return repr(value)
    # What else there is (a generator, an object of the user's) shows its address, which every process has anew.
    leaves = [] if pytree.tree_is_leaf(value) else pytree.tree_leaves(value)
    return f"{type(value).__name__}({', '.join(map(_shown, leaves))})"
