"""Repeat against numbers worked out by hand, and counts of what ran."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from every_sampler import SAMPLERS
from torch import Tensor, nn

from oneshot import (
    BinaryGates,
    EveryPath,
    LayerChoice,
    OnePath,
    Repeat,
    Softmax,
    arch_parameters,
    decisions,
    draw,
    set_sampler,
)
from oneshot.errors import ConfigurationError, ShapeMismatchError, UnsupportedModelError
from oneshot.mutables import Sampler


class AddOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Times(nn.Module):
    """y = c x; counts its calls."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.factor


def add_one(index: int) -> nn.Module:
    return AddOne()


def pinned(repeat: Repeat, option: int) -> Repeat:
    set_sampler(repeat, OnePath(option))
    return repeat


def test_depths_three_to_five_of_add_one() -> None:
    for blocks in (add_one, [AddOne() for _ in range(5)], nn.ModuleList(AddOne() for _ in range(5))):
        repeat = Repeat(blocks, (3, 5))
        assert repeat.options == (3, 4, 5)
        assert [float(pinned(repeat, k)(torch.zeros(()))) for k in range(3)] == [3.0, 4.0, 5.0]


@torch.no_grad()
def test_the_factory_gets_the_index_and_the_first_blocks_are_taken() -> None:
    """Block i multiplies by i + 2: the depths return 2, 2 * 3 and 2 * 3 * 4 for x = 1."""
    repeat = Repeat(lambda i: Times(i + 2.0), (1, 3))
    assert [float(pinned(repeat, k)(torch.tensor(1.0))) for k in range(3)] == [2.0, 6.0, 24.0]
    set_sampler(repeat, Softmax())
    assert float(repeat(torch.tensor(1.0))) == pytest.approx((2 + 6 + 24) / 3)
    set_sampler(repeat, EveryPath())
    assert float(repeat(torch.tensor(1.0))) == 32.0


def test_alpha_gradient_by_hand() -> None:
    """Outputs (1, 2, 6) of depths (0, 1, 2), p = 1/3: dL/dalpha = p (o - mean) = (1 - 3, 2 - 3, 6 - 3) / 3."""
    for sampler in (Softmax(), BinaryGates("all")):
        for seed in range(4):
            repeat = Repeat([Times(2.0), Times(3.0)], (0, 2)).double()
            set_sampler(repeat, sampler)
            draw(repeat, torch.Generator().manual_seed(seed))
            repeat(torch.ones((), dtype=torch.float64)).backward()
            assert torch.allclose(repeat.alpha.grad, torch.tensor([-2 / 3, -1 / 3, 1.0], dtype=torch.float64))


def test_depth_zero_hands_the_input_on_but_not_its_memory() -> None:
    repeat = pinned(Repeat(add_one, (0, 2)), 0)
    x = torch.zeros(2)
    y = repeat(x)
    y += 7
    assert x.tolist() == [0.0, 0.0]
    assert y.tolist() == [7.0, 7.0]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_the_common_prefix_is_computed_once(sampler: Sampler) -> None:
    """Depths 2 to 5: in forward and backward together each block up to the deepest run depth runs once."""
    deepest_seen = set()
    for seed in range(6):
        repeat = Repeat([Times(1.5) for _ in range(5)], (2, 5))
        set_sampler(repeat, sampler)
        draw(repeat, torch.Generator().manual_seed(seed))
        gate = repeat.gate()
        y = repeat(torch.ones(3))
        assert [b.calls for b in repeat.blocks] == [int(i < 2 + max(gate.graph)) for i in range(5)]
        y.sum().backward()
        deepest = 2 + max(gate.run)
        assert [b.calls for b in repeat.blocks] == [int(i < deepest) for i in range(5)]
        learned = [b.factor.grad is not None for b in repeat.blocks]
        assert learned == [i < 2 + max(gate.graph) for i in range(5)]
        deepest_seen.add(deepest)
    if isinstance(sampler, BinaryGates) and sampler.paths != "all":
        assert len(deepest_seen) > 1


def choice(index: int) -> nn.Module:
    return LayerChoice([nn.Linear(2, 2), nn.Identity()])


def test_choices_inside_a_factory_are_independent() -> None:
    """Four decisions for a depth of 2 to 3; a list that holds one label three times is one decision more."""
    net = nn.Sequential(Repeat(choice, (2, 3)))
    assert list(decisions(net)) == ["0", "0.blocks.0", "0.blocks.1", "0.blocks.2"]
    assert len({id(p) for p in arch_parameters(net)}) == 4
    for k, option in enumerate((1, 1, 0, 1)):
        list(decisions(net).values())[k].set_sampler(OnePath(option))
    x = torch.randn(3, 2)
    assert torch.equal(net(x), net[0].blocks[1][0](x))
    shared = Repeat(lambda i: LayerChoice([nn.Linear(2, 2), nn.Identity()], label="all"), (2, 3), label="depth")
    assert list(decisions(shared)) == ["depth", "all"]


@pytest.mark.parametrize("sampler", [Softmax(), OnePath(0), OnePath(1), BinaryGates("all")], ids=str)
def test_a_block_that_changes_what_another_depth_returns_is_an_error(sampler: Sampler) -> None:
    blocks = [nn.Linear(2, 2), nn.Linear(2, 2), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 2))]
    repeat = Repeat(blocks, (2, 3), label="depth")
    set_sampler(repeat, sampler)
    draw(repeat, torch.Generator().manual_seed(0))
    x = torch.randn(3, 2)
    if sampler == OnePath(0):
        assert torch.equal(repeat(x), blocks[1](blocks[0](x)))
        return
    with pytest.raises(UnsupportedModelError, match=r"block 2 .*'depth'.*in place"):
        repeat(x).sum().backward()


def test_a_block_before_the_first_end_may_work_in_place() -> None:
    """Depths 2 and 3: what block 0 returns is no output, and block 1 may change it. 0.5 -> 1 -> 1 -> 3."""
    blocks = [Times(2.0), nn.ReLU(inplace=True), Times(3.0)]
    assert Repeat(blocks, (2, 3))(torch.tensor(0.5)).tolist() == (1.0 + 3.0) / 2


def test_shapes_that_differ_name_the_depths() -> None:
    repeat = Repeat([nn.Linear(4, 4), nn.Linear(4, 3)], (1, 2), label="deep")
    with pytest.raises(ShapeMismatchError, match=r"depth 2 .*'deep'.*\(5, 3\).*depth 1 .*\(5, 4\)"):
        repeat(torch.randn(5, 4))


@pytest.mark.parametrize("depth", [(3, 2), (-1, 2), (0, 0), 3, (1, 2, 3), (1.0, 2), (1, 2.5), "12", None, (False, 1)])
def test_depths_that_cannot_be(depth: Any) -> None:
    with pytest.raises(ConfigurationError, match="0 <= min <= max and max >= 1"):
        Repeat(add_one, depth)


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        (AddOne(), "cannot be repeated"),
        (nn.Sequential(AddOne(), AddOne()), "cannot be repeated"),
        ([AddOne()], "1 blocks for a depth of at most 2"),
        ([AddOne()] * 3, "3 blocks for a depth of at most 2"),
        ([AddOne(), 5], "block 1 is a int"),
        (lambda i: None, "block 0 is a NoneType"),
    ],
)
def test_blocks_that_cannot_be(blocks: Callable[[int], nn.Module], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        Repeat(blocks, (1, 2))
