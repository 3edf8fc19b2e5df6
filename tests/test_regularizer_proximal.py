"""Proximal steps against numeric minimisation, and the steps of real optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize
from torch import Tensor, nn
from torch.autograd.functional import hessian

from oneshot.errors import ConfigurationError
from oneshot.regularizers.groups import Family
from oneshot.regularizers.proximal import (
    block_scale,
    block_soft_threshold,
    effective_steps,
    shrink_,
    soft_threshold,
)


def argmin(v: np.ndarray, t: np.ndarray, penalty: Callable[[Tensor], Tensor]) -> np.ndarray:
    """The minimum of sum (w - v)^2 / (2 t) + penalty(w), by BFGS and then Newton with the Hessian of autograd."""

    def objective(w: Tensor) -> Tensor:
        return ((w - torch.from_numpy(v)).square() / (2 * torch.from_numpy(t))).sum() + penalty(w)

    def slope(w: Tensor) -> Tensor:
        w = w.clone().requires_grad_()
        return torch.autograd.grad(objective(w), w)[0]

    def value(x: np.ndarray) -> float:
        return float(objective(torch.from_numpy(x)))

    start = minimize(value, v, jac=lambda x: slope(torch.from_numpy(x)).numpy(), method="BFGS")
    w = torch.from_numpy(start.x)
    for _ in range(20):
        w = w - torch.linalg.solve(hessian(objective, w), slope(w))
    return w.numpy()


def test_block_soft_threshold_is_the_minimum() -> None:
    generator = np.random.default_rng(0)
    for _ in range(10):
        v = generator.normal(size=5)
        threshold = 0.8 * float(np.linalg.norm(v)) * generator.uniform()
        wanted = argmin(v, np.ones(5), lambda w, s=threshold: s * w.norm())  # type: ignore[misc]
        assert np.abs(block_soft_threshold(torch.from_numpy(v), threshold).numpy() - wanted).max() < 1e-10
    assert not block_soft_threshold(torch.from_numpy(v), float(np.linalg.norm(v))).any()


def test_soft_threshold_is_the_minimum() -> None:
    grid = torch.linspace(-3, 3, 600_001, dtype=torch.float64)
    for v in (-2.0, -0.3, 0.0, 0.49, 0.5, 1.7):
        values = (grid - v).square() / 2 + 0.5 * grid.abs()
        assert (
            abs(float(soft_threshold(torch.tensor(v, dtype=torch.float64), 0.5)) - float(grid[values.argmin()])) < 2e-5
        )
    assert float(soft_threshold(torch.tensor(0.5), 0.5)) == 0.0


@pytest.mark.parametrize("seed", range(8))
def test_different_steps_are_the_minimum(seed: int) -> None:
    generator = np.random.default_rng(seed)
    v, t = generator.normal(size=6), np.repeat(10.0 ** generator.uniform(-3, 1, size=3), 2)
    limit = float(np.linalg.norm(v / t))
    strength = limit * generator.uniform(0.05, 0.9)
    norms = torch.from_numpy(v.reshape(3, 2)).norm(dim=1)[None]
    scale = block_scale(norms, torch.from_numpy(t[::2].copy()), torch.tensor(strength, dtype=torch.float64))[0]
    found = scale.repeat_interleave(2).numpy() * v
    assert np.abs(found - argmin(v, t, lambda w: strength * w.norm())).max() < 1e-10
    zero = block_scale(norms, torch.from_numpy(t[::2].copy()), torch.tensor(limit * (1 + 1e-12), dtype=torch.float64))
    assert not zero.any()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.floats(-8, 8), st.floats(-8, 8)), min_size=1, max_size=5), st.floats(-8, 8))
def test_extreme_steps_solve_the_equation(parts: list[tuple[float, float]], power: float) -> None:
    """Optimality in every part: (v_p - w_p) / t_p = strength w_p / ||w||; the root of scipy as the oracle."""
    v = np.array([10.0**a for a, _ in parts])
    t = np.array([10.0**b for _, b in parts])
    strength = 10.0**power
    scale = block_scale(torch.tensor(v)[None], torch.tensor(t), torch.tensor(strength, dtype=torch.float64))[0].numpy()

    def phi(n: float) -> float:
        return float(np.sqrt(((v / (n + strength * t)) ** 2).sum())) - 1

    if phi(0.0) <= 0:
        assert not scale.any()
        return
    whole = float(np.linalg.norm(v))
    n = brentq(phi, 0.0, whole, xtol=1e-300, rtol=1e-15, maxiter=5000)
    wanted = v * n / (n + strength * t)
    assert np.abs(scale * v - wanted).max() <= 1e-11 * whole


def test_a_part_of_step_zero_does_not_move_and_keeps_the_others_alive() -> None:
    # v = (3 | 4), steps (0 | 1), strength 100: N >= 3, and w_2 = 4 N / (N + 100) with N = sqrt(9 + w_2^2)
    scale = block_scale(torch.tensor([[3.0, 4.0]]), torch.tensor([0.0, 1.0]), torch.tensor(100.0))[0]
    w = 4 * float(scale[1])
    n = math.sqrt(9 + w * w)
    assert float(scale[0]) == 1.0
    assert w > 0
    assert w == pytest.approx(4 * n / (n + 100), rel=1e-12)


def test_shrink_over_parameters_of_different_steps() -> None:
    weight, bias, frozen = (nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((3, 2), (3,), (3,)))
    parameters: dict[str, Tensor] = {"w": weight, "b": bias, "f": frozen}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    family = Family("rows", {"w": torch.tensor([[0], [1], [-1]]), "b": torch.tensor([0, 1, 0])}, 2)
    strengths = torch.tensor([0.1, 1e3], dtype=torch.float64)
    shrink_(family, parameters, strengths, {"w": 0.5, "b": 0.25})
    # group 0: w[0, 0], w[0, 1], b[0], b[2]; group 1: w[1, 0], w[1, 1], b[1]
    v = torch.cat([before["w"][0], before["b"][[0, 2]]])
    wanted = argmin(v.numpy(), np.array([0.5, 0.5, 0.25, 0.25]), lambda w: 0.1 * w.norm())
    found = torch.cat([weight[0], bias[[0, 2]]]).detach().numpy()
    assert np.abs(found - wanted).max() < 1e-10
    assert not weight[1].any()
    assert not bias[1].any()
    assert torch.equal(weight[2], before["w"][2])
    assert torch.equal(frozen, before["f"])


def test_the_last_groups_stay() -> None:
    weight = nn.Parameter(torch.tensor([[-1.0], [3.0], [2.0]]))
    family = Family("rows", {"w": torch.tensor([[0], [1], [2]])}, 3)
    shrink_(family, {"w": weight}, torch.full((3,), 100.0), {"w": 1.0}, least=2)
    assert weight.flatten().tolist() == [0.0, 3.0, 2.0]
    assert not weight.signbit().any()
    shrink_(family, {"w": weight}, torch.full((3,), 0.5), {"w": 1.0}, least=5)
    assert weight.flatten().tolist() == [0.0, 2.5, 1.5]


def distance_per_gradient(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> tuple[float, float]:
    """How far a constant gradient of 1 moves a parameter per step in the long run, and what effective_steps says."""
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = make([w])
    w.grad = torch.ones_like(w)
    last = 0.0
    for _ in range(400):
        last = float(w.detach())
        optimizer.step()
    return last - float(w.detach()), effective_steps(optimizer, {"w": w})["w"]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, dampening=0.5),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, dampening=0.3),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5, alpha=0.5),
        lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.5),
        lambda p: torch.optim.Adam(p, lr=0.1),
        lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), capturable=False, foreach=False),
    ],
)
def test_effective_step_is_how_far_a_constant_gradient_moves(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> None:
    """For a gradient of 1 the moving norms of RMSprop and Adam are 1 in the end."""
    moved, said = distance_per_gradient(make)
    assert said == pytest.approx(moved, rel=1e-6)


def test_steps_of_what_did_not_run_or_is_not_held_are_zero() -> None:
    a, b, c, d = (nn.Parameter(torch.zeros(1)) for _ in range(4))
    for p in (a, b, d):
        p.grad = torch.ones(1)
    groups: list[dict[str, Any]] = [{"params": [a]}, {"params": [b, c], "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    assert effective_steps(optimizer, {"a": a, "b": b, "c": c, "d": d}) == {"a": 0.1, "b": 0.5, "c": 0.0, "d": 0.0}


def test_optimizers_that_cannot_work() -> None:
    w = nn.Parameter(torch.zeros(1))
    with pytest.raises(ConfigurationError, match="maximize=True"):
        effective_steps(torch.optim.Adam([w], maximize=True), {"w": w})
    with pytest.raises(ConfigurationError, match="for ever"):
        effective_steps(torch.optim.SGD([w], lr=0.1, momentum=1.0), {"w": w})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_shrink_in_every_precision(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.3, -0.4]], dtype=dtype))
    shrink_(Family("rows", {"w": torch.tensor([[0], [1]])}, 2), {"w": weight}, torch.tensor([1.0, 1.0]), {"w": 1.0})
    torch.testing.assert_close(weight.detach(), torch.tensor([[2.4, 3.2], [0.0, 0.0]], dtype=dtype))
