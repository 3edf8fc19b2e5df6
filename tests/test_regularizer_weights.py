"""Penalties on weights: their numbers, and what their proximal steps do after steps of real optimizers."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from oneshot.errors import ConfigurationError, InputTypeError
from oneshot.mutables import LayerChoice
from oneshot.regularizers.base import Regularizer
from oneshot.regularizers.group_lasso import GroupLasso
from oneshot.regularizers.groups import Family
from oneshot.regularizers.lambda_max import lambda_max
from oneshot.regularizers.layer_groups import families
from oneshot.regularizers.schedule import Schedule
from oneshot.regularizers.weights import L1, L2, l1


def conv(values: Tensor) -> nn.Conv2d:
    layer = nn.Conv2d(values.shape[1], values.shape[0], tuple(values.shape[2:]), bias=False)  # type: ignore[arg-type]
    layer.weight.data = values
    return layer


def linear(values: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(values[0]), len(values), bias=False)
    layer.weight.data = torch.tensor(values)
    return layer


def lasso(groups: str, strength: float = 1.0) -> GroupLasso:
    """As Distiller sums it: without the square root of the sizes."""
    return GroupLasso(groups, strength, size_factor="none", method="subgradient")


# --- the numbers


def test_l1_of_a_small_range() -> None:
    net = conv(torch.arange(24.0).sub(11).view(2, 3, 2, 2))  # 11 + ... + 1 + 0 + 1 + ... + 12 = 66 + 78
    assert float(L1("*", 0.1)(net.eval()).detach()) == pytest.approx(14.4)
    assert float(l1(net.parameters()).detach()) == 144.0
    assert float(L1(net.parameters(), 0.1).value(net)) == pytest.approx(14.4)


@pytest.mark.parametrize(
    ("groups", "wanted"),
    [("kernels", 7.38846), ("output_channels", 4.79895), ("input_channels", 5.86679), ("layer", 3.4)],
)
def test_sums_of_norms_of_a_small_range(groups: str, wanted: float) -> None:
    net = conv(torch.arange(24.0).sub(11).view(2, 3, 2, 2))
    assert float(lasso(groups, 0.1)(net).detach()) == pytest.approx(wanted, abs=5e-6)


def test_rows_and_columns() -> None:
    net = linear([[3.0, 4.0], [0.0, 0.0], [5.0, 12.0]])
    rows, columns = lasso("rows"), lasso("columns")
    assert float(rows(net).detach()) == pytest.approx(18)
    assert float(columns(net).detach()) == pytest.approx(math.sqrt(34) + math.sqrt(160))
    both = rows + columns
    assert float(both(net).detach()) == pytest.approx(36.48006, abs=1e-5)
    assert both.last == {"group_lasso": pytest.approx(18), "group_lasso_2": pytest.approx(18.48006, abs=1e-5)}


def test_the_gradient_of_a_zero_filter_is_zero_and_that_of_another_has_norm_1() -> None:
    net = conv(torch.randn(4, 3, 2, 2))
    net.weight.data[1] = 0.0
    lasso("output_channels")(net).backward()
    assert net.weight.grad is not None
    torch.testing.assert_close(net.weight.grad.flatten(1).norm(dim=1), torch.tensor([1.0, 0.0, 1.0, 1.0]))


def test_squares_are_the_same_for_every_partition_and_norms_are_not() -> None:
    torch.randn(1, 5, dtype=torch.float64)  # then the numbers are those of a study made before this library
    w = torch.randn(8, 4, 3, 3)
    for parts in (w, w.transpose(0, 1), w.flatten(0, 1)):
        assert sum(float(part.square().sum()) for part in parts) == pytest.approx(257.6767, abs=1e-3)
    assert float(L2("*", 1.0)(conv(w)).detach()) == pytest.approx(257.6767, abs=1e-3)
    kinds = {"output_channels": 270.74, "input_channels": 271.68, "kernels": 263.88}
    for kind, wanted in kinds.items():
        assert float(GroupLasso(kind, 1.0).value(conv(w))) == pytest.approx(wanted, abs=6e-3)


def test_l2_is_weight_decay() -> None:
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    two.load_state_dict(one.state_dict())
    decayed = torch.optim.SGD(one.parameters(), lr=0.1, weight_decay=0.4)
    plain = torch.optim.SGD(two.parameters(), lr=0.1)
    x = torch.randn(5, 3)
    one(x).square().mean().backward()
    (two(x).square().mean() + L2("*", 0.2)(two)).backward()
    decayed.step()
    plain.step()
    torch.testing.assert_close(one.weight, two.weight)
    torch.testing.assert_close(one.bias, two.bias)


def test_three_penalties_on_one_loss() -> None:
    net = linear([[3.0, 4.0], [0.0, -1.0]])
    loss = net(torch.ones(1, 2)).sum()
    before = loss.detach().clone()
    parts = (L2("*", 0.1), L1("*", 0.5, method="subgradient"), lasso("rows", 2.0))
    penalty = parts[0] + parts[1] + parts[2]
    overall = loss + penalty(net)
    assert penalty.parts == parts
    assert list(penalty.last.items()) == [
        ("l2", pytest.approx(0.1 * 26)),
        ("l1", pytest.approx(0.5 * 8)),
        ("group_lasso", pytest.approx(2 * 6)),
    ]
    assert float(overall.detach()) == pytest.approx(float(before) + 2.6 + 4 + 12)
    assert torch.equal(loss, before)
    with pytest.raises(TypeError):
        parts[0] + 1.0  # type: ignore[operator]


def test_strength_and_schedule_scale_the_value() -> None:
    net = linear([[3.0, 4.0]])
    schedule = Schedule(start=1, end=4, ramp="linear")
    for penalty, whole in (
        (L2("*", 2.0, schedule=schedule), 50.0),
        (L1("*", 2.0, method="subgradient", schedule=schedule), 14.0),
        (GroupLasso("rows", 2.0, size_factor="none", method="subgradient", schedule=schedule), 10.0),
    ):
        found = [float(penalty(net, epoch, 5).detach()) for epoch in range(5)]
        assert found == pytest.approx([0.0, 0.0, whole / 2, whole, 0.0])


# --- the convex problem: digits, one group per pixel


def digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    x = (x / 16.0).astype("float32")
    x, _, y, _ = train_test_split(x, y, test_size=0.25, stratify=y, random_state=0)
    return torch.from_numpy((x - x.mean()) / x.std()).double(), torch.from_numpy(y)


@pytest.mark.parametrize(("share", "wanted"), [(0.5, 47), (1.01, 64)])
def test_the_optimum_of_the_convex_problem(share: float, wanted: int) -> None:
    """With momentum from weights at random, then without from a place near by where no group is zero."""
    x, y = digits()
    with_ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    smoothness = 0.5 * float(torch.linalg.eigvalsh(with_ones.T @ with_ones / len(x)).max())
    net = nn.Linear(64, 10).double()
    with torch.no_grad():
        net.bias.copy_(F.one_hot(y, 10).double().mean(0).log())
    penalty = GroupLasso("columns", share, relative=True)
    (largest,) = penalty.calibrate(net, lambda: F.cross_entropy(net(x), y)).values()
    assert largest == pytest.approx(0.0830, abs=5e-5)
    for momentum, lr, steps in ((0.9, 1 / smoothness, 400), (0.0, 1.9 / smoothness, 250)):
        optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum)
        penalty.attach(net, optimizer)
        for _ in range(steps):
            optimizer.zero_grad()
            (F.cross_entropy(net(x), y) + penalty(net)).backward()
            optimizer.step()
        zero, residual = optimality(net, x, y, share * largest)
        assert zero == wanted
        assert residual <= 1e-4
        penalty.detach()
        with torch.no_grad():
            net.weight.add_(1e-3 * torch.randn_like(net.weight))


def optimality(net: nn.Linear, x: Tensor, y: Tensor, strength: float) -> tuple[int, float]:
    """Number of zero columns, and how far the conditions of Karush, Kuhn and Tucker are missed: of a zero column
    ||slope|| <= strength sqrt(10); of another slope + strength sqrt(10) w / ||w|| = 0."""
    (slope,) = torch.autograd.grad(F.cross_entropy(net(x), y), net.weight)
    missed, zero, bound = 0.0, 0, strength * math.sqrt(10)
    for w, g in zip(net.weight.detach().T, slope.T, strict=True):
        if w.any():
            missed = max(missed, float((g + bound * w / w.norm()).norm()))
        else:
            zero += 1
            missed = max(missed, float(g.norm()) / bound - 1)
    return zero, missed


# --- what happens after a step


def stepped(net: nn.Module, optimizer: torch.optim.Optimizer, *regularizers: Regularizer) -> None:
    """One step with all gradients 0: only proximal steps move anything."""
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    for regularizer in regularizers:
        regularizer(net)
    optimizer.step()


def test_each_parameter_group_has_its_own_step() -> None:
    net = nn.Sequential(linear([[3.0, 4.0]]), linear([[10.0]]), linear([[10.0]]))
    groups = [
        {"params": [net[0].weight]},
        {"params": [net[1].weight], "lr": 0.2, "momentum": 0.5},
        {"params": [net[2].weight], "momentum": 0.8, "dampening": 0.5},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    penalty = GroupLasso("rows", 10.0, size_factor="none")
    penalty.attach(net, optimizer)
    stepped(net, optimizer, penalty)
    # 0.1 * 10 of norm 5; 0.2 / 0.5 * 10 of 10; 0.1 * 0.5 / 0.2 * 10 of 10
    torch.testing.assert_close(net[0].weight.detach(), torch.tensor([[2.4, 3.2]]))
    assert [float(net[i].weight.detach()) for i in (1, 2)] == pytest.approx([6.0, 7.5])


def test_a_scheduler_of_the_learning_rate_is_followed() -> None:
    net = linear([[10.0]])
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    penalty = L1("*", 1.0)
    penalty.attach(net, optimizer)
    for wanted in (9.0, 8.9, 8.89):
        stepped(net, optimizer, penalty)
        scheduler.step()
        assert float(net.weight.detach()) == pytest.approx(wanted)


def test_the_schedule_of_the_last_call_holds() -> None:
    net = linear([[10.0]])
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    penalty = L1("*", 1.0, schedule=Schedule(start=1, every=2, end=6))
    penalty.attach(net, optimizer)
    found = []
    for epoch in range(7):
        penalty(net, epoch, 7)
        with torch.no_grad():
            penalty(net)  # for a log: changes nothing
        stepped(net, optimizer)
        found.append(float(net.weight.detach()))
    assert found == [10.0, 9.0, 9.0, 8.0, 8.0, 7.0, 7.0]


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
def test_exact_zeros_with_adaptive_optimizers(make: Callable[..., torch.optim.Optimizer]) -> None:
    """y = 2 x_0 + noise, batches of 8: column 1 is exactly 0 after most steps, with a subgradient after none."""
    zeros = {}
    for method in ("proximal", "subgradient"):
        net = linear([[1.0, 0.1]])
        optimizer = make(net.parameters(), lr=0.01)
        penalty = GroupLasso("columns", 0.5, method=method)  # type: ignore[arg-type]
        penalty.attach(net, optimizer)
        zeros[method] = torch.zeros(1, 2)
        for step in range(300):
            x = torch.randn(8, 2)
            optimizer.zero_grad()
            (F.mse_loss(net(x), 2 * x[:, :1] + 0.5 * torch.randn(8, 1)) + penalty(net)).backward()
            optimizer.step()
            zeros[method] += (net.weight == 0) * (step >= 200)
    assert zeros["proximal"][0, 0] == 0
    assert zeros["proximal"][0, 1] > 75
    assert not zeros["subgradient"].any()


def test_what_did_not_run_does_not_move() -> None:
    net = nn.ModuleList([linear([[1.0, 2.0]]), linear([[1.0, 2.0]])])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    penalty = L1("*", 0.1) + GroupLasso("rows", 0.1)
    penalty.attach(net, optimizer)
    net[0](torch.ones(1, 2)).sum().backward()
    penalty(net)
    optimizer.step()
    assert torch.equal(net[1].weight.detach(), torch.tensor([[1.0, 2.0]]))
    assert not torch.equal(net[0].weight.detach(), torch.tensor([[1.0, 2.0]]))


def test_accumulated_gradients_shrink_once_per_step() -> None:
    net = linear([[10.0]])
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    penalty = L1("*", 1.0)
    penalty.attach(net, optimizer)
    for _ in range(4):
        (0 * net(torch.ones(1, 1)).sum() + penalty(net)).backward()
    assert float(net.weight.detach()) == 10.0
    optimizer.step()
    assert float(net.weight.detach()) == 9.0


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_leaves_out_shrinks_nothing(fused: bool) -> None:
    net = linear([[1.0, 2.0]])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    penalty = L1("*", 0.1) + GroupLasso("rows", 0.1)
    penalty.attach(net, optimizer)
    for factor, moves in ((float("inf"), False), (1.0, True)):
        optimizer.zero_grad()
        before = net.weight.detach().clone()
        scaler.scale(net(torch.ones(1, 2)).sum() * factor + penalty(net)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, net.weight.detach()) is not moves


def test_the_value_of_a_proximal_penalty_has_no_gradient() -> None:
    net = linear([[3.0, 4.0]])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for penalty in (L1("*", 0.5), GroupLasso("rows", 0.5)):
        penalty.attach(net, optimizer)
        value = penalty(net)
        assert not value.requires_grad
        assert float(value) == pytest.approx(penalty.last[next(iter(penalty.last))])
        assert penalty.pulls


def test_never_attached_is_an_error_in_training_only() -> None:
    net = linear([[3.0, 4.0]])
    for penalty in (L1("*", 0.5), GroupLasso("rows", 0.5)):
        with pytest.raises(ConfigurationError, match="was never attached"):
            penalty(net.train())
        assert float(penalty(net.eval())) > 0
        with torch.no_grad():
            assert float(penalty(net.train())) > 0
        assert float(penalty.value(net.train())) > 0
    assert float(L1("*", 0.0)(net)) == 0.0
    assert not L1("*", 0.0).pulls
    assert L1("*", 0.5, method="subgradient")(net).requires_grad


def test_detached_it_does_nothing() -> None:
    net = linear([[10.0]])
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    penalty = L1("*", 1.0) + GroupLasso("rows", 1.0)
    penalty.attach(net, optimizer)
    penalty.detach()
    stepped(net, optimizer)
    assert float(net.weight.detach()) == 10.0
    assert not optimizer._optimizer_step_post_hooks
    penalty.attach(net, optimizer)
    stepped(net, optimizer, penalty)
    assert float(net.weight.detach()) == 8.0


def test_l1_then_group_lasso_is_the_sparse_group_lasso() -> None:
    """Against the minimum of (w - v)^2 / 2 + 0.1 |w|_1 + 0.2 ||w||_2 on a grid."""
    net = linear([[0.5, -0.15]])
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    penalty = L1("*", 0.1) + GroupLasso("rows", 0.2, size_factor="none")
    penalty.attach(net, optimizer)
    stepped(net, optimizer, penalty)
    a, b = torch.meshgrid(torch.linspace(0, 0.5, 501), torch.linspace(-0.2, 0.1, 301), indexing="ij")
    value = ((a - 0.5) ** 2 + (b + 0.15) ** 2) / 2 + 0.1 * (a.abs() + b.abs()) + 0.2 * (a**2 + b**2).sqrt()
    best = int(value.argmin())
    wanted = torch.stack([a.flatten()[best], b.flatten()[best]])
    torch.testing.assert_close(net.weight.detach()[0], wanted, rtol=0, atol=2e-3)


def test_groups_that_cannot_shrink_one_after_the_other() -> None:
    net = conv(torch.randn(4, 3, 2, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    kernels, outputs, inputs = (GroupLasso(name, 0.1) for name in ("kernels", "output_channels", "input_channels"))
    (kernels + outputs).attach(net, optimizer)
    with pytest.raises(ConfigurationError, match=r"overlap without one lying in the other.*method='subgradient'"):
        inputs.attach(net, optimizer)
    with pytest.raises(ConfigurationError, match="swap the two"):
        L1("*", 0.1).attach(net, optimizer)
    GroupLasso("input_channels", 0.1, method="subgradient").attach(net, optimizer)
    GroupLasso("layer", 0.1).attach(net, optimizer)
    other = torch.optim.SGD(net.parameters(), lr=0.1)
    inputs.attach(net, other)
    both = families(net, "output_channels") + families(net, "input_channels")
    with pytest.raises(ConfigurationError, match="overlap without"):
        GroupLasso(both, 0.1).check(net)
    GroupLasso(both, 0.1, method="subgradient").check(net)
    GroupLasso(families(net, "kernels") + families(net, "layer"), 0.1).check(net)
    wrapped = nn.Sequential(net)  # the same parameter under another name
    with pytest.raises(ConfigurationError, match="swap the two"):
        L1("*", 0.1).attach(wrapped, optimizer)


def test_optimizers_that_cannot_be_followed() -> None:
    net, other = linear([[1.0]]), linear([[1.0]])
    penalty = L1("*", 0.1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    penalty.attach(net, optimizer)
    with pytest.raises(ConfigurationError, match="follows this SGD already"):
        penalty.attach(net, optimizer)
    with pytest.raises(ConfigurationError, match="holds none of its parameters"):
        penalty.attach(other, torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(ConfigurationError, match="maximize=True"):
        penalty.attach(net, torch.optim.SGD(net.parameters(), lr=0.1, maximize=True))
    with pytest.raises(InputTypeError, match="Optimizer is needed"):
        penalty.attach(net, "sgd")  # type: ignore[arg-type]


def test_the_largest_groups_are_kept() -> None:
    net = nn.Sequential(linear([[1.0], [3.0], [2.0]]), linear([[0.5, 0.1, 0.2]]))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    penalty = GroupLasso("rows", 100.0, least=1)
    penalty.attach(net, optimizer)
    stepped(net, optimizer, penalty)
    assert net[0].weight.flatten().tolist() == [0.0, 3.0, 0.0]
    assert net[1].weight.flatten().tolist() == pytest.approx([0.5, 0.1, 0.2])


def test_a_copy_follows_nobody_and_works() -> None:
    net = linear([[3.0, 4.0]])
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    penalty = L1("*", 0.5) + GroupLasso("rows", 1.0, size_factor="none")
    penalty.attach(net, optimizer)
    penalty(net)
    for copied in (copy.deepcopy(penalty), pickle.loads(pickle.dumps(penalty))):  # noqa: S301
        assert copied.settings() == penalty.settings()
        with pytest.raises(ConfigurationError, match="never attached"):
            copied(net)
        assert float(copied.parts[1].value(net)) == pytest.approx(5.0)
    stepped(net, optimizer)
    assert net.weight.flatten().tolist() == pytest.approx(
        [2.5 * (1 - 1 / math.hypot(2.5, 3.5)), 3.5 * (1 - 1 / math.hypot(2.5, 3.5))]
    )


def test_parameters_replaced_after_a_call_are_found_again() -> None:
    net = linear([[3.0, 4.0]])
    penalty = GroupLasso("rows", 1.0, size_factor="none")
    assert float(penalty.value(net)) == 5.0
    net.weight = nn.Parameter(torch.tensor([[5.0, 12.0]]))
    assert float(penalty.value(net)) == 13.0


# --- lambda_max


class Noisy(nn.Module):
    """With BatchNorm, Dropout and a buffer that is replaced at each forward."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        out: Tensor = self.body(x)
        return out


