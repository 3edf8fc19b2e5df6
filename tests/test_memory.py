"""Peak memory against a tracker of real storages, hand counts and enumeration."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from random_spaces import architectures, random_space
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from oneshot import LayerChoice, fixed
from oneshot.cost import best_under_budget, cost_range, count_params, count_peak_memory
from oneshot.errors import InfeasibleTargetError
from oneshot.export.arch import arch_of


class Storages(TorchDispatchMode):
    """Which real storages each operator touches. Every tensor is kept, so that no address is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self.touched: list[set[int]] = []
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = [t for t in pytree.tree_leaves((args, kwargs, output)) if isinstance(t, Tensor)]
        self.kept += tensors
        self.touched.append({self.note(t) for t in tensors})
        return output

    def note(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self.sizes[storage.data_ptr()] = storage.nbytes()
        return storage.data_ptr()


def tracked_peak(model: nn.Module, x: Tensor) -> int:
    storages = Storages()
    first = storages.note(x)
    with torch.no_grad(), storages:
        last = storages.note(model.eval()(x))
    held = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]} | {0}
    n = len(storages.touched)
    lives = {first: (0, 0)}
    for step, touched in enumerate(storages.touched):
        for at in touched - held:
            lives[at] = (lives.get(at, (step, step))[0], step)
    if last in lives:
        lives[last] = (lives[last][0], max(0, n - 1))
    return max(sum(storages.sizes[at] for at, (a, b) in lives.items() if a <= step <= b) for step in range(max(1, n)))


