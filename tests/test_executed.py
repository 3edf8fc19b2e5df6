"""What a module executes, as text: equal for what takes the same time, different for what may not."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oneshot.cost.executed import executed_operators, operators_key
from search_spaces.mobilenet import InvertedResidual


def key(module: Any, *args: Any, **kwargs: Any) -> str:
    return operators_key(executed_operators(module.eval() if isinstance(module, nn.Module) else module, args, kwargs))


X = torch.rand(1, 8, 6, 6)


def test_weights_and_classes_do_not_matter() -> None:
    class Own(nn.Sequential):
        pass

    one, other = nn.Sequential(nn.Conv2d(8, 4, 3), nn.ReLU()), Own(nn.Sequential(nn.Conv2d(8, 4, 3)), nn.ReLU())
    assert key(one, X) == key(other, torch.zeros(1, 8, 6, 6))
    assert key(InvertedResidual(8, 8, 3, 6, 1), X) == key(InvertedResidual(8, 8, 3, 6, 1), X)


BASE = nn.Conv2d(8, 8, 3, padding=1)
OTHERS: dict[str, tuple[Any, Tensor]] = {
    "kernel": (nn.Conv2d(8, 8, 5, padding=2), X),
    "width": (nn.Conv2d(8, 16, 3, padding=1), X),
    "groups": (nn.Conv2d(8, 8, 3, padding=1, groups=8), X),
    "stride": (nn.Conv2d(8, 8, 3, padding=1, stride=2), X),
    "dilation": (nn.Conv2d(8, 8, 3, padding=2, dilation=2), X),
    "bias": (nn.Conv2d(8, 8, 3, padding=1, bias=False), X),
    "one more operator": (nn.Sequential(BASE, nn.ReLU()), X),
    "size": (BASE, torch.rand(1, 8, 7, 6)),
    "batch": (BASE, torch.rand(2, 8, 6, 6)),
    "channels last": (BASE, X.to(memory_format=torch.channels_last)),
    "dtype": (nn.Conv2d(8, 8, 3, padding=1).double(), X.double()),
    "nothing": (nn.Identity(), X),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another(name: str) -> None:
    module, x = OTHERS[name]
    assert key(module, x) != key(BASE, X)


def test_every_kind_of_argument_is_shown() -> None:
    def run(x: Tensor, *, scale: float, rest: dict[str, Any]) -> Tensor:
        return torch.cat([x, x], 1).to(torch.float64) * scale

    lines = executed_operators(run, (torch.rand(2, 3),), {"scale": 0.5, "rest": {"a": [1, None], "b": {3}}})
    assert lines == [
        "input(float32[2, 3], scale=0.5, rest={a: [1, None], b: set()})",
        "aten.cat.default([float32[2, 3], float32[2, 3]], 1)",
        "aten._to_copy.default(float32[2, 6], dtype=torch.float64)",
        "aten.mul.Tensor(float64[2, 6], 0.5)",
    ]


def test_nothing_of_one_process_is_in_the_text() -> None:
    """A generator's repr has its address, which every process has anew."""

    def run(x: Tensor, own: object) -> Tensor:
        return x.clone().uniform_(generator=torch.Generator().manual_seed(0))

    lines = executed_operators(run, (torch.rand(2), object()))
    assert lines == [
        "input(float32[2], object())",
        "aten.clone.default(float32[2])",
        "aten.uniform_.default(float32[2], generator=Generator())",
    ]
    assert operators_key(["a", "b"]) == hashlib.sha256(b"a\nb").hexdigest()