def test_lambda_max_leaves_everything_as_it_was() -> None:
    net, x = Noisy(), torch.randn(8, 4)
    net(x).sum().backward()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    held, seen = [p.grad for p in net.parameters()], net.seen
    random = torch.random.get_rng_state()

    def closure() -> Tensor:
        net.zero_grad(set_to_none=False)
        return net(x).square().mean()

    found = GroupLasso("columns", 0.5, relative=True).calibrate(net, closure)
    assert all(value > 0 for value in found.values())
    assert len(found) == 2
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.seen is seen
    assert all(now is then for now, then in zip((p.grad for p in net.parameters()), held, strict=True))
    assert all(torch.equal(now, then) for now, then in zip((p.grad for p in net.parameters()), grads, strict=True))
    assert torch.equal(random, torch.random.get_rng_state())

    def broken() -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        lambda_max(net, families(net, "rows"), broken)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_lambda_max_by_hand() -> None:
    # f = (3 a + 5 b - 7)^2 / 2 of w = (a, b | c), groups {a, b} and {c}: at zero the gradient is -7 (3, 5)
    net = linear([[1.0, 2.0, 9.0]])
    mine = Family("ab", {"weight": torch.tensor([[0, 0, -1]])}, 1)
    x = torch.tensor([[3.0, 5.0, 0.0]])

    def closure() -> Tensor:
        return (net(x) - 7).square().sum() / 2

    assert lambda_max(net, [mine], closure) == {"ab": pytest.approx(7 * math.sqrt(34) / math.sqrt(2))}
    assert lambda_max(net, [mine], closure, "none") == {"ab": pytest.approx(7 * math.sqrt(34))}
    assert net.weight.tolist() == [[1.0, 2.0, 9.0]]


