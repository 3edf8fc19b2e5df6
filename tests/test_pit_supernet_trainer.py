"""Masks and alphas in one run: gradients against counts and finite differences, and what each of them keeps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import supernet
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from oneshot import PIT, LayerChoice, arch_parameters
from oneshot.errors import ConfigurationError, InfeasibleTargetError, InputTypeError, UnsupportedModelError
from oneshot.pit import SuperNet
from oneshot.trainers import PITTrainer
from oneshot.trainers.pit_supernet import PITSuperNetTrainer

S = 0.01


def mixed(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """8 hidden units, then either a layer of 8 * 2 + 2 or, through 3 units, one of 8 * 3 + 3 + 3 * 2 + 2."""
    torch.manual_seed(0)
    deep = nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 2))
    choice = LayerChoice({"plain": nn.Linear(8, 2), "deep": deep}, label="choice")
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), choice).to(dtype)


def rows(n: int = 96, dtype: torch.dtype = torch.float32) -> TensorDataset:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())


def make(network: nn.Module, **changes: Any) -> PITSuperNetTrainer:
    """1 + 2 epochs of 6 steps."""
    settings: dict[str, Any] = {
        "loss": nn.CrossEntropyLoss(),
        "metrics": None,
        "optimizer": torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9),
        "strength": S,
        "num_epochs": 2,
        "warmup_epochs": 1,
        "dataset": rows(),
        "batch_size": 16,
        "workers": 0,
        "device": "cpu",
        "mask_learning_rate": 0.05,
        "arch_learning_rate": 0.02,
        "progress": False,
    }
    return PITSuperNetTrainer(network, **{**settings, **changes})  # type: ignore[arg-type]


def pit(**changes: Any) -> PIT:
    return PIT(mixed(), input_shape=(4,), **changes)


def names_of(network: PIT) -> tuple[set[str], set[str]]:
    """The names of the masks and of the alphas."""
    names = {name for name, _ in network.named_nas_parameters()}
    masks = {name for name in names if name.startswith("masks.")}
    return masks, names - masks


def moved(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_gradients_of_masks_and_alphas_in_one_step(fraction: float) -> None:
    """The task's by finite differences; the costs' by counting: a hidden unit has 4 + 1, and 2 or 3 of what follows."""
    network = PIT(mixed(torch.float64), input_shape=(4,)).double()
    alpha = network.choices["choice"].alpha
    with torch.no_grad():
        alpha.copy_(torch.tensor([0.4, -0.3]))
    network.masks["0"].keep([0, 1, 2, 3, 4, 6, 7])
    trainer = make(
        network, arch_fraction=fraction, dataset=rows(dtype=torch.float64), warmup_epochs=0, icv_strength=0.1
    )
    trainer.optimizer.step = trainer.arch_optimizer.step = lambda: None  # type: ignore[assignment]
    trainer._prepare()
    x, y = rows(16, torch.float64)[:]
    first, plain, deep = network.network[0], network.network[2]["plain"], network.network[2]["deep"]

    def task(m: Tensor, a: Tensor) -> float:
        with torch.no_grad():
            hidden = torch.relu(x @ first.weight.T + first.bias) * m
            p = a.exp() / a.exp().sum()
            return float(nn.functional.cross_entropy(p[0] * plain(hidden) + p[1] * deep(hidden), y))

    def rest(a: Tensor) -> float:
        """The cost of 7 live hidden units, and the icv of two options."""
        p = (a.exp() / a.exp().sum()).tolist()
        cost = 7 * 5 + p[0] * (7 * 2 + 2) + p[1] * (7 * 3 + 3 + 3 * 2 + 2)
        variance = ((p[0] - 0.5) ** 2 + (p[1] - 0.5) ** 2) / 2
        return S * cost + 0.1 * 0.25 / (variance + 1e-3)

    m, a = torch.tensor([1, 1, 1, 1, 1, 0, 1, 1], dtype=torch.float64), alpha.detach().clone()
    (trainer._arch_step if fraction else trainer._joint_step)((x, y))
    e = 1e-6 * torch.eye(8, dtype=torch.float64)
    of_masks = torch.tensor([(task(m + e[i], a) - task(m - e[i], a)) / 2e-6 for i in range(8)], dtype=torch.float64)
    p = a.softmax(0)
    got = network.masks["0"].alpha.grad
    assert got is not None
    live = m > 0
    assert torch.allclose(got[live], (of_masks + S * (5 + 2 * p[0] + 3 * p[1]))[live], atol=1e-7)
    e = e[:2, :2]
    ends = [[task(m, b) + rest(b) for b in (a + e[i], a - e[i])] for i in range(2)]
    of_alphas = torch.tensor([(up - down) / 2e-6 for up, down in ends], dtype=torch.float64)
    assert alpha.grad is not None
    assert torch.allclose(alpha.grad, of_alphas, atol=1e-7)


def test_one_optimizer_of_two_groups() -> None:
    network = pit()
    trainer = make(network)
    masks, alphas = trainer.arch_optimizer.param_groups
    assert (masks["lr"], alphas["lr"], masks["weight_decay"], alphas["weight_decay"]) == (0.05, 0.02, 0, 0)
    assert {id(p) for p in masks["params"]} == {id(mask.alpha) for _, mask in network.masks.items()}
    assert [id(p) for p in alphas["params"]] == [id(network.choices["choice"].alpha)]
    with pytest.raises(ConfigurationError, match="weight decay switches masks off"):
        make(network, arch_optimizer=torch.optim.AdamW)

    def decayed(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        ids = {id(p) for p in alphas["params"]}
        rest = [p for p in parameters if id(p) not in ids]
        return torch.optim.AdamW([{"params": rest, "weight_decay": 0.0}, {"params": alphas["params"]}])

    assert make(network, arch_optimizer=decayed).arch_optimizer.param_groups[1]["weight_decay"] == 0.01


@pytest.mark.parametrize(("sampling", "hard"), [("softmax", False), ("softmax", True), ("gumbel", True)])
@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_a_whole_run_meets_its_target(sampling: Any, hard: bool, fraction: float) -> None:
    """58 and 72 parameters at the start; the smallest has 5 + 4 = 9, of one hidden unit before the plain layer."""
    network = pit()
    assert network.reachable_costs()["params"][0] == 9
    trainer = make(
        network,
        targets={"params": 30},
        strength=0.05,
        sampling=sampling,
        hard=hard,
        arch_fraction=fraction,
        num_epochs=5,
        finetune_epochs=1,
        valid_dataset=rows(32),
    )
    history = trainer.train()
    assert history[0]["params_hard"] == 58
    feasible = [r for r in history if r["phase"] == "search" and r["params_hard"] <= 30]
    assert 0 < len(feasible) < 5
    small = trainer.export_model()
    best = min(feasible, key=lambda r: r["valid_loss"])
    assert sum(p.numel() for p in small.parameters()) == best["params_hard"] == history[-1]["params_hard"]
    assert {"live", "flips", "entropy", "cost_share"} <= set(best)
    assert set(trainer.export()) == {"choice", *network.masks}
    x = rows(8).tensors[0]
    network.eval(), small.eval()
    with trainer.searched.as_found():
        assert torch.allclose(small(x), network(x), atol=1e-6)
    with pytest.raises(InfeasibleTargetError, match="params 8, but the smallest masks leave 9"):
        make(network, targets={"params": 8})


def test_who_learns() -> None:
    """Without strength the alphas alone; without train_selection the masks alone; in the warm-up none of them."""
    for changes, learns in (
        ({"strength": 0.0}, (False, True)),
        ({"train_selection": False}, (True, False)),
        ({"num_epochs": 0}, (False, False)),
    ):
        network = pit()
        before = state(network)
        make(network, **changes).train()
        masks, alphas = names_of(network)
        found = moved(before, network)
        assert (bool(found & masks), bool(found & alphas)) == learns
        assert all(p.requires_grad for p in arch_parameters(network))


def test_masks_of_a_candidate_that_does_not_run_stay() -> None:
    """Also those that momentum would move: after a step with both, three along the plain path."""
    network = pit()
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9)  # noqa: E731
    trainer = make(network, warmup_epochs=0, arch_optimizer=sgd, sampling="softmax", hard=True, train_selection=False)
    trainer._prepare()
    (inner,) = [label for label in network.masks if label != "0"]
    for choice, stays in ((1, False), (0, True)):
        with torch.no_grad():
            network.choices["choice"].alpha.copy_(torch.eye(2)[choice])
        before = network.masks[inner].alpha.detach().clone()
        for _ in range(3):
            trainer._joint_step(rows(16)[:])
        assert torch.equal(network.masks[inner].alpha, before) == stays


def test_resume_in_mid_epoch(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "targets": {"params": 40},
        "strength": 0.05,
        "sampling": "gumbel",
        "hard": True,
        "num_epochs": 3,
        "finetune_epochs": 1,
        "valid_dataset": rows(32),
    }
    network = pit()
    first = copy.deepcopy(network)
    trainer = make(network, **settings)
    wanted = (2, 9, 14, 26)  # 1 + 3 + 1 epochs of 6 steps

    def keep(*, at_epoch_end: bool) -> None:
        if trainer.step in wanted:
            trainer.save(tmp_path / f"at{trainer.step}.ckpt")

    trainer._maybe_checkpoint = keep  # type: ignore[method-assign]
    history = trainer.train()
    for step in wanted:
        other = copy.deepcopy(first)
        again = make(other, **settings)
        again.resume(tmp_path / f"at{step}.ckpt")
        assert again.train() == history
        assert moved(state(network), other) == set()


def test_a_network_of_choices_of_different_widths() -> None:
    torch.manual_seed(0)
    widths = LayerChoice([nn.Sequential(nn.Linear(4, w), nn.ReLU()) for w in (3, 6, 9)], label="width")
    network = SuperNet(nn.Sequential(widths, nn.Linear(9, 2)), (4,), cost="params")
    trainer = make(network, targets={"params": 30}, strength=0.05, arch_learning_rate=0.2)
    trainer.train()
    # 5 w + 2 w + 2 parameters: 23, 44 and 65
    assert sum(p.numel() for p in trainer.export_model().parameters()) == 23
    assert trainer.export() == {"width": 0}


def test_the_wrong_kind_of_network() -> None:
    with pytest.raises(InputTypeError, match="a Sequential is no PIT or SuperNet network; wrap it"):
        make(mixed())
    plain = PIT(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), input_shape=(4,))
    with pytest.raises(UnsupportedModelError, match="no choices; search it with PITTrainer"):
        make(plain)
    network = pit()
    with pytest.raises(UnsupportedModelError, match=r"has the choices \['choice'\] besides .* PITSuperNetTrainer"):
        PITTrainer(network, loss=nn.CrossEntropyLoss(), metrics=None, optimizer=torch.optim.Adam, strength=1.0)
    with pytest.raises(UnsupportedModelError, match="choices and costs of its own: search it with PITSuperNetTrainer"):
        supernet(network)


def test_arguments_that_the_trainer_does_not_take() -> None:
    network = PIT(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), (4,))
    with pytest.raises(TypeError, match=r"PITTrainer\(\): unexpected arguments \['sampling'\] and missing arguments"):
        PITTrainer(network, strength=1.0, sampling="gumbel")  # type: ignore[call-arg]


def test_choices_within_a_budget_under_the_masks_of_now() -> None:
    """a: 4 * 8 + 8 + 8 * 4 + 4 = 76 with 8 inner features, 4 * 1 + 1 + 4 + 4 = 13 with one; b: none."""
    torch.manual_seed(0)
    pool = LayerChoice({"a": nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), "b": nn.Identity()}, label="pool")
    network = PIT(nn.Sequential(pool, nn.Linear(4, 2)), (4,), cost="params")
    assert network.arch_within({})["pool"] == "a"
    assert network.arch_within({"params": 50})["pool"] == "b"
    network.masks["0.candidates.a.0"].keep([3])
    assert network.arch_within({"params": 50})["pool"] == "a"
    assert network.arch_within({"params": 23}) == {"pool": "a", "0.candidates.a.0": [3]}
    with pytest.raises(InfeasibleTargetError, match="9"):
        network.arch_within({"params": 9})


def test_targets_that_only_together_cannot_be_met() -> None:
    """small: 8 * 2 + 2 = 18 parameters, 5 positions of 16 MACs; wide: 8 * 8 + 8 = 72 parameters, one position of 64."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x[:, :1]).mean(1)[:, :2]

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).mean(1)

    network = SuperNet(LayerChoice({"wide": Wide(), "small": Small()}, label="pool"), (5, 8), cost=["params", "macs"])
    assert network.reachable_costs() == {"params": (18.0, 72.0), "macs": (64.0, 80.0)}
    network.check_reachable({"params": 72, "macs": 64})
    with pytest.raises(InfeasibleTargetError, match="params"):
        network.check_reachable({"params": 71, "macs": 79})