class Leaf(nn.Module):
    """Layers of different appetite on (2, 3, 4, 4)."""

    def __init__(self, kind: int) -> None:
        super().__init__()
        self.kind = kind
        self.wide, self.narrow = nn.Conv2d(3, 9, 1), nn.Conv2d(9, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == 0:
            return self.narrow(torch.relu_(self.wide(x)))
        if self.kind == 1:
            return x + self.narrow(torch.cat([x, x * 2, x * 3], 1))
        if self.kind == 2:
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        return x + torch.zeros(2, 3, 4, 4)


def leaf(rng: random.Random) -> nn.Module:
    return Leaf(rng.randrange(4))


@pytest.mark.parametrize("seed", range(24))
def test_peak_is_that_of_the_storages_of_the_rebuilt_network(seed: int) -> None:
    torch.manual_seed(seed)
    model = random_space(seed, leaf)
    x = torch.randn(2, 3, 4, 4)
    cost = count_peak_memory(model, (x,))
    for choices in itertools.islice(architectures(model), 0, 48, 7):
        assert cost.of(choices) == tracked_peak(fixed(model, arch_of(model, choices)), x)


@pytest.mark.parametrize("seed", range(14))
def test_budgets_are_met_by_the_best_architecture_of_all(seed: int) -> None:
    torch.manual_seed(seed)
    model = random_space(seed, leaf)
    cost, params = count_peak_memory(model, (torch.randn(2, 3, 4, 4),)), count_params(model)
    every = list(architectures(model))
    peaks = sorted({cost.of(choices) for choices in every})
    assert cost_range(cost) == (peaks[0], peaks[-1])
    rng = random.Random(seed)
    log_p = {
        k: torch.tensor([rng.gauss(0, 1) for _ in range(n)]).log_softmax(0).tolist() for k, n in cost.sizes.items()
    }

    def score(choices: dict[str, int]) -> float:
        return sum(row[choices[label]] for label, row in log_p.items())

    for limit in peaks[::3]:
        best = max(score(c) for c in every if cost.of(c) <= limit)
        found = best_under_budget(log_p, {"peak_memory": cost}, {"peak_memory": limit})
        assert cost.of(found) <= limit
        assert score(found) == pytest.approx(best)
    few = sorted(params.of(c) for c in every)[len(every) // 2]
    both = [c for c in every if cost.of(c) <= peaks[-1] - 1 and params.of(c) <= few]
    budget = {"peak_memory": peaks[-1] - 1, "params": few}
    if both:
        found = best_under_budget(log_p, {"peak_memory": cost, "params": params}, budget)
        assert score(found) == pytest.approx(max(map(score, both)))
    with pytest.raises(InfeasibleTargetError, match=f"{peaks[0]:.15g} to {peaks[-1]:.15g} bytes"):
        best_under_budget(log_p, {"peak_memory": cost}, {"peak_memory": peaks[0] - 1})


def test_hand_count_of_a_residual_block() -> None:
    """x (1, 2, 4, 4) = 128 bytes; the wide 1x1 convolution makes 6 channels = 384, the next one 2 again = 128.

    While the wide one runs: x 128 + 384 = 512. While the narrow one runs: x is needed by the sum, so
    128 + 384 + 128 = 640, the peak. While the sum runs: 128 + 128 + 128 = 384. Without the choice's block: x alone.
    """

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.narrow(self.wide(x))

    net = nn.Sequential(LayerChoice({"block": Block(), "skip": nn.Identity()}, label="a"))
    cost = count_peak_memory(net, (torch.zeros(1, 2, 4, 4),))
    assert (cost.of({"a": 0}), cost.of({"a": 1})) == (640, 128)
    half = count_peak_memory(net, (torch.zeros(1, 2, 4, 4),), dtype=torch.float16)
    assert half.of({"a": 0}) == 320


def test_soft_cost_is_exact_where_decisions_are_certain_and_so_is_its_gradient() -> None:
    torch.manual_seed(0)
    model = random_space(3, leaf)
    cost = count_peak_memory(model, (torch.randn(2, 3, 4, 4),))
    for choices in architectures(model):
        certain = {k: torch.eye(n, dtype=torch.float64)[choices[k]] for k, n in cost.sizes.items()}
        assert float(cost.soft(certain)) == cost.of(choices)
        p = {k: (0.999 * row + 0.001 / len(row)).requires_grad_() for k, row in certain.items()}
        soft = cost.soft(p)
        gradients = torch.autograd.grad(soft, list(p.values()))
        for (label, n), gradient in zip(cost.sizes.items(), gradients, strict=True):
            want = [cost.of({**choices, label: k}) - cost.of(choices) for k in range(n)]
            assert gradient.tolist() == pytest.approx(want)


def test_indices_keep_their_own_width() -> None:
    """Eight int64 indices are 64 bytes; (8, 4) numbers of the embedding are 128 in float32, 64 in float16."""
    net = nn.Embedding(5, 4)
    indices = torch.zeros(8, dtype=torch.long)
    assert count_peak_memory(net, (indices,)).of({}) == 64 + 128
    assert count_peak_memory(net, (indices,), dtype=torch.float16).of({}) == 64 + 64


class Parallel(nn.Module):
    """Choices side by side, of which one hands its input on and four make something of the same size."""

    def __init__(self, n: int) -> None:
        super().__init__()
        options = [nn.Identity(), nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.Conv2d(3, 3, 1)]
        self.choices = nn.ModuleList([LayerChoice(options) for _ in range(n)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([choice(x) for choice in self.choices], 1)


@pytest.mark.parametrize("seed", range(12))
def test_what_is_cut_off_is_above_the_limit(seed: int) -> None:
    """Every architecture that takes the options of a cover has a peak above the limit."""
    torch.manual_seed(seed)
    model = random_space(seed, leaf) if seed < 10 else Parallel(3)
    cost = count_peak_memory(model, (torch.randn(2, 3, 4, 4),))
    every = [dict(zip(cost.sizes, row, strict=True)) for row in itertools.product(*map(range, cost.sizes.values()))]
    limits = sorted({cost.of(choices) for choices in every})[:-1]
    checked = 0
    for limit in limits:
        for choices in every[::3]:
            for cover in cost.covers(limit, choices):
                assert all(choices[label] in options for label, options in cover.items())
                taken = [c for c in every if all(c[label] in options for label, options in cover.items())]
                assert min(map(cost.of, taken)) > limit
                checked += 1
    assert checked > 0 or not limits


def test_equal_options_are_cut_off_together() -> None:
    """Eight choices of five: 390,625 architectures, of which only the numbers of identities count.

    x and the concatenation are 1 + 8 units of memory, each option that is no identity one more: limit 13 allows 4.
    """
    model = Parallel(8)
    cost = count_peak_memory(model, (torch.randn(1, 3, 4, 4),))
    unit = 3 * 16 * 4
    rng = random.Random(0)
    log_p = {
        k: torch.tensor([rng.gauss(0, 1) for _ in range(n)]).log_softmax(0).tolist() for k, n in cost.sizes.items()
    }
    found = best_under_budget(log_p, {"peak_memory": cost}, {"peak_memory": 13 * unit})
    assert cost.of(found) == 13 * unit
    # The best: in each choice the best option; identities where they cost least.
    best = sum(max(row) for row in log_p.values())
    losses = sorted(max(row) - row[0] for row in log_p.values())
    assert sum(log_p[k][o] for k, o in found.items()) == pytest.approx(best - sum(losses[:4]))


def test_inputs_that_share_memory_count_once() -> None:
    class Add(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    x = torch.zeros(1, 8)
    assert count_peak_memory(Add(), (x, x)).of({}) == 64  # the input and the sum, 32 bytes each
    assert count_peak_memory(Add(), (x, x[:])).of({}) == 64
    assert count_peak_memory(Add(), (x, x.clone())).of({}) == 96


def test_options_may_return_one_dict_in_different_orders() -> None:
    class Pair(nn.Module):
        def __init__(self, turned: bool) -> None:
            super().__init__()
            self.turned = turned

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            pairs = [("a", torch.cat([x, x, x], 1)), ("b", x + 1)]
            return dict(reversed(pairs) if self.turned else pairs)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.choice = LayerChoice([Pair(False), Pair(True)], label="c")

        def forward(self, x: Tensor) -> Tensor:
            return self.choice(x)["b"] * 2

    net, x = Net(), torch.randn(1, 4)
    cost = count_peak_memory(net, (x,))
    for k in (0, 1):
        assert cost.of({"c": k}) == tracked_peak(fixed(net, {"c": k}), x)
