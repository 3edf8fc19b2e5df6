"""Every sampler on two stacked and two nested choices, against enumeration in float64.

The oracle knows no mutable: it writes the network as a polynomial in the gates g1, g2, evaluates every candidate,
and takes derivatives by central differences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from oneshot import (
    Argmax,
    BinaryGates,
    EveryPath,
    GumbelSoftmax,
    LayerChoice,
    OnePath,
    Softmax,
    UniformPath,
    after_step,
    draw,
    set_sampler,
)
from oneshot.mutables import Sampler

N = 3


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0


class Op(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class Stacked(nn.Module):
    """The first choice is the first layer of the network, and one of its candidates has no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.one = LayerChoice([Op(), nn.Identity(), Op()])
        self.two = LayerChoice([Op(), Op(), Zero()])

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))

    def by_gates(self, x: Tensor, g1: Tensor, g2: Tensor) -> Tensor:
        middle = sum(g * op(x) for g, op in zip(g1, self.one, strict=True))
        return sum(g * op(middle) for g, op in zip(g2, self.two, strict=True))


class Nested(nn.Module):
    """The second choice is inside a candidate of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.two = LayerChoice([Op(), Op(), nn.Identity()], label="inner")
        self.one = LayerChoice([Op(), nn.Sequential(Op(), self.two), Zero()], label="outer")
        self.last = Op()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.one(x))

    def by_gates(self, x: Tensor, g1: Tensor, g2: Tensor) -> Tensor:
        op, (before, _), zero = self.one
        inner = sum(g * o(before(x)) for g, o in zip(g2, self.two, strict=True))
        return self.last(g1[0] * op(x) + g1[1] * inner + g1[2] * zero(x))


SAMPLERS: dict[str, Sampler] = {
    "softmax": Softmax(0.7),
    "gumbel": GumbelSoftmax(0.8),
    "gumbel-hard": GumbelSoftmax(0.8, hard=True),
    "gates-1": BinaryGates(1),
    "gates-2": BinaryGates(2),
    "gates-all": BinaryGates("all"),
    "uniform": UniformPath(),
    "argmax": Argmax(),
    "one": OnePath(1),
    "every": EveryPath(),
}
HARD = ("gumbel-hard", "gates-1", "gates-2", "gates-all", "uniform", "argmax", "one")


def setup(kind: type[nn.Module], name: str, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(100 + seed)
    net = kind().double()
    with torch.no_grad():
        net.one.alpha.copy_(torch.randn(N))
        net.two.alpha.copy_(torch.randn(N))
    set_sampler(net, SAMPLERS[name])
    draw(net, torch.Generator().manual_seed(seed))
    return net, torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.randn(5, 4, dtype=torch.float64)


def soft_gate(name: str, alpha: Tensor, drawn: object) -> Tensor | None:
    """The distribution whose Jacobian the gate has, written out once more; None where alpha does not learn."""
    if name == "softmax":
        return (alpha / 0.7).exp() / (alpha / 0.7).exp().sum()
    if name.startswith("gumbel"):
        z = ((alpha + drawn.noise) / 0.8).exp()
        return z / z.sum()
    if name == "gates-all":
        return alpha.exp() / alpha.exp().sum()
    if name == "gates-2":
        mask = torch.zeros_like(alpha)
        mask[list(drawn.involved)] = 1
        return mask * alpha.exp() / (mask * alpha.exp()).sum()
    return None


def value_gate(name: str, net: nn.Module, which: str) -> Tensor:
    choice: LayerChoice = getattr(net, which)
    drawn, alpha = choice.drawn, choice.alpha.detach()
    index = {
        "gumbel-hard": lambda: int((alpha + drawn.noise).argmax()),
        "gates-1": lambda: drawn.active,
        "gates-2": lambda: drawn.active,
        "gates-all": lambda: drawn.active,
        "uniform": lambda: drawn,
        "argmax": lambda: int(alpha.argmax()),
        "one": lambda: 1,
    }
    if name in index:
        return torch.eye(N, dtype=torch.float64)[index[name]()]
    if name == "every":
        return torch.ones(N, dtype=torch.float64)
    soft = soft_gate(name, alpha, drawn)
    assert soft is not None
    return soft


def central(f: Callable[[Tensor], Tensor], at: Tensor, eps: float = 1e-6) -> Tensor:
    out = torch.zeros_like(at)
    for i in range(at.numel()):
        step = torch.zeros_like(at).flatten()
        step[i] = eps
        step = step.view_as(at)
        out.view(-1)[i] = (f(at + step) - f(at - step)) / (2 * eps)
    return out


def loss(y: Tensor, target: Tensor) -> Tensor:
    return ((y - target) ** 2).sum()


def cases() -> Iterator[object]:
    for kind in (Stacked, Nested):
        for name in SAMPLERS:
            for seed in range(3):
                yield pytest.param(kind, name, seed, id=f"{kind.__name__}-{name}-{seed}")


@pytest.mark.parametrize(("kind", "name", "seed"), list(cases()))
def test_values_and_gradients_equal_enumeration(kind: type[nn.Module], name: str, seed: int) -> None:
    net, x, target = setup(kind, name, seed)
    g1, g2 = value_gate(name, net, "one"), value_gate(name, net, "two")
    loss(net(x), target).backward()

    def of_gates(a: Tensor, b: Tensor, at: Tensor) -> Tensor:
        with torch.no_grad():
            return loss(net.by_gates(at, a, b), target)

    assert torch.allclose(net(x).detach(), net.by_gates(x.detach(), g1, g2).detach(), atol=1e-12)
    assert torch.allclose(x.grad, central(lambda v: of_gates(g1, g2, v), x.detach()), atol=1e-6)
    for choice, of_own in (
        (net.one, lambda g: of_gates(g, g2, x.detach())),
        (net.two, lambda g: of_gates(g1, g, x.detach())),
    ):
        alpha = choice.alpha
        if soft_gate(name, alpha.detach(), choice.drawn) is None:
            assert alpha.grad is None
            continue
        of_weights = central(of_own, value_gate(name, net, "one" if choice is net.one else "two"))
        jacobian = torch.stack(
            [central(lambda a, k=k, c=choice: soft_gate(name, a, c.drawn)[k], alpha.detach()) for k in range(N)]
        )
        expected = of_weights @ jacobian
        got = torch.zeros_like(expected) if alpha.grad is None else alpha.grad
        assert torch.allclose(got, expected, atol=1e-6), (got, expected)


@pytest.mark.parametrize("paths", [2, "all"])
@pytest.mark.parametrize("seed", range(4))
def test_binary_gate_gradient_is_the_closed_form(paths: object, seed: int) -> None:
    """dL/dalpha = p (c - p.c), with the pair's own softmax q in two-path mode."""
    net, x, target = setup(Stacked, f"gates-{paths}", seed)
    y = net(x)
    loss(y, target).backward()
    with torch.no_grad():
        middle = net.one[net.one.drawn.active](x)
        gate_gradient = torch.stack([(2 * (y - target) * op(middle)).sum() for op in net.two])
        q = soft_gate(f"gates-{paths}", net.two.alpha, net.two.drawn)
        expected = q * (gate_gradient - (q * gate_gradient).sum())
    assert torch.allclose(net.two.alpha.grad, expected, atol=1e-12)


