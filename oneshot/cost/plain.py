"""A search model without its choices, to be run and timed: the weights are shared, nothing is copied."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..mutables import LayerChoice, Mutable, Repeat

__all__ = ["Row", "without_choices"]


class Row(nn.Module):
    """Blocks one after the other, called as a Repeat is."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return x


def without_choices(module: nn.Module, options: Mapping[int, int]) -> nn.Module:
    """A module in which each open LayerChoice is its candidate, and each Repeat its row of blocks.

    ``options``: the option of each mutable by its id. A choice that is reached otherwise than as a child (from a list,
    say) stays, so it must be pinned to the same option. Deciding takes time in torch, which an exported network does
    not need. The result shares all weights with ``module`` and is only good for running it.

    >>> choice = LayerChoice({"conv": nn.Conv1d(1, 1, 3), "skip": nn.Identity()})
    >>> without_choices(nn.Sequential(choice, nn.ReLU()), {id(choice): 1})
    Sequential(
      (0): Identity()
      (1): ReLU()
    )
    """
    return _plain(module, options, {})


def _plain(module: nn.Module, options: Mapping[int, int], done: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in done:
        done[id(module)] = _new(module, options, done)
    return done[id(module)]


def _new(module: nn.Module, options: Mapping[int, int], done: dict[int, nn.Module]) -> nn.Module:
    is_open = isinstance(module, Mutable) and module.decided is None
    if is_open and isinstance(module, LayerChoice):
        return _plain(list(module)[options[id(module)]], options, done)
    if is_open and isinstance(module, Repeat):
        depth = module.options[options[id(module)]]
        row = Row([_plain(block, options, done) for block in module.blocks[:depth]])
        row.training = module.training
        return row
    if not any(isinstance(inner, LayerChoice | Repeat) for inner in module.modules()):
        return module
    view = copy.copy(module)
    view._modules = {
        name: None if child is None else _plain(child, options, done) for name, child in module._modules.items()
    }
    return view
