"""DARTSTrainer and the gradient through a step of the weights: formulas, finite differences, and what moves when."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import darts, digit_data, equal_states, tiny
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from oneshot import (
    BinaryGates,
    CostModel,
    GumbelSoftmax,
    InputChoice,
    LayerChoice,
    Repeat,
    accuracy,
    arch_parameters,
    decisions,
    draw,
    set_sampler,
    weight_parameters,
)
from oneshot.cost import Term
from oneshot.errors import CheckpointError, ConfigurationError, InfeasibleTargetError, UnsupportedModelError
from oneshot.trainers.darts import DARTSTrainer
from oneshot.trainers.unrolled import (
    Update,
    difference_gradient,
    exact_gradient,
    gradients_of,
    sgd_step,
    updates_of,
    with_weights,
)

# ---- one step of SGD ----------------------------------------------------------------------------------------------

SGDS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.3},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1},
    {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
]


@pytest.mark.parametrize("settings", SGDS, ids=str)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_the_step_is_that_of_torch(settings: dict[str, Any], steps_before: int) -> None:
    weight = nn.Parameter(torch.randn(5, dtype=torch.float64))
    frozen = nn.Parameter(torch.randn(2), requires_grad=False)
    optimizer = torch.optim.SGD([{"params": [weight, frozen]}], lr=0.2, **settings)
    for _ in range(steps_before):
        weight.grad = torch.randn(5, dtype=torch.float64)
        optimizer.step()
    gradient = torch.randn(5, dtype=torch.float64)
    ((found,), (update,)) = updates_of(optimizer)
    assert found is weight
    expected = sgd_step(weight.detach(), gradient, update)
    slope = (sgd_step(weight.detach(), gradient + 1, update) - expected).mean()
    assert update.derivative == pytest.approx(-float(slope))
    weight.grad = gradient
    optimizer.step()
    assert torch.allclose(weight, expected, atol=1e-15)


# ---- the gradient of the alphas -----------------------------------------------------------------------------------


class Toy(nn.Module):
    """Of the paper, figure 2: L_valid = a w - 2 a + 1, L_train = w^2 - 2 a w + a^2; at the optimum, a = w = 1."""

    def __init__(self, a: float, w: float) -> None:
        super().__init__()
        self.a, self.w = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (a, w))

    def valid(self) -> Tensor:
        return self.a * self.w - 2 * self.a + 1

    def train_loss(self) -> Tensor:
        return self.w**2 - 2 * self.a * self.w + self.a**2


def toy_gradient(kind: Any, toy: Toy, update: Update) -> float:
    if kind == 1:
        return float(gradients_of(toy.valid(), [toy.a])[0])  # type: ignore[arg-type]
    if kind == 2:
        return float(difference_gradient(toy.train_loss, toy.valid, [toy.w], [update], [toy.a])[0])
    return float(exact_gradient(toy, toy.train_loss, toy.valid, [toy.w], [update], [toy.a])[0])


@pytest.mark.parametrize("kind", [2, "exact"])
def test_the_second_order_of_the_papers_toy(kind: Any) -> None:
    """w' = w - xi (2 w - 2 a), so dL/da = w' - 2 + a 2 xi: at a = 2, w = -2, xi = 0.25 it is 0 - 2 + 1."""
    assert toy_gradient(kind, Toy(2.0, -2.0), Update(0.25)) == pytest.approx(-1.0, abs=1e-12)
    for a, w, xi in ((0.3, 1.7, 0.1), (-1.0, 0.5, 0.7)):
        moved = w - xi * (2 * w - 2 * a)
        assert toy_gradient(kind, Toy(a, w), Update(xi)) == pytest.approx(moved - 2 + a * 2 * xi, abs=1e-10)
    # momentum 0.5 with buffer 3, decay 0.1, nesterov: d = 2 w - 2 a + 0.1 w, u = d + 0.5 (0.5 * 3 + d)
    a, w, xi = 0.4, 1.2, 0.2
    moved = w - xi * (1.5 * (2.1 * w - 2 * a) + 0.75)
    update = Update(xi, momentum=0.5, weight_decay=0.1, nesterov=True, buffer=torch.tensor(3.0, dtype=torch.float64))
    assert toy_gradient(kind, Toy(a, w), update) == pytest.approx(moved - 2 + a * xi * 1.5 * 2, abs=1e-10)


@pytest.mark.parametrize(("kind", "end"), [(1, 2.0), (2, 1.0), ("exact", 1.0)])
def test_only_the_second_order_finds_the_optimum_of_the_toy(kind: Any, end: float) -> None:
    """As in the paper's figure 2, from (2, -2): the first order ends in (2, 2), where w = a and L_valid does not."""
    toy, update = Toy(2.0, -2.0), Update(0.5)
    for _ in range(400):
        gradient = toy_gradient(kind, toy, update)
        with torch.no_grad():
            toy.a -= 0.05 * gradient
            toy.w.copy_(sgd_step(toy.w, 2 * toy.w - 2 * toy.a, update))
    assert toy.a.item() == pytest.approx(end, abs=1e-3)
    assert toy.w.item() == pytest.approx(end, abs=1e-3)


