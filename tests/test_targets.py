"""Targets: prices against finite differences, and every trainer against counts of what it exports."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_projection import one_more, within
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from oneshot import (
    DUCCIO,
    L1,
    PIT,
    DARTSTrainer,
    GroupLasso,
    LayerChoice,
    PITSuperNetTrainer,
    PITTrainer,
    ProxylessTrainer,
    SPOSTrainer,
    Trainer,
    arch_parameters,
)
from oneshot.errors import ConfigurationError, InfeasibleTargetError
from oneshot.trainers.budget import Budget, check_targets
from oneshot.trainers.supernet import SuperNetTrainer

# --- the budget by hand ---------------------------------------------------------------------------------------------


def test_multipliers_prices_and_slopes_by_hand() -> None:
    budget = Budget({"params": 200.0, "macs": 50.0})
    hard = {"params": 300.0, "macs": 40.0}  # g = 0.5 and -0.2
    assert budget.violations(hard, 0.3) == pytest.approx({"params": 0.5, "macs": -0.2})
    assert budget.prices(hard, 0.3) == pytest.approx({"params": 0.5, "macs": 0.0})
    budget.update(hard, 0.3, steps=100)  # eta = 20 / 100
    assert budget.multipliers == pytest.approx({"params": 0.1, "macs": 0.0})
    budget.update(hard, 0.3, steps=100)
    budget.update({"params": 240.0, "macs": 60.0}, 0.3, steps=100)  # g = 0.2 each
    assert budget.multipliers == pytest.approx({"params": 0.24, "macs": 0.04})
    prices = budget.prices({"params": 180.0, "macs": 60.0}, 0.3)
    assert prices == pytest.approx({"params": 0.14, "macs": 0.24})
    assert budget.slopes(prices) == pytest.approx({"params": 0.14 / 200, "macs": 0.24 / 50})
    assert budget.bound == {"params", "macs"}


def test_limits_come_down_in_the_first_half() -> None:
    """T (C0 / T)^(1 - 2 t): 400, 200 at a quarter, 100 from the half on."""
    budget = Budget({"params": 100.0, "macs": 50.0})
    budget.begin({"params": 400.0, "macs": 20.0})
    budget.begin({"params": 9e9, "macs": 9e9})  # only the first time
    found = [budget.limits(t)["params"] for t in (0.0, 0.125, 0.25, 0.5, 0.9, 1.0)]
    assert found == pytest.approx([400, 400 / math.sqrt(2), 200, 100, 100, 100])
    assert [budget.limits(t)["macs"] for t in (0.0, 0.25, 1.0)] == [50, 50, 50]  # it is within its target
    assert budget.violations({"params": 300.0, "macs": 50.0}, 0.25) == pytest.approx({"params": 0.5, "macs": 0.0})
    assert Budget({"params": 100.0}).limits(0.0) == {"params": 100}  # nothing has begun


def test_multipliers_are_between_0_and_100() -> None:
    budget = Budget({"c": 1.0})
    for _ in range(50):
        budget.update({"c": 0.0}, 0.5, steps=10)
        assert budget.multipliers["c"] == 0
    assert not budget.bound
    for _ in range(10):
        budget.update({"c": 1e6}, 0.5, steps=10)
    assert budget.multipliers["c"] == 100
    budget.update({"c": 0.5}, 0.5, steps=10)  # g = -0.5, eta = 2
    assert budget.multipliers["c"] == 99


def test_a_target_of_nothing_is_violated_or_not() -> None:
    budget = Budget({"c": 0.0})
    budget.begin({"c": 5.0})
    assert budget.violations({"c": 5.0}, 0.0) == {"c": 1.0}
    assert budget.violations({"c": 0.0}, 0.0) == {"c": 0.0}
    assert budget.slopes({"c": 2.0}) == {"c": 2.0}


@pytest.mark.parametrize("mu", [0.0, 0.3, 2.0])
def test_the_price_is_the_slope_of_the_augmented_lagrangian(mu: float) -> None:
    """Of (1 / 2) (max(0, mu + g)^2 - mu^2) by g = C / T - 1, central differences."""
    target, step = 40.0, 1e-6
    budget = Budget({"c": target})
    budget.multipliers["c"] = mu

    def lagrangian(g: float) -> float:
        return (max(0.0, mu + g) ** 2 - mu**2) / 2

    for cost in (1.0, 27.5, 41.0, 90.0):
        g = cost / target - 1
        slope = (lagrangian(g + step) - lagrangian(g - step)) / (2 * step)
        price = budget.prices({"c": cost}, 1.0)["c"]
        assert price == pytest.approx(slope, abs=1e-8)
        assert budget.slopes({"c": price})["c"] == pytest.approx(slope / target, abs=1e-9)


def test_the_size_of_the_task_is_averaged() -> None:
    budget = Budget({"c": 1.0})
    budget.saw(math.nan)
    assert budget.task_gradient is None
    for size, wanted in ((4.0, 4.0), (14.0, 5.0), (math.inf, 5.0), (0.0, 4.5)):
        budget.saw(size)
        assert budget.task_gradient == pytest.approx(wanted)


def test_state_of_a_budget() -> None:
    one, other = (Budget({"c": 10.0, "d": 1.0}) for _ in range(2))
    one.begin({"c": 40.0, "d": 1.0})
    one.update({"c": 50.0, "d": 0.5}, 0.1, steps=10)
    one.saw(3.0)
    other.load_state_dict(one.state_dict())
    assert other.state_dict() == one.state_dict()
    assert other.limits(0.2) == one.limits(0.2)
    assert other.prices({"c": 30.0, "d": 2.0}, 0.2) == one.prices({"c": 30.0, "d": 2.0}, 0.2)


@pytest.mark.parametrize("targets", [{"d": 1.0}, {"c": -1.0}, {"c": math.nan}, {"c": "1"}, {"c": True}, 5.0, ["c"]])
def test_what_is_no_target(targets: Any) -> None:
    with pytest.raises(ConfigurationError, match="targets"):
        check_targets(targets, ["c"])
    assert check_targets(None, ["c"]) == check_targets({}, ["c"]) == {}
    assert check_targets({"c": 3}, ["c"]) == {"c": 3.0}


# --- the networks ---------------------------------------------------------------------------------------------------


class Thrice(nn.Module):
    """36 parameters and 108 products, where a Linear has 42 and 36."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(self.inner(x)))