@pytest.mark.parametrize("kind", [Stacked, Nested])
@pytest.mark.parametrize("name", SAMPLERS)
def test_what_runs_and_what_moves(kind: type[nn.Module], name: str) -> None:
    """Counts candidate forwards (backward included) and checks whose parameters got a gradient."""
    for seed in range(4):
        net, x, target = setup(kind, name, seed)
        calls: dict[tuple[str, int], int] = {}
        for which in ("one", "two"):
            for k, op in enumerate(getattr(net, which)):
                op.register_forward_hook(
                    lambda *_, key=(which, k), calls=calls: calls.__setitem__(key, calls.get(key, 0) + 1)
                )
        loss(net(x), target).backward()
        active = {w: value_gate(name, net, w).nonzero().flatten().tolist() for w in ("one", "two")}
        runs = {"gates-2": 2, "gates-all": N, "gumbel-hard": N}
        inner_off = kind is Nested and 1 not in active["one"]
        for which in ("one", "two"):
            ran = [k for k in range(N) if calls.get((which, k), 0)]
            if which == "two" and inner_off and name in HARD:
                # evaluated at most for the outer gate, along its one active path, without gradient
                assert ran in ([], active["two"])
                assert net.two.alpha.grad is None
                assert all(p.grad is None for p in net.two.parameters())
                continue
            assert len(ran) == (runs.get(name, 1) if name in HARD else N)
            assert set(active[which]) <= set(ran)
            assert all(calls[which, k] == 1 for k in ran)
            for k, op in enumerate(getattr(net, which)):
                touched = [p.grad is not None for p in op.parameters()]
                if name in HARD and k not in active[which]:
                    assert not any(touched)
                elif kind is Stacked or which == "two":
                    assert all(touched)