class Still(nn.Module):
    """Choices of each kind in float64, nested too, one of a single candidate; BatchNorm, nothing random."""

    def __init__(self) -> None:
        super().__init__()
        inner = LayerChoice([nn.Tanh(), nn.Linear(4, 4)], "inner")
        self.one = LayerChoice([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), inner), nn.Identity()], "one")
        self.alone = LayerChoice([nn.Linear(4, 4)], "alone")
        self.norm = nn.BatchNorm1d(4)
        self.deep = Repeat(lambda i: nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()), depth=(1, 2), label="deep")
        self.join = InputChoice(n_candidates=2, n_chosen=1, label="join")
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.alone(self.one(x)))
        return self.head(self.join([self.deep(y), y]))


def still(seed: int, **settings: Any) -> tuple[Still, list[nn.Parameter], list[nn.Parameter], list[Update], Any]:
    """The model, its alphas, weights with their updates (two groups, buffers in the first), and its losses."""
    torch.manual_seed(seed)
    model = Still().double()
    with torch.no_grad():
        for alpha in arch_parameters(model):
            alpha.copy_(torch.randn_like(alpha))
    weights = weight_parameters(model)
    groups = [{"params": weights[:6]}, {"params": weights[6:], "lr": 0.05}]
    optimizer = torch.optim.SGD(groups, lr=0.3, **settings)
    for p in weights[:6]:
        p.grad = 0.1 * torch.randn_like(p)
    optimizer.step()
    optimizer.zero_grad()
    data = [(torch.randn(12, 4).double(), torch.arange(12) % 3) for _ in range(2)]

    def losses(k: int) -> Callable[[], Tensor]:
        return lambda: nn.functional.cross_entropy(model(data[k][0]), data[k][1])

    model.alone.alpha.requires_grad_(False)  # type: ignore[union-attr]
    alphas = [a for a in arch_parameters(model) if a.requires_grad]
    return model, alphas, *updates_of(optimizer), (losses(0), losses(1))


def by_differences(
    model: nn.Module,
    alphas: list[nn.Parameter],
    weights: list[nn.Parameter],
    updates: list[Update],
    losses: tuple[Callable[[], Tensor], Callable[[], Tensor]],
) -> list[Tensor]:
    """Central differences of L_valid(w - xi u(grad L_train(w, a)), a), the whole of it computed anew each time."""

    def value() -> float:
        steps = torch.autograd.grad(losses[0](), weights)
        moved = [sgd_step(w, g, u).detach() for w, g, u in zip(weights, steps, updates, strict=True)]
        return with_weights(model, weights, moved, losses[1]).item()

    found, h = [], 1e-5
    for alpha in alphas:
        gradient = torch.zeros_like(alpha)
        for i in range(alpha.numel()):
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    alpha[i] += sign * h
                sides.append(value())
                with torch.no_grad():
                    alpha[i] -= sign * h
            gradient[i] = (sides[0] - sides[1]) / (2 * h)
        found.append(gradient)
    return found


@pytest.mark.parametrize("settings", SGDS, ids=str)
def test_exact_gradient_against_finite_differences(settings: dict[str, Any]) -> None:
    model, alphas, weights, updates, (train, valid) = still(1, **settings)
    state = copy.deepcopy(model.state_dict())
    exact = exact_gradient(model, train, valid, weights, updates, alphas)
    model.load_state_dict(state)  # BatchNorm statistics are the caller's business
    for found, expected in zip(exact, by_differences(model, alphas, weights, updates, (train, valid)), strict=True):
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-9), (found, expected)
    first = gradients_of(valid(), alphas)
    assert any(not torch.allclose(a, b, rtol=1e-2) for a, b in zip(exact, first, strict=True) if b is not None)


