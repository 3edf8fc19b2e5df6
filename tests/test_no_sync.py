"""What makes the host wait for a GPU in a step: nothing in forward, costs and backward, and one transfer for a draw.

The operators are recorded on the CPU, where they are the same ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from oneshot import (
    PIT,
    Argmax,
    BinaryGates,
    GumbelSoftmax,
    LayerChoice,
    Softmax,
    UniformPath,
    decisions,
    draw,
    set_sampler,
)
from oneshot.mutables import Sampler
from oneshot.pit import SuperNet
from oneshot.trainers.gradients import add_gradients
from oneshot.trainers.meters import Meters

# A number for Python; sizes that depend on values; a tensor of Python's numbers, which has to be sent to the GPU.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "lift_fresh")
FETCHING = (Tensor.tolist, Tensor.numpy, Tensor.cpu)  # which are no operators


class Operators(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING:
            self.found[name] += 1
        if name in ("index", "index_put", "index_put_"):
            # By flags, whose number has to be known.
            self.found[name] += sum(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FETCHING:
            self.found[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """What is called inside, and would wait for a GPU."""
    found: Counter[str] = Counter()
    with Functions(found), Operators(found):
        yield found


def test_what_waits_is_counted() -> None:
    x = torch.arange(4.0)
    with waits() as found:
        float(x.sum())
        x[x > 1]
        x.nonzero()
        x.tolist()
        torch.tensor([1.0])
        x[0] * 2
    assert found == {"_local_scalar_dense": 1, "index": 1, "nonzero": 1, "tolist": 1, "lift_fresh": 1}


def space() -> nn.Module:
    def conv_bn(kernel: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(4, 4, kernel, padding=kernel // 2), nn.BatchNorm2d(4), nn.ReLU())

    torch.manual_seed(0)
    blocks = [LayerChoice([conv_bn(3), conv_bn(1), nn.Identity()], label=f"block{i}") for i in range(3)]
    return nn.Sequential(nn.Conv2d(3, 4, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


X, Y = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0])


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), Y)


def of_a_gpu(masks: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let masks take the way that they take on a GPU: on the CPU they look whether any axis is empty."""
    kept = type(masks).kept

    def without_looking(self: Any, theta: Tensor) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(torch.compiler, "is_compiling", lambda: True)
            return kept(self, theta)

    monkeypatch.setattr(type(masks), "kept", without_looking)


def test_a_step_of_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 5), nn.Flatten(), nn.Linear(64, 2)
    )
    pit = PIT(net, (3, 8, 8), cost=("params", "macs")).train()
    of_a_gpu(pit.masks, monkeypatch)
    with waits() as found:
        task = loss_of(pit)
        costs = pit.costs()
        (task + 1e-3 * sum(costs.values())).backward()
        pit.masks.clip_()
    assert found.total() == 0, found
    assert all(alpha.grad is not None for alpha in pit.masks.alphas())


SAMPLERS = [
    Softmax(),
    Softmax(hard=True),
    GumbelSoftmax(0.5),
    GumbelSoftmax(0.5, hard=True),
    BinaryGates(1),
    BinaryGates(2),
    BinaryGates("all"),
    UniformPath(),
    Argmax(),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("network", [SuperNet, PIT])
def test_a_step_of_choices(network: Any, sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(space(), (3, 8, 8), cost=("params", "macs")).train()
    of_a_gpu(net.masks, monkeypatch)
    set_sampler(net.choices, sampler)
    draw(net.choices, torch.Generator().manual_seed(0))
    with waits() as found:
        task = loss_of(net)
        costs = net.costs()
        (task + 1e-3 * sum(costs.values())).backward()
    assert found.total() == 0, found


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_a_step_of_the_users_own_network(sampler: Sampler) -> None:
    net = space().train()
    set_sampler(net, sampler)
    draw(net, torch.Generator().manual_seed(0))
    with waits() as found:
        loss = loss_of(net)
        if loss.requires_grad:
            loss.backward()
    assert found.total() == 0, found


class Fetched(TorchDispatchMode):
    """How often alphas, which are of float32 here, become numbers of the CPU: ``times``."""

    times = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "_to_copy" and (kwargs or {}).get("device") == torch.device("cpu"):
            self.times += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_a_draw_fetches_all_alphas_at_once_if_it_needs_them(sampler: Sampler) -> None:
    """Where there is a GPU, that is the only time that a step waits for it: which path runs depends on the alphas."""
    net = space()
    set_sampler(net, sampler)
    with Fetched() as fetched:
        draw(net, torch.Generator().manual_seed(0))
    is_blind = sampler in (Softmax(), GumbelSoftmax(0.5), UniformPath())
    assert fetched.times == (0 if is_blind else 1)
    assert sampler.reads_alpha() is not is_blind


def test_a_draw_that_does_not_read_alpha_is_the_same_whatever_alpha_is() -> None:
    drawn = []
    for value in (0.0, 3.0):
        net = space()
        for decision in decisions(net).values():
            decision.alpha.data[0] = value
        set_sampler(net, UniformPath())
        draw(net, torch.Generator().manual_seed(1))
        drawn.append([decision.drawn for decision in decisions(net).values()])
    assert drawn[0] == drawn[1]


def test_the_likeliest_option_stays_that_of_the_draw_until_the_next_one() -> None:
    choice = LayerChoice([nn.Identity(), nn.ReLU()])
    choice.alpha.data.copy_(torch.tensor([0.0, 1.0]))
    for sampler in (Argmax(), Softmax(hard=True)):
        set_sampler(choice, sampler)
        assert choice.gate().graph == (1,)  # without a draw, of now
        draw(choice)
        choice.alpha.data[0] = 2.0
        assert choice.gate().graph == (1,)
        draw(choice)
        assert choice.gate().graph == (0,)
        choice.alpha.data[0] = 0.0


def test_running_averages_and_shares_of_gradients() -> None:
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(5000))]
    for weight in weights:
        weight.grad = torch.full_like(weight, 0.5)
    meters, loss = Meters(), torch.tensor(1.0)
    meters.add({"loss": loss, "number": 2.0})
    with waits() as found:
        share = add_gradients(weights, [torch.ones(3), None])
        for _ in range(3):
            meters.add({"share": share, "loss": loss, "number": 2.0})
    assert found.total() == 0, found
    # 3 of 3 + 0.5 * 5003
    assert meters.averages() == {"share": pytest.approx(3 / 2504.5), "loss": 1.0, "number": 2.0}
