"""What can be wrong with a network, a shape or a cost is said before any training, each in its own words."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oneshot import PIT, CostSpec, PITTrainer, accuracy
from oneshot.data import digits
from oneshot.errors import (
    ConfigurationError,
    ExportError,
    InfeasibleTargetError,
    InputTypeError,
    UnknownCostError,
    UnsupportedModelError,
)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(48, 10))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: PIT(network()), ConfigurationError, "the shape of an input is needed"),
        (lambda: PIT(network(), [1, 8, 8]), InputTypeError, "a tuple is needed"),  # type: ignore[arg-type]
        (
            lambda: PIT(network(), (8, 8)),
            UnsupportedModelError,
            r"does not run on an input of shape \[\(2, 8, 8\)\].*that of one sample",
        ),
        (lambda: PIT(network(), (2, 8, 8)), UnsupportedModelError, "does not run"),
        (lambda: PIT(network(), (1, 8, 8), cost="flops"), ConfigurationError, "allowed are"),
        (lambda: PIT(network(), (1, 8, 8), cost={"a": "watts"}), ConfigurationError, "'watts'"),
        (lambda: PIT(network(), (1, 8, 8), regularizer="latency"), ConfigurationError, r"\['macs', 'size'\]"),
        (lambda: PIT(network(), (1, 8, 8), cost="macs", regularizer="macs"), ConfigurationError, "give one of them"),
        (lambda: PIT(network(), (1, 8, 8), exclude="9"), ConfigurationError, "fits no module"),
        (lambda: PIT(network(), (1, 8, 8), exclude=[nn.LSTM]), ConfigurationError, "fits no module"),
        (lambda: PIT(network(), (1, 8, 8), granularity=0), ConfigurationError, "at least 1"),
        (lambda: PIT(nn.Linear(3, 2), (3,)), UnsupportedModelError, "nothing to search"),
        (lambda: PIT(network(), (1, 8, 8), exclude=("0", "2")), UnsupportedModelError, "nothing to search.*excluded"),
        (lambda: PIT("resnet18", (1, 8, 8)), InputTypeError, "a torch.nn.Module is needed"),  # type: ignore[arg-type]
        (lambda: PIT(PIT(network(), (1, 8, 8)), (1, 8, 8)), ConfigurationError, "is one already"),
        (lambda: PIT(network(), (1, 8, 8), cost=CostSpec("c", "1")), UnknownCostError, "no rule covers it"),
    ],
)
def test_wrong_arguments(make: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


def test_a_cost_that_was_not_asked_for() -> None:
    pit = PIT(network(), (1, 8, 8), cost=["params", "macs"])
    with pytest.raises(ConfigurationError, match=r"'latency'.*\['params', 'macs'\]"):
        pit.get_cost("latency")
    with pytest.raises(ConfigurationError, match="take get_cost"):
        _ = pit.cost


def test_a_target_below_what_can_be_reached() -> None:
    # One channel and a kernel of 1 in both convolutions (the first reads 1 channel, the second one of the first), and
    # the 16 columns of the one channel that is left: 1 + 1, 1 + 1, 16 * 10 + 10.
    pit = PIT(network(), (1, 8, 8), cost="params")
    assert pit.reachable_costs()["params"] == (174.0, 4 * 9 + 4 + 3 * 36 + 3 + 490)
    with pytest.raises(InfeasibleTargetError, match="174"):
        PITTrainer(
            pit,
            loss=nn.CrossEntropyLoss(),
            metrics=accuracy,
            optimizer=torch.optim.SGD(pit.net_parameters(), lr=0.1),
            dataset=digits(),
            strength=1e-3,
            targets={"params": 173},
            num_epochs=1,
            workers=0,
        ).train()


class Scaled(nn.Module):
    """Divides by its width once ``by_width`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 6), nn.Linear(6, 2)
        self.by_width = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.two(x / self.one.out_features if self.by_width else x)


def test_an_export_that_differs_is_refused_and_names_the_mask() -> None:
    pit = PIT(Scaled(), (3,))
    pit.masks["one"].keep([1, 2])
    pit.export()
    pit.network.by_width = True
    before = copy.deepcopy(pit.masks.state_dict())
    with pytest.raises(ExportError, match=r"differs from the searched one.*The first mask .* is 'one'"):
        pit.export()
    assert all(torch.equal(before[name], value) for name, value in pit.masks.state_dict().items())