def test_the_difference_converges_to_the_exact_gradient_quadratically() -> None:
    model, alphas, weights, updates, (train, valid) = still(2, momentum=0.9, weight_decay=0.1)
    exact = exact_gradient(model, train, valid, weights, updates, alphas)
    errors = []
    for epsilon in (0.4, 0.04, 0.004):
        found = difference_gradient(train, valid, weights, updates, alphas, epsilon=epsilon)
        errors.append(max(float((a - b).abs().max()) for a, b in zip(found, exact, strict=True)))
    assert errors[1] < errors[0] / 50
    assert errors[2] < errors[1] / 50
    assert errors[2] < 1e-6


def test_weights_come_back_bit_for_bit_and_without_a_step_it_is_the_first_order() -> None:
    model, alphas, weights, updates, (train, valid) = still(3, momentum=0.9)
    with torch.no_grad():
        weights[0][0, 0] = -0.0
    before = [w.detach().clone() for w in weights]
    pointers = [w.data_ptr() for w in weights]
    difference_gradient(train, valid, weights, updates, alphas)
    assert all(
        torch.equal(w, b) and torch.equal(w.signbit(), b.signbit()) for w, b in zip(weights, before, strict=True)
    )
    assert pointers == [w.data_ptr() for w in weights]
    assert all(w.requires_grad and w.grad is None for w in weights)
    still_there = [update._replace(lr=0.0) for update in updates]
    first = gradients_of(valid(), alphas)
    for found in (
        difference_gradient(train, valid, weights, still_there, alphas),
        exact_gradient(model, train, valid, weights, still_there, alphas),
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True) if b is not None)

    def fails() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        difference_gradient(train, fails, weights, updates, alphas)
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def test_dropout_is_the_same_on_both_sides_of_the_difference() -> None:
    """With masks of its own each, the difference would be that of two networks, divided by 0.02 / |v|."""
    torch.manual_seed(0)
    choice = LayerChoice([nn.Linear(6, 6), nn.Tanh()], label="c")
    model = nn.Sequential(choice, nn.Dropout(0.5), nn.Linear(6, 3)).double()
    x, y = torch.randn(16, 6).double(), torch.arange(16) % 3
    weights, updates = updates_of(torch.optim.SGD(weight_parameters(model), lr=0.3))

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(x), y)

    torch.manual_seed(4)
    exact = exact_gradient(model, loss, loss, weights, updates, [choice.alpha])
    after = torch.rand(3)
    torch.manual_seed(4)
    found = difference_gradient(loss, loss, weights, updates, [choice.alpha], epsilon=1e-3)
    assert torch.equal(after, torch.rand(3))
    assert torch.allclose(found[0], exact[0], atol=1e-7)


@pytest.mark.parametrize("sampler", [BinaryGates(2), GumbelSoftmax(hard=True)], ids=str)
def test_hard_gates_have_no_second_derivative(sampler: Any) -> None:
    model, alphas, weights, updates, (train, valid) = still(4)
    set_sampler(model, sampler)
    draw(model, torch.Generator().manual_seed(0))
    with pytest.raises(UnsupportedModelError, match=r"cannot be differentiated twice: .*Use order=2"):
        exact_gradient(model, train, valid, weights, updates, alphas)
    found = difference_gradient(train, valid, weights, updates, alphas)
    assert all(bool(g.isfinite().all()) for g in found)


def test_recurrent_layers_and_tied_weights_are_replaced_too() -> None:
    """In both ways to put w' in the place of w: an LSTM keeps a list of its weights of its own."""
    torch.manual_seed(0)

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 3, batch_first=True)
            self.choice = LayerChoice([nn.Linear(3, 3), nn.Tanh()], label="c")
            self.out = nn.Linear(3, 3)
            self.out.weight = self.choice["0"].weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.choice(self.lstm(x)[0][:, -1]))

    model = Recurrent().double()
    x, y = torch.randn(8, 5, 3).double(), torch.arange(8) % 3

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(x), y)

    weights, updates = updates_of(torch.optim.SGD(weight_parameters(model), lr=0.5))
    alphas = [model.choice.alpha]
    exact = exact_gradient(model, loss, loss, weights, updates, alphas)
    found = difference_gradient(loss, loss, weights, updates, alphas, epsilon=1e-3)
    expected = by_differences(model, alphas, weights, updates, (loss, loss))
    assert torch.allclose(exact[0], expected[0], rtol=1e-6, atol=1e-9)
    assert torch.allclose(found[0], expected[0], rtol=1e-4, atol=1e-7)