def choices(*, conflict: bool = False) -> nn.Sequential:
    """44 parameters and 36 products outside; 'wide' has 136 and 120, a Linear 42 and 36."""
    wide = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6))
    one: Any = {"wide": wide, "thin": nn.Linear(6, 6), "skip": nn.Identity()}
    two: Any = [nn.Linear(6, 6), nn.Identity()]
    if conflict:
        one, two = {"once": nn.Linear(6, 6), "thrice": Thrice()}, [nn.Identity(), nn.Dropout(0.1)]
    return nn.Sequential(
        *(nn.Linear(4, 6), nn.Dropout(0.1), LayerChoice(one, label="one"), nn.ReLU()),
        *(LayerChoice(two, label="two"), nn.Linear(6, 2)),
    )


def mlp() -> nn.Sequential:
    """60 + 104 + 18 = 182 parameters, 48 + 96 + 16 = 160 products."""
    return nn.Sequential(
        *(nn.Linear(4, 12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    )


def rows(n: int = 96) -> TensorDataset:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())


COSTS = {"params": "params", "macs": "macs"}
NAMES = ("pit", "masks and choices", "supernet", "gumbel", "proxyless", "reinforce", "proxyless masks", "darts", "spos")
SEARCHED = tuple(name for name in NAMES if name != "spos")
WITH_CHOICES = tuple(name for name in NAMES if name != "pit")
_MADE: dict[tuple[str, bool], nn.Module] = {}


def network(name: str, *, conflict: bool = False) -> nn.Module:
    if (name, conflict) not in _MADE:
        torch.manual_seed(0)
        model: nn.Module = mlp() if name == "pit" else choices(conflict=conflict)
        if name in ("pit", "masks and choices", "proxyless masks"):
            model = PIT(model, (4,), cost=COSTS)
        _MADE[name, conflict] = model
    return copy.deepcopy(_MADE[name, conflict])


def targets_of(name: str) -> dict[str, float]:
    """Which hold every search back; of choices, what is best within them is used to 95 %: 128 and 108."""
    return {"params": 90.0, "macs": 75.0} if name == "pit" else {"params": 130.0, "macs": 110.0}


def build(name: str, model: nn.Module | None = None, *, arch_lr: float = 0.05, **changes: Any) -> Trainer:
    """1 + 4 epochs of 4 to 6 steps."""
    model = network(name) if model is None else model
    settings: dict[str, Any] = {
        "loss": nn.CrossEntropyLoss(),
        "metrics": lambda output, target: {"acc": (output.argmax(1) == target).float().mean()},
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3),
        "num_epochs": 4,
        "warmup_epochs": 1,
        "dataset": rows(),
        "batch_size": 16,
        "workers": 0,
        "device": "cpu",
        "progress": False,
    }
    of_plain: dict[str, Any] = {"cost": ["params", "macs"], "dummy_input": (1, 4)}
    of_proxyless: dict[str, Any] = {
        "arc_learning_rate": arch_lr,
        "mask_learning_rate": arch_lr,
        "arch_every": 2,
        "skip_first_epoch": False,
    }
    kinds: dict[str, tuple[Callable[..., Trainer], dict[str, Any]]] = {
        "pit": (PITTrainer, {"mask_learning_rate": arch_lr}),
        "masks and choices": (PITSuperNetTrainer, {"mask_learning_rate": arch_lr, "arch_learning_rate": arch_lr}),
        "supernet": (SuperNetTrainer, {"arch_learning_rate": arch_lr, "arch_fraction": 0.25, **of_plain}),
        "gumbel": (SuperNetTrainer, {"arch_learning_rate": arch_lr, "sampling": "gumbel", "hard": True, **of_plain}),
        "proxyless": (ProxylessTrainer, {**of_proxyless, **of_plain}),
        "reinforce": (ProxylessTrainer, {**of_proxyless, **of_plain, "arch_method": "reinforce", "rl_batch_size": 4}),
        "proxyless masks": (ProxylessTrainer, of_proxyless),
        "darts": (DARTSTrainer, {"arc_learning_rate": arch_lr, **of_plain}),
        "spos": (SPOSTrainer, {"population": 4, "generations": 1, "parents": 2, **of_plain}),
    }
    kind, own = kinds[name]
    return kind(model, **{**settings, **own, **changes})


