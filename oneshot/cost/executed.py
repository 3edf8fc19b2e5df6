"""What a module executes: its operators with their shapes. Two modules that execute the same take the same time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["executed_operators", "operators_key"]


def executed_operators(
    module: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> list[str]:
    """One run as text: a line for the inputs, then one per operator of torch, with its arguments and its results.

    A tensor is ``%number dtype[shape] strides``, numbered in the order of appearance, so that the lines also say which
    result goes where: a runtime that computes graphs may leave out, or compute once, what does not depend on inputs.

    >>> from torch import nn
    >>> for line in executed_operators(nn.Sequential(nn.ReLU(), nn.Tanh()), (torch.rand(1, 3),)):
    ...     print(line)
    input(%0 float32[1, 3] (3, 1))
    aten.relu.default(%0 float32[1, 3] (3, 1)) -> %1 float32[1, 3] (3, 1)
    aten.tanh.default(%1 float32[1, 3] (3, 1)) -> %2 float32[1, 3] (3, 1)
    """
    kwargs = dict(kwargs or {})
    recorder = _Recorder()
    first = f"input({recorder.arguments(args, kwargs)})"
    with torch.no_grad(), recorder:
        module(*args, **kwargs)
    return [first, *recorder.lines]


def operators_key(lines: Sequence[str]) -> str:
    """The sha256 of the lines, in hexadecimal."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _Recorder(TorchDispatchMode):
    """Notes every operator that runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.numbers = WeakTensorKeyDictionary()
        self.n_tensors = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        line = f"{func}({self.arguments(args, kwargs or {})})"
        result = func(*args, **(kwargs or {}))
        self.lines.append(f"{line} -> {self.shown(result)}")
        return result

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        return ", ".join([*map(self.shown, args), *(f"{name}={self.shown(value)}" for name, value in kwargs.items())])

    def shown(self, value: Any) -> str:
        if isinstance(value, Tensor):
            if value not in self.numbers:
                self.numbers[value] = self.n_tensors
                self.n_tensors += 1
            strides = tuple(value.stride()) if value.layout is torch.strided else value.layout
            return f"%{self.numbers[value]} {str(value.dtype).removeprefix('torch.')}{list(value.shape)} {strides}"
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(self.shown, value))}]"
        if isinstance(value, Mapping):
            return f"{{{', '.join(f'{key}: {self.shown(item)}' for key, item in value.items())}}}"
        plain = value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device | torch.layout)
        if plain or isinstance(value, torch.memory_format):
            return repr(value)
        # What else there is (a generator, an object of the user's) shows its address, which every process has anew.
        leaves = [] if pytree.tree_is_leaf(value) else pytree.tree_leaves(value)
        return f"{type(value).__name__}({', '.join(map(self.shown, leaves))})"