# ---- the steps of the trainer --------------------------------------------------------------------------------------


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def moved(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}


def ready(model: nn.Module, **changes: Any) -> tuple[DARTSTrainer, Any, Any]:
    trainer = darts(model, **changes)
    trainer._prepare()
    model.train()
    batches = iter(DataLoader(digit_data(), batch_size=32))
    return trainer, next(batches), next(batches)


@pytest.mark.parametrize("order", [1, 2, "exact"])
def test_an_arch_step_moves_alphas_only(order: Any) -> None:
    """Not a weight, nor a gradient, BatchNorm buffer or momentum; the weight step moves all of these and no alpha."""
    model = tiny()
    trainer, batch, arch_batch = ready(model, order=order)
    trainer._weight_step(batch)
    for p in model.parameters():
        p.grad = None
    before, momenta = state(model), copy.deepcopy(trainer.optimizer.state_dict()["state"])
    for _ in range(2):
        trainer._arch_step(arch_batch, batch)
    assert moved(before, model) == {"one.alpha", "two.alpha", "deep.alpha"}
    assert all(p.grad is None and p.requires_grad for p in weight_parameters(model))
    after = trainer.optimizer.state_dict()["state"]
    assert all(torch.equal(after[i]["momentum_buffer"], momenta[i]["momentum_buffer"]) for i in momenta)
    assert all(m.training for m in model.modules())
    before = state(model)
    trainer._weight_step(batch)
    assert moved(before, model) == {name for name in before if not name.endswith("alpha")}
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("order", [2, "exact"])
def test_the_trainers_gradient_is_that_of_the_formula(order: Any) -> None:
    """alpha.grad against central differences of CE(w'(alpha), alpha) + lambda (E(alpha) - ref) / ref."""
    costs = {"one": [0.7, 2.0, 0.1], "deep": [1.0, 3.0]}
    model, alphas, _, _, _ = still(5)
    model.alone.alpha.requires_grad_(True)  # type: ignore[union-attr]
    data = TensorDataset(torch.randn(48, 4).double(), torch.arange(48) % 3)
    terms = [Term(t, {k: frozenset({i})}) for k, row in costs.items() for i, t in enumerate(row)]
    trainer = darts(
        model,
        order=order,
        dataset=data,
        batch_size=12,
        arch_fraction=0.5,
        loss=nn.CrossEntropyLoss(),
        metrics=None,
        cost=CostModel("work", "1", [Term(1.0, {}), *terms], model),
        ref_latency=2.0,
        grad_reg_loss_params={"lambda": 0.3},
        dummy_input=(1, 4),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01),
    )
    trainer._prepare()
    model.train()
    batch, arch_batch = (tuple(t[rows] for t in data.tensors) for rows in (slice(0, 12), slice(12, 24)))
    trainer._weight_step(batch)
    trainer.arch_optimizer.step = lambda: None  # type: ignore[method-assign, assignment]  # gradients are looked at
    trainer._arch_step(arch_batch, batch)
    found = [alpha.grad.clone() for alpha in alphas]
    assert model.alone.alpha.grad is None
    weights, updates = updates_of(trainer.optimizer)

    def train() -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def valid() -> Tensor:
        p = {label: d.alpha.softmax(0) for label, d in decisions(model).items()}
        expected = 1.0 + sum(p[k] @ torch.tensor(row, dtype=torch.float64) for k, row in costs.items())
        return nn.functional.cross_entropy(model(arch_batch[0]), arch_batch[1]) + 0.3 * (expected - 2.0) / 2.0

    tolerance = 1e-8 if order == "exact" else 1e-5  # of the difference, whose length is 0.01
    for gradient, expected in zip(found, by_differences(model, alphas, weights, updates, (train, valid)), strict=True):
        assert torch.allclose(gradient, expected, rtol=1e-4, atol=tolerance), (gradient, expected)


def test_with_learning_rate_0_the_second_order_is_the_first() -> None:
    histories = []
    for order in (1, 2, "exact"):
        model = tiny()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
        trainer = darts(model, order=order, optimizer=optimizer, warmup_epochs=0, num_epochs=1)
        trainer.train()
        histories.append([alpha.detach().clone() for alpha in trainer.alphas])
    for other in histories[1:]:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(histories[0], other, strict=True))
    assert all(bool(a.any()) for a in histories[0])