def test_lambda_max_that_cannot_be() -> None:
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1))
    x = torch.randn(4, 2)
    with pytest.raises(ConfigurationError, match=r"weights at zero is 0.0 \(a ReLU"):
        lambda_max(net, families(net, "rows", "0"), lambda: net(x).square().mean())
    with pytest.raises(ConfigurationError, match="0-dim loss with a gradient"):
        lambda_max(net, families(net, "rows", "0"), lambda: net(x))
    net[0].weight.requires_grad_(False)
    with pytest.raises(ConfigurationError, match="frozen"):
        lambda_max(net, families(net, "rows", "0"), lambda: net(x).mean())


def test_a_relative_strength_needs_calibrate_and_is_kept_in_the_state() -> None:
    net = linear([[3.0, 4.0]])
    penalty = GroupLasso("rows", 0.5, relative=True, method="subgradient")
    with pytest.raises(ConfigurationError, match=r"call calibrate\(model, closure\)"):
        penalty(net)
    found = penalty.calibrate(net, lambda: (net(torch.tensor([[2.0, 0.0]])) - 1).square().sum())  # gradient (-4, 0)
    assert found == {"weight: rows": pytest.approx(4 / math.sqrt(2))}
    assert float(penalty(net).detach()) == pytest.approx(0.5 * 4 * 5)
    again = GroupLasso("rows", 0.5, relative=True, method="subgradient")
    again.load_state_dict(copy.deepcopy(penalty.state_dict()))
    assert float(again(net).detach()) == pytest.approx(10)