@pytest.mark.parametrize("name", SAMPLERS)
def test_forwards_agree_and_a_seed_repeats_its_paths(name: str) -> None:
    net, x, target = setup(Nested, name, 1)
    first = net(x)
    loss(first, target).backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    again = checkpoint(net, x, use_reentrant=False)
    loss(again, target).backward()
    assert torch.equal(first, again)
    for before, p in zip(gradients, net.parameters(), strict=True):
        assert (before is None) == (p.grad is None)
        assert before is None or torch.equal(before, p.grad)
    draw(net, torch.Generator().manual_seed(1))
    assert torch.equal(first, net(x))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_two_path_step_leaves_unsampled_probabilities(optimizer: str) -> None:
    choice = LayerChoice([nn.Linear(2, 2) for _ in range(5)]).double()
    alpha = choice.alpha
    with torch.no_grad():
        alpha.copy_(torch.randn(5))
    step = (
        torch.optim.Adam([alpha], lr=0.1, betas=(0.0, 0.999))
        if optimizer == "adam"
        else torch.optim.SGD([alpha], lr=0.1)
    )
    set_sampler(choice, BinaryGates(2))
    generator = torch.Generator().manual_seed(0)
    moved = 0.0
    for _ in range(20):
        draw(choice, generator)
        before = alpha.detach().softmax(0)
        step.zero_grad()
        (choice(torch.randn(3, 2, dtype=torch.float64)) ** 2).sum().backward()
        step.step()
        after_step(choice)
        after = alpha.detach().softmax(0)
        outside = [k for k in range(5) if k not in choice.drawn.involved]
        assert torch.allclose(before[outside], after[outside], rtol=0, atol=1e-12)
        moved += float((before - after).abs().max())
    assert moved > 0.1


def test_draw_frequencies_follow_their_distributions() -> None:
    """20,000 draws; a count of probability p has a standard deviation below 0.0036, the tolerance is 4 of them."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    n = 20_000
    pairs: dict[tuple[int, ...], int] = {}
    active: dict[tuple[tuple[int, ...], int], int] = {}
    one = torch.zeros(4)
    gumbel = torch.zeros(4)
    for _ in range(n):
        drawn = BinaryGates(2).draw(p.log(), generator)
        pairs[drawn.involved] = pairs.get(drawn.involved, 0) + 1
        key = (drawn.involved, drawn.active)
        active[key] = active.get(key, 0) + 1
        one[BinaryGates(1).draw(p.log(), generator).active] += 1
        gumbel[GumbelSoftmax(0.3, hard=True).draw(p.log(), generator).chosen] += 1
    for i in range(4):
        for j in range(i + 1, 4):
            # without replacement: P(i then j) + P(j then i)
            expected = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
            assert abs(pairs[i, j] / n - expected) < 0.0144
            share = active[(i, j), i] / pairs[i, j]
            assert abs(share - p[i] / (p[i] + p[j])) < 4 * (0.25 / pairs[i, j]) ** 0.5
    assert torch.allclose(one / n, p.float(), atol=0.0144)
    assert torch.allclose(gumbel / n, p.float(), atol=0.0144)
