"""What a second look found: networks that once gave wrong gradients, crashed, or were exported wrongly."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from pit_networks import same, scatter
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from oneshot import PIT, counted_cost
from oneshot.errors import ConfigurationError, UnsupportedModelError


@torch.no_grad()
def exports_equal(pit: PIT, *inputs: Tensor) -> nn.Module:
    scatter(pit, 0)
    small = pit.export()
    same(pit(*inputs), small(*inputs), 1e-9)
    return small


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = checkpoint(lambda x: self.b(torch.relu(self.a(x))), x, use_reentrant=False)
        else:
            x = self.b(torch.relu(self.a(x)))
        return self.c(x)


def test_activation_checkpointing_is_refused() -> None:
    """Its second forward would see weights without masks."""
    with pytest.raises(UnsupportedModelError, match="activation checkpointing"):
        PIT(Checkpointed(), (4,))


class Pooled(nn.Module):
    """A vector of which every element is under a mask, and a matrix of which both dimensions are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.q, self.w = nn.Linear(6, 8), nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.a(x))
        code = torch.relu(hidden @ self.w.t())
        return torch.stack([hidden @ self.q, (code @ self.w) @ self.q], 1)


def test_weights_of_which_all_dimensions_are_masked() -> None:
    torch.manual_seed(0)
    pit = PIT(Pooled().double(), (6,)).train()
    scatter(pit, 1)
    x = torch.randn(3, 6, dtype=torch.float64)
    pit(x).square().sum().backward()
    # The same with plain autograd: masks of the columns, multiplied by hand.
    net = pit.network
    flags = {label: mask.hard().detach().double().requires_grad_() for label, mask in pit.masks.items()}
    hidden_mask, code_mask = flags["a"], flags["w"]
    hidden = torch.relu(F.linear(x, net.a.weight, net.a.bias))
    w, q = net.w * hidden_mask * code_mask[:, None], net.q * hidden_mask
    code = torch.relu(hidden @ w.t())
    loss = torch.stack([hidden @ q, (code @ w) @ q], 1).square().sum()
    expected = torch.autograd.grad(loss, [net.w, net.q, hidden_mask, code_mask])
    got = [net.w.grad, net.q.grad, pit.masks["a"].alpha.grad, pit.masks["w"].alpha.grad]
    for one, other in zip(got, expected, strict=True):
        assert one is not None
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-6, atol=1e-6)  # alphas are float32


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


class Dataclassed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Output:
        hidden = self.a(x)
        return Output(self.c(self.b(hidden)), hidden)


def test_outputs_in_an_object_are_outputs() -> None:
    pit = PIT(Dataclassed(), (4,))
    assert list(pit.masks) == ["b"]
    assert pit.report().frozen["a.weight[0]"] == "an output of the network"


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_computed_weights(norm: object) -> None:
    net = nn.Sequential(
        norm(nn.Conv1d(3, 6, 3)),
        nn.ReLU(),
        nn.Conv1d(6, 5, 3),
        nn.Conv1d(5, 4, 1),  # type: ignore[operator]
    )
    pit = PIT(net.eval(), (3, 12), cost=["params", "macs"])
    assert "2" in pit.masks
    assert "0.kernel_size" not in pit.masks
    small = exports_equal(PIT(net.eval().double(), (3, 12)), torch.randn(2, 3, 12, dtype=torch.float64))
    assert isinstance(small, nn.Sequential)


class Twice(nn.Module):
    """A convolution as a function whose rows and columns follow one mask."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return self.c(x + F.conv2d(x, self.b.weight, self.b.bias, padding=1))


def test_one_mask_twice_in_a_functional_product() -> None:
    x = torch.randn(1, 3, 5, 5)
    pit = PIT(Twice(), (3, 5, 5), cost="macs", ignore=("b",))
    pit.masks["a"].keep([0, 3])
    # 25 pixels: 3 -> 2, 2 -> 2 with 9 taps, 2 -> 2
    assert pit.cost.item() == 25 * (3 * 2 + 2 * 2 * 9 + 2 * 2)
    assert counted_cost("macs", pit.export(), (x,)).of({}) == pit.cost.item()


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)
        self.maps: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.maps = [torch.relu(self.a(x))]
        return self.b(self.maps[0])


def test_a_network_that_keeps_results_of_its_forward() -> None:
    net = Remembers()
    net(torch.randn(2, 3)).sum().backward()
    pit = PIT(net, (3,)).train()
    pit(torch.randn(2, 3)).sum().backward()
    pit.masks["a"].keep([2, 4])
    assert pit.export().a.out_features == 2


class Noisy(nn.Module):
    """Random in eval mode too: of the same size whatever is cut, and a dropout that is never off."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.b(F.dropout(torch.relu(self.a(x)), 0.3))
        return self.c(mean + torch.randn(len(x), 1).to(x))


def test_a_network_that_is_random_in_eval_mode() -> None:
    pit = PIT(Noisy(), (3,))
    pit.masks["a"].keep([0, 5, 6])
    assert pit.export().a.out_features == 3


class Dead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 8), nn.Linear(8, 5), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.b(self.a(x))
        return self.head(x)


def test_a_branch_that_leads_nowhere() -> None:
    with pytest.raises(UnsupportedModelError, match="nothing to search"):
        PIT(Dead(), (4,))


def test_a_crop_longer_than_the_input() -> None:
    pit = PIT(nn.Sequential(nn.Conv1d(3, 4, 1), nn.Conv1d(4, 2, 5, padding=2)).double(), (3, 1))
    pit.masks["1.kernel_size"].decide(1)
    pit.export()
    assert pit.summary()["1"]["kernel_size"] == (1,)


def test_two_calls_at_once_are_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    pit = PIT(net, (3,))

    def again(module: nn.Module, args: object) -> None:
        pit(torch.randn(1, 3))

    handle = pit.network[1].register_forward_pre_hook(again)
    with pytest.raises(RuntimeError, match="while another call of it runs"):
        pit(torch.randn(1, 3))
    handle.remove()
    assert isinstance(pit.network[2].weight, nn.Parameter)
    pit(torch.randn(1, 3))


class Squeezed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 5, 1), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).mean(2, keepdim=True).squeeze())


def test_an_axis_that_fails_at_one_unit_keeps_two() -> None:
    """A squeeze takes the dimension of a single channel away, and then the width is wrong."""
    pit = PIT(Squeezed(), (3, 7))
    with pytest.raises(ConfigurationError, match="with less than 2"):
        pit.masks["a"].keep([3])
    with torch.no_grad():
        pit.masks["a"].alpha.zero_()
    assert pit.arch() == {"a": [3, 4]}
    assert pit.reachable_costs()["params"][0] == 2 * 3 + 2 + 2 * 2 + 2
    assert sum(p.numel() for p in pit.export().parameters()) == 14