# --- what is refused


def test_patterns_that_touch_nothing() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for penalty in (L1("0.weigth", 0.1), L2("0.weigth", 0.1)):
        with pytest.raises(ConfigurationError, match=r"'0.weigth' fits nothing; near names are 0.weight"):
            penalty.check(net)
    with pytest.raises(ConfigurationError, match="no layer of this Sequential has kernels"):
        GroupLasso("kernels", 0.1).check(net)
    net.requires_grad_(False)
    for frozen in (L1("*", 0.1), L2("*", 0.1), GroupLasso("rows", 0.1)):
        with pytest.raises(ConfigurationError, match="frozen"):
            frozen.check(net)


def test_parameters_of_another_model_and_alphas() -> None:
    net = LayerChoice([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)], label="choice")
    with pytest.raises(ConfigurationError, match=r"a parameter of shape \(2,\).*weight_parameters"):
        L1(net.parameters(), 0.1).check(net)
    with pytest.raises(ConfigurationError, match="is not one of this LayerChoice's weights"):
        L1(nn.Linear(2, 2).weight, 0.1).check(net)
    weights = sum(float(p.detach().abs().sum()) for p in net.parameters() if p.dim() == 2)
    assert float(L1("*", 1.0).value(net)) == pytest.approx(weights)


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf"), True, "1"])
def test_strengths_that_cannot_be(strength: float) -> None:
    for make in (lambda: L1("*", strength), lambda: L2("*", strength), lambda: GroupLasso("rows", strength)):
        with pytest.raises(ConfigurationError, match="finite number"):
            make()