def test_gradients_of_the_weights_are_clipped_and_only_theirs() -> None:
    """With SGD of lr 1 the weights move by the clipped norm, 0.01; without a limit by more."""
    for clip, expected in ((0.01, 0.01), (None, None)):
        model = tiny()
        trainer, batch, arch_batch = ready(model, grad_clip=clip, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
        before = [w.detach().clone() for w in trainer.weights]
        trainer._arch_step(arch_batch, batch)
        trainer._weight_step(batch)
        length = math.sqrt(
            sum(float((w - b).detach().square().sum()) for w, b in zip(trainer.weights, before, strict=True))
        )
        assert length == pytest.approx(expected, rel=1e-3) if expected else length > 0.1


def test_defaults_of_the_paper() -> None:
    model = nn.Sequential(LayerChoice([nn.Linear(2, 2), nn.Identity()]), nn.Linear(2, 2))
    trainer = DARTSTrainer(
        model, loss=nn.CrossEntropyLoss(), metrics=None, optimizer=torch.optim.SGD(model.parameters(), lr=0.025)
    )
    (group,) = trainer.arch_optimizer.param_groups
    assert type(trainer.arch_optimizer) is torch.optim.Adam
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-4, (0.5, 0.999), 1e-3)
    assert (trainer.clip.limits["weights"], trainer.arch_fraction, trainer.num_epochs, trainer.order) == (
        5.0,
        0.5,
        50,
        1,
    )


def test_random_alphas_are_drawn_at_the_start_of_the_search() -> None:
    model = tiny()
    trainer = darts(model, alpha_std=1e-3, arc_learning_rate=0.0, arch_optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    trainer.train()
    values = torch.cat([alpha.detach() for alpha in arch_parameters(model)])
    assert float(values.abs().min()) > 0
    assert 2e-4 < float(values.std()) < 3e-3
    other = tiny()
    darts(other, alpha_std=1e-3, num_epochs=0).train()
    assert not any(bool(alpha.any()) for alpha in arch_parameters(other))


class TwoEdges(nn.Module):
    """y = one(x) + two(x) with labels of sign(x0 x1): the product on one edge is what is needed."""

    def __init__(self) -> None:
        super().__init__()
        names = ("linear", "product", "skip")
        self.one = LayerChoice({name: made() for name, made in zip(names, MADE, strict=True)}, label="one")
        self.two = LayerChoice({name: made() for name, made in zip(names, MADE, strict=True)}, label="two")
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x)))


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x[:, :1] * x[:, 1:]).expand(-1, 2)


MADE = (lambda: nn.Linear(2, 2), Product, nn.Identity)


@pytest.mark.parametrize("order", [1, 2, "exact"])
def test_the_operation_that_the_task_needs_is_found(order: Any) -> None:
    torch.manual_seed(0)
    model = TwoEdges()
    x = torch.randn(512, 2)
    data = TensorDataset(x, (x.prod(1) > 0).long())
    trainer = DARTSTrainer(
        model,
        loss=nn.CrossEntropyLoss(),
        metrics=lambda output, target: accuracy(output, target),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        dataset=data,
        num_epochs=8,
        batch_size=32,
        workers=0,
        device="cpu",
        order=order,
        arc_learning_rate=0.05,
        progress=False,
    )
    history = trainer.train()
    assert "product" in trainer.export().values()
    assert history[-1]["acc1"] > 0.9


# ---- costs, resuming, errors ---------------------------------------------------------------------------------------


def test_strength_and_targets_steer_the_expected_cost() -> None:
    soft = []
    own = {"grad_reg_loss_params": None, "ref_latency": 65.0, "normalize": True}
    targets = {"targets": {"macs": 20_000}, "normalize": False}
    for changes in ({"strength": 0.0}, {"strength": 10.0}, targets):
        trainer = darts(tiny(), **{"warmup_epochs": 0, "num_epochs": 3, "arc_learning_rate": 0.15, **own, **changes})
        history = trainer.train()
        soft.append(history[-1]["macs_soft"])
        if changes.get("strength") == 0:
            assert history[-1]["cost_share"] == 0
    assert soft[1] < soft[0]
    assert history[-1]["macs_hard"] <= 20_000
    assert sum(history[-1][f"macs_{name}"] for name in ("target", "unprojected", "multiplier")) >= 20_000
    assert soft[2] < soft[0]
    assert trainer._cost_references() == {"macs": 20_000}
    with pytest.raises(InfeasibleTargetError, match="macs"):
        darts(tiny(), strength=1.0, targets={"macs": 1}, **own).train()


