"""PIT over random networks: whatever the masks keep, the export computes it and has the size that was reported."""

from __future__ import annotations

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pit_networks import same, scatter
from random_networks import RandomNetwork, random_networks
from torch import Tensor, nn

from oneshot.errors import UnsupportedModelError
from oneshot.pit import PIT

EXAMPLES, SEARCHABLE = 300, 0.8
NOTHING = "has nothing to search"


def test_exports_of_random_networks() -> None:
    """In 4 of 5 networks at least there is something to search; in the others that is an error that says so."""
    searchable: list[bool] = []

    @settings(max_examples=EXAMPLES, derandomize=True, database=None, deadline=None)
    @given(random_networks(), st.integers(0, 2**31 - 1))
    def check(network: RandomNetwork, seed: int) -> None:
        searchable.append(exports_equal(network, seed))

    check()
    assert len(searchable) >= EXAMPLES
    assert sum(searchable) >= SEARCHABLE * len(searchable)


@torch.no_grad()
def exports_equal(network: RandomNetwork, seed: int) -> bool:
    """Convert, prune at random, export and compare in float64; False where nothing can be searched."""
    model = copy.deepcopy(network.model).double()
    inputs = wide(network.inputs)
    try:
        pit = PIT(model, example_input=inputs, cost="params")
    except UnsupportedModelError as error:
        if NOTHING not in str(error):
            raise
        return False
    equal(model, pit, inputs)
    scatter(pit, seed)
    small = pit.export()
    for args in (inputs, tuple(torch.randn_like(x) for x in inputs)):
        equal(pit, small, args)
    assert pit.get_cost("params").item() == sum(p.numel() for p in small.parameters())
    return True


def wide(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() for x in inputs)


def equal(one: nn.Module, other: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    same(one(*copy.deepcopy(inputs)), other(*copy.deepcopy(inputs)), 1e-9)