def test_arguments_that_cannot_be() -> None:
    wrong: list[Callable[[], object]] = [
        lambda: L1("*", 0.1, method="prox"),  # type: ignore[arg-type]
        lambda: GroupLasso("rows", 0.1, method="prox"),  # type: ignore[arg-type]
        lambda: GroupLasso("rows", 0.1, size_factor="n"),  # type: ignore[arg-type]
        lambda: GroupLasso("rows", 0.1, least=-1),
        lambda: L1([], 0.1),
        lambda: L1(["*", nn.Linear(1, 1).weight], 0.1),  # type: ignore[list-item]
        lambda: L2([], 0.1),
        lambda: L2(None, 0.1),  # type: ignore[arg-type]
    ]
    for make in wrong:
        with pytest.raises(ConfigurationError):
            make()


def test_settings_are_plain_data() -> None:
    import json

    net = linear([[1.0]])
    for penalty in (
        L2("*", 0.1),
        L1(net.weight, 0.1),
        L1("a*", 0.1),
        GroupLasso(families(net, "rows"), 0.1, patterns=None),
        GroupLasso(lambda name, p: None, 0.1, patterns=["a"], least=2),
    ):
        assert json.loads(json.dumps(penalty.settings())) == penalty.settings()
        assert penalty.settings()["kind"] == type(penalty).__name__
