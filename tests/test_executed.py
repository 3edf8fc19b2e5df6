"""What a module executes, as text: equal for what takes the same time, different for what may not."""

from __future__ import annotations

import hashlib
import warnings
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
        "input(%0 float32[2, 3] (3, 1), scale=0.5, rest={a: [1, None], b: set()})",
        "aten.cat.default([%0 float32[2, 3] (3, 1), %0 float32[2, 3] (3, 1)], 1) -> %1 float32[2, 6] (6, 1)",
        "aten._to_copy.default(%1 float32[2, 6] (6, 1), dtype=torch.float64) -> %2 float64[2, 6] (6, 1)",
        "aten.mul.Tensor(%2 float64[2, 6] (6, 1), 0.5) -> %3 float64[2, 6] (6, 1)",
    ]


def test_nothing_of_one_process_is_in_the_text() -> None:
    """A generator's repr has its address, which every process has anew."""

    def run(x: Tensor, own: object) -> Tensor:
        return x.clone().uniform_(generator=torch.Generator().manual_seed(0))

    lines = executed_operators(run, (torch.rand(2), object()))
    assert lines == [
        "input(%0 float32[2] (1,), object())",
        "aten.clone.default(%0 float32[2] (1,)) -> %1 float32[2] (1,)",
        "aten.uniform_.default(%1 float32[2] (1,), generator=Generator()) -> %1 float32[2] (1,)",
    ]
    assert operators_key(["a", "b"]) == hashlib.sha256(b"a\nb").hexdigest()


class Ways(nn.Module):
    """The same operators on the same shapes, of which a graph runtime computes one, or both."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        self.a, self.c, self.used = nn.Linear(3, 3), nn.Linear(3, 3), used

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x)
        return self.c(first if self.used else x)


def test_what_goes_where_and_how_it_lies_make_a_difference() -> None:
    x = torch.rand(2, 3)
    used, unused = (operators_key(executed_operators(Ways(used), (x,))) for used in (True, False))
    assert used != unused
    assert used == operators_key(executed_operators(Ways(True), (x,)))
    depthwise = nn.Conv2d(4, 4, 3, groups=4)
    rows = operators_key(executed_operators(depthwise, (torch.rand(1, 4, 8, 8),)))
    # As channels_last has it; where a dimension is 1, is_contiguous() is true of both.
    depthwise.weight.data = torch.empty_strided((4, 1, 3, 3), (9, 1, 3, 1)).copy_(depthwise.weight.data)
    assert depthwise.weight.is_contiguous()
    assert rows != operators_key(executed_operators(depthwise, (torch.rand(1, 4, 8, 8),)))


def test_sparse_weights_have_a_layout_and_no_strides() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's sparse CSR is in beta
        weight = torch.eye(3).to_sparse_csr()
        lines = executed_operators(lambda x: weight @ x, (torch.rand(3, 2),))
    assert any("torch.sparse_csr" in line for line in lines)
