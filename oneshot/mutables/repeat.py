"""Repeat: how many of a row of blocks are applied."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, final

from torch import Tensor, nn

from ..errors import ArchMismatchError, ConfigurationError
from .base import Mutable, unlabelled
from .gating import combine, unchanged

__all__ = ["Repeat"]


@final
class Repeat(Mutable):
    """The first d blocks of a row, min <= d <= max, decided by search.

    ``blocks``: a factory called with the index of each block (so that the choices inside are independent), or
    a list of ``max`` modules. Each block takes and returns one tensor; from block ``min`` on it must keep the
    shape, and leave its input as it is. The options are the depths; what they have in common is computed once.

    >>> import torch
    >>> class AddOne(nn.Module):
    ...     def forward(self, x: Tensor) -> Tensor:
    ...         return x + 1
    >>> Repeat(lambda i: AddOne(), depth=(3, 5))(torch.zeros(1)).item()  # uniform alpha: (3 + 4 + 5) / 3
    4.0
    """

    def __init__(
        self,
        blocks: Callable[[int], nn.Module] | Sequence[nn.Module],
        depth: tuple[int, int],
        label: str | None = None,
    ) -> None:
        low, high = _checked(depth, label)
        super().__init__(range(low, high + 1), label)
        self.depth = (low, high)
        self._decide()
        # All of them also where fewer are needed: the choices inside have to say that they know their labels.
        row = _build(blocks, high, label)
        needed = high if self.decided is None else low + self.decided
        self.blocks = nn.ModuleList(row[:needed])
        for i in range(needed, high):
            self.left_out.update(unlabelled(row[i], f"blocks.{i}"))

    def forward(self, x: Tensor) -> Tensor:
        low, _ = self.depth
        if self.decided is not None:
            for block in self.blocks:
                x = block(x)
            return x
        prefix, entering = [x], self.entering

        # The prefix belongs to this forward: the inputs handed in are x again, and need not be computed from.
        def evaluate(k: int, inputs: Sequence[Tensor]) -> Tensor:
            while len(prefix) <= low + k:
                i = len(prefix) - 1
                with unchanged(prefix[low:], partial(self._block, i)), entering(self.blocks[i]):
                    prefix.append(self.blocks[i](prefix[i]))
            return prefix[low + k]

        output: Tensor = combine(self.gate(), evaluate, [x], self._depth)
        return output

    def index_of(self, decision: Any, where: str) -> int:
        if isinstance(decision, int) and not isinstance(decision, bool) and decision in self.options:
            return self.options.index(decision)
        raise ArchMismatchError(
            f"{where}: the arch says depth {decision!r}, the depths are {list(self.options)}. "
            "Build the model with the arguments it was searched with"
        )

    def describe(self) -> str:
        return f"Repeat(label={self.label!r}, depth={self.depth})"

    def signature(self) -> tuple[Hashable, ...]:
        return ("Repeat", self.depth)

    def _block(self, i: int) -> str:
        return f"block {i} of {self.describe()}"

    def _depth(self, k: int) -> str:
        return f"depth {self.options[k]} of {self.describe()}"


def _checked(depth: tuple[int, int], label: str | None) -> tuple[int, int]:
    if isinstance(depth, tuple | list) and len(depth) == 2 and all(type(d) is int for d in depth):
        low, high = depth
        if 0 <= low <= high and high >= 1:
            return low, high
    raise ConfigurationError(
        f"Repeat(depth={depth!r}, label={label!r}): needed is (min, max) with 0 <= min <= max and max >= 1"
    )


def _build(blocks: Callable[[int], nn.Module] | Sequence[nn.Module], high: int, label: str | None) -> list[nn.Module]:
    if isinstance(blocks, nn.Module) and not isinstance(blocks, nn.ModuleList):
        raise ConfigurationError(
            f"Repeat(label={label!r}): a single {type(blocks).__name__} cannot be repeated, its copies would "
            "share everything; give a list of modules or a function of the index"
        )
    if callable(blocks) and not isinstance(blocks, nn.ModuleList):
        row = [blocks(i) for i in range(high)]
    else:
        row = list(blocks)
    if len(row) != high:
        raise ConfigurationError(
            f"Repeat(label={label!r}): {len(row)} blocks for a depth of at most {high}; they must be equal"
        )
    for i, block in enumerate(row):
        if not isinstance(block, nn.Module):
            raise ConfigurationError(f"Repeat(label={label!r}): block {i} is a {type(block).__name__}, not a module")
    return row