@torch.no_grad()
def counted(model: nn.Module) -> dict[str, float]:
    """Numbers in all parameters, and products of one sample by torch's own counter."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.randn(1, 4))
    return {"params": sum(p.numel() for p in model.parameters()), "macs": counter.get_total_flops() // 2}


def equal(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def check_use(name: str, trainer: Trainer, found: dict[str, float], targets: dict[str, float]) -> None:
    """Choices: the largest of the 6 architectures that is within; masks: 95 % of a target, or nothing more fits."""
    if name in ("supernet", "gumbel", "proxyless", "reinforce", "darts"):
        assert found == {"params": 128, "macs": 108}
    elif max(found[cost] / target for cost, target in targets.items()) < 0.95:
        model = copy.deepcopy(trainer.model)
        assert isinstance(model, PIT)
        assert not [more for more in one_more(model) if within(more, targets)]


# --- what is exported -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch_lr", [0.0, 0.05])
@pytest.mark.parametrize("name", NAMES)
def test_two_targets_are_met_by_what_is_exported(name: str, arch_lr: float) -> None:
    """Also by an architecture that does not learn: choices all alike, masks all at 1."""
    targets = targets_of(name)
    trainer = build(name, arch_lr=arch_lr, targets=targets)
    history = trainer.train()
    small = trainer.export_model()
    found = counted(small)
    assert all(found[cost] <= target for cost, target in targets.items()), found
    predicted = {row.name: row.predicted for row in trainer.report().rows}
    assert predicted == found
    if name != "spos":
        assert {cost: history[-1][f"{cost}_target"] for cost in targets} == targets
        for record in history:
            for cost in targets:
                parts = ("target", "hard", "unprojected", "soft", "multiplier")
                assert all(math.isfinite(record[f"{cost}_{part}"]) for part in parts)
        assert all(history[-1][f"{cost}_hard"] <= target for cost, target in targets.items())
        if arch_lr == 0:  # it never is within the targets by itself
            assert max(history[-1][f"{cost}_multiplier"] for cost in targets) > 0
            check_use(name, trainer, found, targets)
        if arch_lr == 0 and name != "reinforce":
            assert all(0 < record["target_share"] < 1 for record in history[2:])
    data = rows(50)
    x, y = data.tensors
    with torch.no_grad():
        wanted = nn.functional.cross_entropy(small(x), y)
    assert trainer.evaluate(data)["loss"] == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize("name", WITH_CHOICES)
def test_a_budget_of_the_export(name: str) -> None:
    trainer = build(name, targets=targets_of(name), num_epochs=2, warmup_epochs=0)
    trainer.train()
    least = {cost: trainer.searched.reachable([cost])[cost][0] for cost in COSTS}
    budget = {"params": max(least["params"], 44.0)}
    if name == "spos":
        with pytest.raises(InfeasibleTargetError):
            trainer.export(budget={"params": 43})
        return
    if "masks" in name:
        budget = {"params": counted(trainer.export_model())["params"] * 1.0}
    assert counted(trainer.export_model(budget=budget))["params"] <= budget["params"]


def test_masks_have_no_budget_afterwards() -> None:
    trainer = build("pit", targets=targets_of("pit"), num_epochs=1, warmup_epochs=0)
    trainer.train()
    with pytest.raises(ConfigurationError, match="give targets="):
        trainer.export(budget={"params": 50})


@pytest.mark.parametrize("name", NAMES)
def test_targets_out_of_reach_are_refused_and_nothing_is_changed(name: str) -> None:
    model = network(name)
    before = copy.deepcopy(model)
    for targets in ({"params": 1.0}, {"macs": 1.0, "params": 1e9}):
        with pytest.raises(InfeasibleTargetError):
            build(name, model, targets=targets).train()
    with pytest.raises(ConfigurationError, match="latency"):
        build(name, model, targets={"latency": 1.0}).train()
    assert equal(before, model)


@pytest.mark.parametrize("name", WITH_CHOICES)
def test_targets_that_only_together_are_out_of_reach(name: str) -> None:
    """44 parameters and 36 products outside; with masks at their smallest 5 + 4 and 4 + 2, once has 2 and 1 more,
    thrice 1 and 3 more."""
    model = network(name, conflict=True)
    before = copy.deepcopy(model)
    targets = {"params": 10.0, "macs": 8.0} if "masks" in name else {"params": 80.0, "macs": 80.0}
    for cost, target in targets.items():
        build(name, model, targets={cost: target})
    with pytest.raises(InfeasibleTargetError):
        build(name, model, targets=targets).train()
    assert equal(before, model)


@pytest.mark.parametrize("name", NAMES)
def test_a_target_above_the_largest_cost_changes_nothing(name: str) -> None:
    more: dict[str, Any] = {}
    if name in ("proxyless", "proxyless masks", "darts"):  # these want a cost term, or say that there is none
        more = {"grad_reg_loss_type": None, "ref_latency": {"params": 100.0, "macs": 100.0}}
    if name == "reinforce":
        more = {"ref_latency": {"params": 100.0, "macs": 100.0}}
    free, bound = build(name, **more), build(name, targets={"params": 1e6, "macs": 1e6}, **more)
    free.train()
    history = bound.train()
    assert equal(free.model, bound.model)
    assert free.export() == bound.export()
    if isinstance(bound.model, PIT):
        assert all(bool((mask.alpha == 1).all()) for _, mask in bound.model.masks.items())
    if name != "spos":
        assert history[-1]["params_multiplier"] == history[-1]["macs_multiplier"] == 0


# --- how they pull --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEARCHED)
def test_the_pull_is_as_many_times_the_task_as_the_prices_say(name: str) -> None:
    """In the L1 norm of the gradients, the task's averaged over steps; what is added points along sum_k p_k C_k / T_k,
    whose size does not matter."""
    trainer = build(name, arch_lr=0.0, targets=targets_of(name))
    add, seen = trainer.targets.add, []

    def watched(pull: Any, learning: Any, norm_of_task: float) -> Any:
        before: list[Any] = [None if p.grad is None else p.grad.clone() for p in learning]
        share = add(pull, learning, norm_of_task)
        after: list[Any] = [p.grad if old is None else p.grad - old for old, p in zip(before, learning, strict=True)]
        task, pulled = (sum(float(g.abs().sum()) for g in part if g is not None) for part in (before, after))
        seen.append((pull.price, task, pulled, float(share)))
        for got, along in zip(after, pull.gradients, strict=True):
            if along is not None and pulled:
                norm = sum(float(g.abs().sum()) for g in pull.gradients if g is not None)
                assert torch.allclose(got / pulled, along / norm, atol=1e-4)
        return share

    trainer.targets.add = watched  # type: ignore[method-assign]
    trainer.train()
    assert len(seen) >= 6
    average = seen[0][1]
    for price, task, pulled, share in seen:
        average = 0.9 * average + 0.1 * task
        assert pulled == pytest.approx(price * (average or 1.0), rel=2e-3, abs=1e-5)
        assert share == pytest.approx(pulled / (pulled + task), rel=2e-3, abs=1e-6)
    assert max(price for price, *_ in seen) > 0.1


@pytest.mark.parametrize("name", ["pit", "masks and choices", "supernet", "gumbel", "proxyless", "darts"])
def test_the_scale_of_the_loss_does_not_matter(name: str) -> None:
    """A loss a thousand times as large: the same share of the gradient, in all steps of weights that stay."""
    shares = []
    for scale in (1.0, 1000.0):
        model = network(name)
        trainer = build(
            name,
            model,
            targets=targets_of(name),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
            loss=lambda output, target, scale=scale: scale * nn.functional.cross_entropy(output, target),
            arch_lr=0.0,
            num_epochs=2,
        )
        shares.append([record["target_share"] for record in trainer.train()[1:]])
    assert shares[0] == pytest.approx(shares[1], rel=1e-3)
    assert max(shares[0]) > 0.05


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_the_gradient_of_a_step_of_masks(fraction: float) -> None:
    """Task plus P times its size along sum_k p_k C_k / T_k: each part from a step of its own."""
    targets, multipliers = targets_of("pit"), {"params": 0.5, "macs": 1.5}
    x, y = rows(16)[:]
    found = []
    for held in ({"params": 0.0, "macs": 0.0}, multipliers):
        trainer = build("pit", targets=targets, warmup_epochs=0, arch_fraction=fraction)
        trainer._prepare()
        trainer.model.train()
        trainer.targets.budget.multipliers = dict(held)
        torch.manual_seed(3)  # dropout
        (trainer._arch_step if fraction else trainer._joint_step)((x, y))  # type: ignore[attr-defined]
        found.append(torch.cat([p.grad.flatten() for p in arch_parameters(trainer.model) if p.grad is not None]))
    pit = network("pit")
    assert isinstance(pit, PIT)
    costs = pit.costs()
    paid = sum(multipliers[name] * costs[name] / targets[name] for name in targets)
    along = torch.cat(torch.autograd.grad(paid, list(pit.nas_parameters())))  # type: ignore[arg-type]
    # The limits begin at the costs of now: g = 0, P = 0.5 + 1.5.
    wanted = found[0] + 2.0 * found[0].abs().sum() * along / along.abs().sum()
    assert torch.allclose(found[1], wanted, rtol=1e-4, atol=1e-6)


# --- going on -------------------------------------------------------------------------------------------------------


def regularizer(name: str) -> Any:
    weights = L1("*weight", 1e-4) + GroupLasso("rows", 1e-3, relative=True, schedule=None)
    return weights if name == "spos" else weights + DUCCIO({"macs": 100.0}, task_loss=0.5)


@pytest.mark.parametrize(("name", "regularized"), [*((name, True) for name in NAMES), ("still", False)])
def test_resumed_in_the_middle_it_is_the_undisturbed_run(name: str, regularized: bool, tmp_path: Path) -> None:
    still = name == "still"  # what was kept to the targets is known from no step after the one that is resumed from
    name = "proxyless masks" if still else name

    def made(**changes: Any) -> Trainer:
        more: dict[str, Any] = {"arch_every": 5} if "proxyless" in name or name == "reinforce" else {}
        more["arch_lr"] = 0.0 if still else 0.05
        if regularized:
            more["regularizer"] = regularizer(name)
        return build(name, targets=targets_of(name), valid_dataset=rows(32), num_epochs=3, **more, **changes)

    trainer = made(checkpoint_dir=tmp_path, checkpoint_every=1)
    save, saved = trainer.save, {}

    def keep(path: Any) -> None:
        save(path)
        if Path(path).name == "last.ckpt":
            saved[trainer.step] = shutil.copy(path, tmp_path / f"at{trainer.step}.ckpt")

    trainer.save = keep  # type: ignore[method-assign]
    history = trainer.train()
    total = max(saved)
    for step in (total // 2, total - 1):
        again = made()
        again.resume(saved[step])
        assert again.train() == history, step
        assert equal(again.model, trainer.model), step
        assert again.export() == trainer.export()


@pytest.mark.parametrize("name", NAMES)
def test_from_the_file_of_a_warm_up_it_is_the_run_with_its_own(name: str, tmp_path: Path) -> None:
    """The warm-up knows neither targets nor regularizers of costs; those of weights are the same."""
    weights = GroupLasso("rows", 1e-3)
    slack = {"params": 1e6}  # or some of them would want a cost term
    build(name, regularizer=weights, targets=slack).warm_up(tmp_path / "warm.ckpt")
    costs = None if name == "spos" else DUCCIO({"macs": 100.0}, task_loss=0.5)

    def made() -> Trainer:
        together = GroupLasso("rows", 1e-3)
        return build(
            name, targets=targets_of(name), regularizer=together if costs is None else together + copy.copy(costs)
        )

    whole, other = made(), made()
    other.start_from(tmp_path / "warm.ckpt")
    assert other.train()[1:] == whole.train()[1:]
    assert equal(whole.model, other.model)
    assert whole.export() == other.export()
