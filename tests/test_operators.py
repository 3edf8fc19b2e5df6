"""The trace of operators against the rebuilt network, and against hand-written programs."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from random_spaces import MOST_ARCHS, architectures, random_space
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from oneshot import LayerChoice, fixed
from oneshot.errors import UnsupportedModelError
from oneshot.export.arch import arch_of
from oneshot.graph import Operator, Program, Value, trace_operators


def listing(program: Program, choices: dict[str, int]) -> list[Any]:
    """What runs, with tensors numbered in the order in which they appear, so that two traces can be compared."""
    run = program.of(choices)
    seen: dict[int, int] = {}

    def number(value: Value) -> int:
        return seen.setdefault(run.source(value.number), len(seen))

    def shown(o: Operator) -> tuple[Any, ...]:
        args = pytree.tree_map_only(Value, number, (o.args, dict(o.kwargs)))
        outputs = []
        for value in o.outputs:
            alias = None if value.alias_of is None else number(program.values[value.alias_of])
            outputs.append((number(value), value.shape, value.dtype, alias, value.folded))
        return (o.name, repr(args), outputs)

    return [shown(o) for o in run.operators], [number(program.values[n]) for n in run.outputs]


class Leaf(nn.Module):
    """Functions, methods, views, work in place and constants, on (2, 3, 4, 4)."""

    def __init__(self, kind: int) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == 0:
            return nn.functional.relu(self.conv(x), inplace=True) + 1
        if self.kind == 1:
            return x.flatten(1).view(2, 3, 16).softmax(-1).reshape(x.shape)
        if self.kind == 2:
            a, b = self.conv(x).split([1, 2], 1)
            return torch.cat([b * 2, a], 1)
        return x * torch.ones(3, 1, 1)


def leaf(rng: random.Random) -> nn.Module:
    return Leaf(rng.randrange(4))


@pytest.mark.parametrize("seed", range(60))
def test_every_architecture_runs_as_its_rebuilt_network_does(seed: int) -> None:
    torch.manual_seed(seed)
    model = random_space(seed, leaf)
    x = torch.randn(2, 3, 4, 4)
    program = trace_operators(model, (x,))
    for choices in itertools.islice(architectures(model), 0, MOST_ARCHS, 7):
        plain = fixed(model, arch_of(model, choices))
        assert listing(program, choices) == listing(trace_operators(plain, (x,)), {})


@pytest.mark.parametrize("inference", [False, True])
def test_attention_is_seen_by_its_parts(inference: bool) -> None:
    """Eval mode has a fused operator for a whole encoder layer; its two feed-forward products must be seen."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(2, 5, 8)
    with torch.inference_mode(inference):
        names = [o.name for o in trace_operators(layer, (x,)).of({}).operators]
    # Into and out of the attention, and two of the feed-forward.
    assert sum(name in ("addmm", "mm", "bmm") for name in names) == 4
    assert not any("transformer" in name for name in names)


def test_in_place_and_views_share_memory_and_constants_are_known() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu_((x @ (self.weight * 2))[0])

    program = trace_operators(Net(), (torch.ones(2, 3),))
    doubled, product, row, relu = program.of({}).operators
    assert [o.name for o in (doubled, product, row, relu)] == ["mul", "mm", "select", "relu_"]
    assert doubled.outputs[0].folded
    assert not product.outputs[0].folded
    assert (product.outputs[0].alias_of, row.outputs[0].alias_of) == (None, product.outputs[0].number)
    assert relu.outputs[0].alias_of == row.outputs[0].number
    assert program.outputs == [relu.outputs[0].number]
    assert [v.maker for v in program.values if v.maker == "input"] == ["input"]


def test_a_model_that_does_not_run_is_named_and_left_as_it_was() -> None:
    model = nn.Sequential(LayerChoice([nn.Linear(3, 3), nn.Identity()], label="a"))
    before = torch.get_rng_state()
    with pytest.raises(UnsupportedModelError, match="does not run on an input of shape"):
        trace_operators(model, (torch.ones(2, 4),))
    trace_operators(model, (torch.ones(2, 3),))
    assert model.training
    assert torch.equal(before, torch.get_rng_state())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