def test_multiplied_costs_and_normalized_ones_run_too() -> None:
    kinds: list[dict[str, Any]] = [
        {"grad_reg_loss_type": "mul#log", "grad_reg_loss_params": {"alpha": 0.5, "beta": 0.6}},
        {"normalize": True, "ref_latency": 65.0, "cost": ["macs", "peak_memory"]},
        {"cost": None, "grad_reg_loss_params": None, "ref_latency": 65.0},
    ]
    for changes in kinds:
        history = darts(tiny(), num_epochs=1, warmup_epochs=0, **changes).train()
        assert (0 < history[-1]["cost_share"] < 1) == ("cost" not in changes or changes["cost"] is not None)


def test_resume_in_the_middle_of_an_epoch_is_bit_for_bit(tmp_path: Path) -> None:
    model = tiny()
    settings = {"order": 2, "alpha_std": 1e-3}
    trainer = darts(model, checkpoint_dir=tmp_path, checkpoint_every=1, **settings)
    saved: dict[int, Path] = {}
    save = trainer.save

    def keep(path: Any) -> None:
        save(path)
        saved[trainer.step] = Path(shutil.copy(path, tmp_path / f"at{trainer.step}.ckpt"))

    trainer.save = keep  # type: ignore[method-assign]
    history = trainer.train()
    for step in (6, 9):
        other = tiny(seed=99)
        again = darts(other, **settings)
        again.resume(saved[step])
        assert again.train() == history, step
        assert equal_states(model.state_dict(), other.state_dict()), step
    with pytest.raises(CheckpointError, match="order 2 there and 'exact' here"):
        darts(tiny(), **{**settings, "order": "exact"}).resume(saved[8])


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"order": 3}, "order=3: allowed are 1, 2 and 'exact'"),
    ({"order": True}, "order=True: allowed"),
    ({"order": 2, "optimizer": torch.optim.Adam}, "optimizer: Adam; the second order goes through a step of"),
    ({"order": "exact", "precision": "bf16-mixed"}, "would be lost in the rounding"),
    ({"alpha_std": 0}, "alpha_std=0: a number above 0"),
    ({"grad_clip": -1}, "grad_clip=-1: a number above 0"),
    ({"grad_clip": float("nan")}, "grad_clip=nan"),
    ({"grad_reg_loss_params": None}, r"'add#linear' needs \['lambda'\]"),
    ({"ref_latency": 65.0}, "ref_latency=65.0 is the default in ms"),
    ({"ref_latency": None}, "ref_latency=None: a finite number"),
    ({"normalize": True}, "normalize=True and ref_latency=10000: give one"),
    ({"strength": 1.0}, "leave out grad_reg_loss_params"),
    (
        {"strength": 1.0, "cost": None, "grad_reg_loss_params": None, "ref_latency": 65.0},
        "give cost or applied_hardware",
    ),
    ({"cost": "watts"}, "'watts'"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[m[:24] for _, m in WRONG])
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        darts(tiny(), **changes)


def test_sgd_that_climbs_is_refused() -> None:
    model = tiny()
    with pytest.raises(ConfigurationError, match="maximize=True"):
        darts(model, order=2, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, maximize=True))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class OnceOnly(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)


def test_a_network_that_cannot_be_differentiated_twice_is_refused_before_the_first_step() -> None:
    model = tiny()
    model.two = LayerChoice([nn.Sequential(nn.Conv2d(6, 6, 1), OnceOnly()), nn.Conv2d(6, 6, 3, padding=1)])
    before = state(model)
    trainer = darts(model, order="exact", cost=None, grad_reg_loss_params=None, ref_latency=65.0)
    with pytest.raises(UnsupportedModelError, match=r"cannot be differentiated twice.*order=2"):
        trainer.train()
    assert trainer.step == 0
    assert not moved(before, model)
    assert len(darts(model, order=2, cost=None, grad_reg_loss_params=None, ref_latency=65.0, num_epochs=1).train()) == 2
