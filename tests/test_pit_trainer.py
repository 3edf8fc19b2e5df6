"""PITTrainer against training loops written out by hand, finite differences, and counts by hand."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import digit_data, proxyless, tiny
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from oneshot import DUCCIO, BaseRegularizer, arch_parameters, fixed, weight_parameters
from oneshot.data import BatchStream, mix_seed
from oneshot.errors import (
    CheckpointError,
    ConfigurationError,
    InfeasibleTargetError,
    InputTypeError,
    OneshotError,
    TrainingDivergedError,
    UnsupportedModelError,
)
from oneshot.export import read_arch
from oneshot.loggers import read_json_lines
from oneshot.pit import PIT
from oneshot.trainers import PITTrainer
from oneshot.trainers.penalty import Penalty
from oneshot.trainers.selection import epochs_since, kept_record


def dense() -> nn.Sequential:
    """8 hidden units of 4 + 1 + 2 = 7 parameters, and 2 biases: 7 n + 2, from 9 to 58."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def conv() -> nn.Sequential:
    """Everything that a step could move by accident: BatchNorm, dropout."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.1)),
        *(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 10)),
    )


def rows(n: int = 96, dtype: torch.dtype = torch.float32) -> TensorDataset:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())


def make(pit: PIT, **changes: Any) -> PITTrainer:
    """1 + 2 epochs; of 6 steps with ``rows`` and of 4 with 128 digits."""
    of_rows = len(pit.example[0].shape) == 2
    settings: dict[str, Any] = {
        "loss": nn.CrossEntropyLoss(),
        "metrics": lambda output, target: {"acc": (output.argmax(1) == target).float().mean()},
        "optimizer": torch.optim.SGD(pit.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3),
        "strength": 0.01,
        "num_epochs": 2,
        "warmup_epochs": 1,
        "dataset": rows() if of_rows else digit_data(128),
        "batch_size": 16 if of_rows else 32,
        "workers": 0,
        "device": "cpu",
        "mask_learning_rate": 0.05,
        "log_frequency": 1,
        "progress": False,
    }
    return PITTrainer(pit, **{**settings, **changes})


def dense_pit() -> PIT:
    return PIT(dense(), input_shape=(4,))


@pytest.fixture(scope="module")
def converted() -> PIT:
    return PIT(conv(), input_shape=(1, 8, 8), cost={"params": "params", "macs": "macs"})


@pytest.fixture
def conv_pit(converted: PIT) -> PIT:
    return copy.deepcopy(converted)


def batches(data: Dataset[Any], n: int, batch_size: int, steps: int) -> Iterator[Any]:
    """The batches that a trainer of seed 0 without a held-out part takes."""
    stream = BatchStream(data, range(n), seed=mix_seed(0, 5), batch_size=batch_size)
    return islice(stream.iterate(0), steps)


def equal_states(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def only_mask(pit: PIT) -> nn.Parameter:
    (mask,) = arch_parameters(pit)
    return mask


def n_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# --- one step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.0, 0.5])
@pytest.mark.parametrize(("target", "slope"), [(None, 7.0), (30.0, 7.0), (51.0, 0.0)])
def test_gradient_of_the_masks(target: float | None, slope: float, fraction: float) -> None:
    """dL/dalpha_i = dCE/dm_i at the hard m, a finite difference, + s * 7 while 7 * 7 + 2 = 51 is above the target."""
    net = dense().double()
    pit = PIT(net, input_shape=(4,)).double()  # the masks too
    pit.masks["0"].keep([0, 1, 2, 3, 4, 6, 7])
    pays: dict[str, Any] = {"strength": 0.02}
    if target is not None:  # in the first of two epochs a hundredth of it
        pays = {"strength": 0.0, "regularizer": DUCCIO({"params": target}, final_strengths=(2.0,))}
    trainer = make(pit, **pays, arch_fraction=fraction, dataset=rows(dtype=torch.float64))
    x, y = rows(16, torch.float64)[:]

    def task(m: Tensor) -> float:
        hidden = torch.relu(x @ net[0].weight.T + net[0].bias) * m
        return float(nn.functional.cross_entropy(hidden @ net[2].weight.T + net[2].bias, y).detach())

    m = torch.tensor([1, 1, 1, 1, 1, 0, 1, 1], dtype=torch.float64)
    step = 1e-6 * torch.eye(8, dtype=torch.float64)
    # At m = 0 from above: the slope of ReLU at a masked unit is that of the unit itself.
    low = [m - step[i] if m[i] else m for i in range(8)]
    width = torch.where(m > 0, 2e-6, 1e-6)
    want = torch.tensor([task(m + step[i]) - task(low[i]) for i in range(8)], dtype=torch.float64) / width
    pit.train()
    trainer._prepare()
    (trainer._arch_step if fraction else trainer._joint_step)((x, y))
    got = only_mask(pit).grad
    assert got is not None
    live = m > 0
    assert torch.allclose(got[live], (want + 0.02 * slope)[live], atol=1e-7)
    if slope:
        assert not torch.allclose(got[live], want[live], atol=1e-3)


def test_penalty_is_its_formula() -> None:
    reachable = {"params": (1.0, 200.0), "macs": (1.0, 1000.0)}
    costs = {"params": torch.tensor(150.0), "macs": torch.tensor(400.0)}
    assert float(Penalty(0.5, False, reachable)(costs)) == 0.5 * 550
    assert float(Penalty({"macs": 0.5}, False, reachable)(costs)) == 0.5 * 400
    normalized = Penalty(0.5, True, reachable)
    normalized.refer_to(reachable)
    assert float(normalized(costs)) == pytest.approx(0.5 * (150 / 200 + 400 / 1000))
    assert Penalty(2.0, False, reachable).pulls
    assert not Penalty(0.0, False, reachable).pulls
    assert not Penalty({}, False, reachable).pulls


def test_masks_have_no_weight_decay_and_stay_between_0_and_1() -> None:
    pit = dense_pit()
    trainer = make(
        pit,
        optimizer=torch.optim.AdamW(pit.parameters(), lr=0.1, weight_decay=0.9),
        arch_optimizer=lambda masks: torch.optim.SGD(masks, 3.0),
    )
    assert [group["weight_decay"] for group in trainer.arch_optimizer.param_groups] == [0]
    assert [p for g in trainer.arch_optimizer.param_groups for p in g["params"]] == [only_mask(pit)]
    of_weights = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert of_weights == {id(p) for p in weight_parameters(pit)}
    seen = []
    trainer.optimizer.register_step_pre_hook(lambda *_: seen.append(only_mask(pit).detach().clone()))
    trainer.train()
    seen.append(only_mask(pit).detach())
    assert all(bool((mask >= 0).all() and (mask <= 1).all()) for mask in seen)
    assert any(bool((mask == 0).any()) for mask in seen)
    assert len(seen) == 19


# --- whole runs against loops by hand -------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_strength_zero_is_training_the_plain_network(optimizer: Any) -> None:
    """Also with weight decay over all parameters of the PIT network, masks included."""
    net, pit = dense(), dense_pit()
    trainer = make(pit, strength=0.0, optimizer=optimizer(pit.parameters(), lr=0.1, weight_decay=0.5))
    trainer.train()
    of_net = optimizer(net.parameters(), lr=0.1, weight_decay=0.5)
    for x, y in batches(rows(), 96, 16, 18):
        of_net.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        of_net.step()
    assert torch.equal(only_mask(pit), torch.ones(8))
    assert equal_states(trainer.export_model(), net)


def test_a_search_is_the_loop_by_hand() -> None:
    """6 steps of the weights with the masks at 1, then 12 of both on the same batch, the masks clipped after each."""
    pit = dense_pit()
    by_hand = copy.deepcopy(pit)
    make(pit, strength=0.02, regularizer=BaseRegularizer("params", 0.03)).train()
    of_weights = torch.optim.SGD(by_hand.net_parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    of_masks = torch.optim.Adam(by_hand.nas_parameters(), lr=0.05)
    by_hand.train()
    sizes = []
    for i, (x, y) in enumerate(batches(rows(), 96, 16, 18)):
        by_hand.zero_grad()
        loss = nn.functional.cross_entropy(by_hand(x), y)
        if i >= 6:
            loss = loss + 0.05 * by_hand.get_cost("params")
        loss.backward()
        of_weights.step()
        if i >= 6:
            of_masks.step()
            by_hand.masks.clip_()
        sizes.append(int(by_hand.get_cost("params")))
    assert sizes[5] == 58 > sizes[17]
    assert equal_states(pit, by_hand)


def test_fine_tuning_is_training_the_exported_network() -> None:
    """In float64: the same function, with the masks as they are and the weights of cut units without a part in it."""
    pit = PIT(dense().double(), input_shape=(4,))
    pit.masks["0"].keep([1, 2, 5])
    small = fixed(pit)
    data = rows(dtype=torch.float64)
    scheduler = lambda optimizer, steps: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)  # noqa: E731
    trainer = make(pit, num_epochs=0, warmup_epochs=0, finetune_epochs=2, finetune_scheduler=scheduler, dataset=data)
    history = trainer.train()
    assert [record["phase"] for record in history] == ["finetune", "finetune"]
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    schedule = scheduler(optimizer, 12)
    for x, y in batches(data, 96, 16, 12):
        optimizer.zero_grad()
        nn.functional.cross_entropy(small(x), y).backward()
        optimizer.step()
        schedule.step()
    tuned = trainer.export_model()
    assert [p.shape for p in tuned.parameters()] == [(3, 4), (3,), (2, 3), (2,)]
    for p, q in zip(tuned.parameters(), small.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-14)


def test_each_phase_has_its_optimizer_and_scheduler() -> None:
    seen: list[tuple[str, int, float, int]] = []

    def factory(name: str) -> Any:
        def build(optimizer: torch.optim.Optimizer, steps: int) -> Any:
            seen.append((name, steps, optimizer.param_groups[0]["lr"], len(optimizer.state)))
            return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

        return build

    pit = dense_pit()
    trainer = make(
        pit,
        finetune_epochs=3,
        finetune_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.003),
        scheduler=factory("search"),
        warmup_scheduler=factory("warmup"),
        finetune_scheduler=factory("finetune"),
    )
    masks: list[Tensor] = []
    trainer.finetune_optimizer.register_step_pre_hook(lambda *_: masks.append(only_mask(pit).detach().clone()))
    history = trainer.train()
    # the search goes on with the momenta of the warm-up's 4 parameters; the fine-tuning begins with none
    assert seen == [("warmup", 6, 0.1, 0), ("search", 12, 0.1, 4), ("finetune", 18, 0.003, 0)]
    assert [record["phase"] for record in history] == ["warmup"] + ["search"] * 2 + ["finetune"] * 3
    assert all(torch.equal(mask, only_mask(pit)) for mask in masks)
    assert len(masks) == 18


@pytest.mark.parametrize("step", ["weight", "arch"])
def test_a_held_out_part_for_the_masks(conv_pit: PIT, step: str) -> None:
    """Steps alternate; one of the weights leaves the masks, one of the masks the weights and all statistics."""
    trainer = make(conv_pit, arch_fraction=0.25)
    done = getattr(trainer, f"_{step}_step")
    moved: list[set[str]] = []

    def watched(batch: Any) -> None:
        before = {k: v.clone() for k, v in conv_pit.state_dict().items()}
        done(batch)
        moved.append({k for k, v in conv_pit.state_dict().items() if not torch.equal(v, before[k])})

    setattr(trainer, f"_{step}_step", watched)
    trainer.train()
    # 96 samples in 3 batches of the weights' part, 3 epochs; masks learn in 2 of them
    assert len(moved) == (9 if step == "weight" else 6)
    masks = {name for name, _ in conv_pit.named_nas_parameters()}
    rest = set(conv_pit.state_dict()) - masks
    assert all(names <= (rest if step == "weight" else masks) for names in moved)
    assert all(names for names in moved)
    assert trainer.split is not None
    assert (len(trainer.split.weight), len(trainer.split.arch)) == (96, 32)
    assert not set(trainer.split.weight) & set(trainer.split.arch)
    assert trainer.arch_batches == 6


# --- targets, and the epoch that is kept ----------------------------------------------------------------------------


def test_the_best_epoch_that_meets_the_targets_is_kept(conv_pit: PIT, tmp_path: Path) -> None:
    trainer = make(
        conv_pit,
        targets={"params": 450, "macs": 20_000},
        strength={"params": 0.01, "macs": 1e-4},
        num_epochs=5,
        valid_dataset=digit_data(64),
        monitor="acc",
        checkpoint_dir=tmp_path,
        mask_learning_rate=0.08,
    )
    history = trainer.train()
    feasible = [r for r in history if r["params_hard"] <= 450 and r["macs_hard"] <= 20_000]
    best = max(feasible, key=lambda r: r["valid_acc"])
    # the full network: 60 + 12 + 330 + 12 + 250 parameters; it was more accurate, or as much, and does not count
    assert history[0]["params_hard"] == 60 + 12 + 330 + 12 + 250
    assert 0 < len(feasible) < len(history)
    assert trainer.evaluate()["acc"] == best["valid_acc"]
    small = trainer.export_model()
    assert n_parameters(small) == best["params_hard"] <= 450
    assert n_parameters(conv_pit.export()) == best["params_hard"]
    assert [(row.name, row.target, row.predicted) for row in trainer.report().rows] == [
        ("params", 450.0, best["params_hard"]),
        ("macs", 20_000.0, best["macs_hard"]),
    ]
    other = make(
        PIT(conv(), input_shape=(1, 8, 8), cost={"params": "params", "macs": "macs"}),
        targets={"params": 450, "macs": 20_000},
        strength={"params": 0.01, "macs": 1e-4},
    )
    other.resume(tmp_path / "best.ckpt")
    assert other.history[-1] == best
    assert other.export(best=False) == trainer.export()


def test_fine_tuning_begins_with_the_kept_epoch_and_keeps_its_own_best() -> None:
    """The metric is set by hand: 3 of the 4 search epochs meet the target, the second one is the best of them."""
    values = iter([9.0, 8.0, 1.0, 3.0, 2.0, 0.5, 0.7, 0.6])  # warm-up, 4 x search, 3 x fine-tuning
    pit = dense_pit()
    pit.decide({"0": [0, 1]})
    trainer = make(pit, targets={"params": 16}, num_epochs=4, finetune_epochs=3, mask_learning_rate=1e-6)
    trainer.valid_dataset = rows(16)
    states: list[dict[str, Tensor]] = []

    def evaluate(dataset: Any = None) -> dict[str, float]:
        states.append({k: v.clone() for k, v in pit.state_dict().items()})
        return {"loss": next(values)}

    trainer.evaluate = evaluate  # type: ignore[method-assign]
    begun: list[dict[str, Tensor]] = []
    trainer.finetune_optimizer.register_step_pre_hook(
        lambda *_: begun.append({k: v.clone() for k, v in pit.state_dict().items()})
    )
    trainer.train()
    assert all(torch.equal(v, states[2][k]) for k, v in begun[0].items())
    assert all(torch.equal(v, states[5][k]) for k, v in pit.state_dict().items())


def test_patience_ends_a_phase() -> None:
    """A metric that never gets better: the first epoch of a phase is kept, two more are waited for."""
    pit = dense_pit()
    pit.decide({"0": [0, 1]})  # 7 * 2 + 2 = 16
    trainer = make(
        pit,
        metrics=lambda output, target: {"same": 1.0},
        monitor="same",
        valid_dataset=rows(16),
        targets={"params": 16},
        num_epochs=6,
        finetune_epochs=5,
        patience=2,
        mask_learning_rate=1e-6,
    )
    history = trainer.train()
    assert [r["phase"] for r in history] == ["warmup"] + ["search"] * 3 + ["finetune"] * 3
    assert trainer.step == trainer.total_steps == 7 * 6


def test_selection_by_hand() -> None:
    records = [{"epoch": i, "v": v, "ok": ok} for i, (v, ok) in enumerate([(1.0, 0), (3.0, 1), (2.0, 1), (2.0, 1)])]
    judged = {"admits": lambda r: r["ok"], "judged_by": "v"}
    assert kept_record(records, **judged) is records[2]
    assert kept_record(records, **judged, larger=True) is records[1]
    assert kept_record(records, admits=lambda r: r["ok"], judged_by=None) is records[3]
    assert kept_record(records, admits=lambda r: False, judged_by=None) is None
    assert kept_record([{"v": float("nan")}, {"v": 1.0}], admits=lambda r: True, judged_by="v") == {"v": 1.0}
    assert kept_record([{"v": float("nan")}], admits=lambda r: True, judged_by="v") is None
    assert epochs_since(records, records[1]) == 2
    assert epochs_since(records, None) == 0


def test_targets_that_cannot_be_met() -> None:
    """One unit of 7 parameters and the 2 biases are left at least: 9. Without a search nothing is cut."""
    with pytest.raises(InfeasibleTargetError, match=r"params 8, but the smallest masks leave 9 of 58"):
        make(dense_pit(), targets={"params": 8})
    pit = dense_pit()
    trainer = make(pit, targets={"params": 9}, num_epochs=0, finetune_epochs=1)
    with pytest.raises(InfeasibleTargetError, match="no epoch met the targets: params 9, lowest so far 58, lowest po"):
        trainer.train()
    assert [r["phase"] for r in trainer.history] == ["warmup"]
    for refused in (trainer.export, trainer.export_model, trainer.report):
        with pytest.raises(InfeasibleTargetError, match="lowest possible 9"):
            refused()
    assert trainer.export(best=False) == {"0": list(range(8))}
    assert n_parameters(trainer.export_model(best=False)) == 58


def test_an_interrupted_search_exports_the_kept_epoch() -> None:
    pit = dense_pit()
    pit.decide({"0": [0, 1, 2]})
    calls = 0

    def loss(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 15:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(output, target)

    trainer = make(pit, loss=loss, targets={"params": 25}, mask_learning_rate=1e-6)
    kept: list[dict[str, Tensor]] = []
    after = trainer._after_epoch

    def watched(phase: str) -> None:
        after(phase)
        kept.append({k: v.clone() for k, v in pit.state_dict().items()})

    trainer._after_epoch = watched  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    now = copy.deepcopy(pit)
    small = trainer.export_model()
    assert equal_states(pit, now)
    assert torch.equal(small[0].weight, kept[1]["network.0.weight"][:3])
    assert not torch.equal(small[0].weight, pit.network[0].weight[:3])
    assert torch.equal(trainer.export_model(best=False)[0].weight, pit.network[0].weight[:3])


# --- what every trainer keeps ---------------------------------------------------------------------------------------


def test_history_log_and_files(conv_pit: PIT, tmp_path: Path) -> None:
    before = conv_pit.arch()
    trainer = make(conv_pit, checkpoint_dir=tmp_path, valid_dataset=digit_data(64), mask_learning_rate=0.08)
    history = trainer.train()
    records = read_json_lines(tmp_path / "log.jsonl")
    assert [r["step"] for r in records if r["kind"] == "step"] == list(range(1, 13))
    epochs = [{k: v for k, v in r.items() if k != "kind"} for r in records if r["kind"] == "epoch"]
    assert epochs == history
    last = history[-1]
    assert {"loss", "acc", "penalty", "cost_share", "valid_loss", "valid_acc", "changed"} <= set(last)
    assert 0 < last["cost_share"] < 1
    # 6 + 6 channels, 2 + 2 rings of kernels
    assert (history[0]["live"], history[0]["flips"]) == (16, 0)
    kept = conv_pit.arch()
    sizes = [len(v) if isinstance(v, list) else v for v in kept.values()]
    assert last["live"] == sum(sizes)
    lost = [set(v) - set(kept[k]) if isinstance(v, list) else range(v - kept[k]) for k, v in before.items()]
    assert sum(r["flips"] for r in history) >= sum(len(x) for x in lost) > 0
    small = trainer.export_model()
    assert last["params_hard"] == n_parameters(small)
    assert last["params_soft"] == float(conv_pit.soft_cost("params").detach())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "log.jsonl", "previous.ckpt", "tensorboard"]
    file = trainer.export(tmp_path / "arch.json")
    assert dict(read_arch(tmp_path / "arch.json").arch) == file == kept
    x = torch.rand(3, 1, 8, 8)
    conv_pit.eval(), small.eval()
    assert torch.allclose(small(x), conv_pit(x), atol=1e-5)


def test_evaluate_uses_the_running_statistics_and_changes_nothing(conv_pit: PIT) -> None:
    trainer = make(conv_pit)
    trainer.train()
    before, modes = copy.deepcopy(conv_pit), [m.training for m in conv_pit.modules()]
    found = trainer.evaluate(digit_data(70))
    assert equal_states(before, conv_pit)
    assert modes == [m.training for m in conv_pit.modules()]
    images, labels = digit_data(70).tensors
    with torch.no_grad():
        want = float((before.eval()(images).argmax(1) == labels).float().mean())
    assert found["acc"] == pytest.approx(want)


@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_resume_in_every_phase(converted: PIT, tmp_path: Path, fraction: float) -> None:
    """Saved after each of the steps, and taken up again from some of these files."""
    settings: dict[str, Any] = {
        "targets": {"params": 560},
        "num_epochs": 3,
        "finetune_epochs": 2,
        "arch_fraction": fraction,
        "valid_dataset": digit_data(40),
        "mask_learning_rate": 0.12,
        "scheduler": lambda optimizer, steps: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        "finetune_scheduler": lambda optimizer, steps: torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5),
    }
    pit = copy.deepcopy(converted)
    trainer = make(pit, checkpoint_dir=tmp_path, checkpoint_every=1, **settings)
    save, saved = trainer.save, {}

    def keep(path: Any) -> None:
        save(path)
        if Path(path).name == "last.ckpt":
            saved[trainer.step] = shutil.copy(path, tmp_path / f"at{trainer.step}.ckpt")

    trainer.save = keep  # type: ignore[method-assign]
    history = trainer.train()
    per_epoch = 3 if fraction else 4
    total = 6 * per_epoch
    assert sorted(saved) == list(range(1, total + 1))
    arch = trainer.export()
    for step in (per_epoch, 2 * per_epoch + 1, 4 * per_epoch, 4 * per_epoch + 2, total):
        other = copy.deepcopy(converted)
        again = make(other, **settings)
        again.resume(saved[step])
        assert again.train() == history, step
        assert equal_states(other, pit), step
        assert again.export() == arch
    with pytest.raises(CheckpointError, match="targets"):
        make(copy.deepcopy(converted), **{**settings, "targets": {"params": 500}}).resume(saved[1])


def test_a_search_that_is_stopped_early_is_resumed_as_such(tmp_path: Path) -> None:
    """From its second epoch, when the first one is the kept one, and from the first epoch of the fine-tuning."""

    def trainer(**changes: Any) -> PITTrainer:
        pit = dense_pit()
        pit.decide({"0": [0, 1]})
        common = {"targets": {"params": 16}, "num_epochs": 6, "finetune_epochs": 4, "patience": 2}
        constant = {"metrics": lambda output, target: {"same": 1.0}, "monitor": "same", "valid_dataset": rows(16)}
        return make(pit, **common, **constant, mask_learning_rate=1e-6, **changes)

    first = trainer(checkpoint_dir=tmp_path)
    save = first.save

    def keep(path: Any) -> None:
        save(path)
        if Path(path).name == "last.ckpt":
            shutil.copy(path, tmp_path / f"after{len(first.history)}.ckpt")

    first.save = keep  # type: ignore[method-assign]
    history = first.train()
    for n in (3, 5):
        again = trainer()
        again.resume(tmp_path / f"after{n}.ckpt")
        assert len(again.history) == n
        assert again.train() == history
        assert equal_states(again.model, first.model)


def test_same_seed_same_run_and_the_users_objects_are_left_alone() -> None:
    runs = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pit = dense_pit()
        optimizer = torch.optim.SGD(pit.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        runs[name] = make(pit, seed=seed, optimizer=optimizer).train(), pit
        assert torch.rand(1) == expected
        assert not optimizer.state
        assert all(p.requires_grad for p in pit.parameters())
    assert runs["a"][0] == runs["b"][0] != runs["c"][0]
    assert equal_states(runs["a"][1], runs["b"][1])


def test_bfloat16_trains_and_masks_stay_in_float32(conv_pit: PIT) -> None:
    seen: set[torch.dtype] = set()
    conv_pit.network[0].register_forward_hook(lambda m, a, output: seen.add(output.dtype))
    history = make(conv_pit, precision="bf16-mixed").train()
    assert torch.bfloat16 in seen
    assert all(p.dtype == torch.float32 for p in conv_pit.parameters())
    assert all(bool((mask < 1).any()) for mask in arch_parameters(conv_pit))
    assert history[-1]["loss"] < 3


def test_masks_that_are_not_to_learn_stay() -> None:
    pit = PIT(conv(), input_shape=(1, 8, 8), train_rf=False)
    make(pit, arch_optimizer=lambda masks: torch.optim.SGD(masks, 0.5)).train()
    moved = {name for name, mask in pit.named_nas_parameters() if bool((mask != 1).any())}
    assert len(moved) == 2
    assert not any("kernel" in name for name in moved)


def test_nan_stops_with_the_last_checkpoint(tmp_path: Path) -> None:
    calls = 0

    def loss(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return nn.functional.cross_entropy(output, target) * (float("nan") if calls == 10 else 1)

    pit = dense_pit()
    with pytest.raises(TrainingDivergedError, match=r"step \d+ \(search, epoch 1\): loss = nan.*last\.ckpt"):
        make(pit, loss=loss, checkpoint_dir=tmp_path).train()
    assert all(bool(p.isfinite().all()) for p in pit.parameters())


WRONG: list[tuple[dict[str, Any], type[OneshotError], str]] = [
    ({"strength": -1.0}, ConfigurationError, "strength: params -1.0"),
    ({"strength": float("nan")}, ConfigurationError, "strength: params nan"),
    ({"strength": {"flops": 1.0}}, ConfigurationError, r"unknown costs \['flops'\]; the network has \['params'\]"),
    ({"targets": {"macs": 1.0}}, ConfigurationError, r"targets: unknown costs \['macs'\]"),
    ({"targets": {"params": "20"}}, ConfigurationError, "targets: params '20'"),
    ({"num_epochs": -1}, ConfigurationError, "num_epochs=-1"),
    ({"finetune_epochs": -1}, ConfigurationError, "finetune_epochs=-1"),
    ({"patience": 0}, ConfigurationError, "patience=0"),
    ({"patience": 2}, ConfigurationError, "patience=2: it needs valid_dataset"),
    ({"patience": 2, "valid_dataset": rows(16)}, ConfigurationError, "no phase to end"),
    ({"monitor_mode": "best"}, ConfigurationError, "monitor_mode='best'"),
    ({"arch_dataset": rows()}, ConfigurationError, "arch_dataset"),
    ({"arch_optimizer": torch.optim.AdamW}, ConfigurationError, "weight decay"),
    ({"precision": "8"}, ConfigurationError, "precision='8'"),
    ({"optimizer": torch.optim.SGD(dense().parameters(), lr=1.0)}, ConfigurationError, "none of its param"),
]
WRONG_AT_TRAIN: list[tuple[dict[str, Any], type[OneshotError], str]] = [
    ({"dataset": None}, ConfigurationError, "dataset=None"),
    ({"dataset": rows(0)}, ConfigurationError, "0 samples do not fill"),
    ({"batch_size": 200}, ConfigurationError, "96 samples do not fill one batch of 200"),
    ({"arch_fraction": 1.5}, ConfigurationError, "fraction"),
    ({"monitor": "f1", "valid_dataset": rows(16)}, ConfigurationError, r"monitor='f1': allowed are \['loss', 'acc'\]"),
    ({"loss": lambda output, target: output}, ConfigurationError, "one number"),
    ({"loss": lambda output, target: output @ target}, UnsupportedModelError, "does not run"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG, ids=lambda v: str(v)[:30])
def test_wrong_arguments(changes: dict[str, Any], error: type[OneshotError], message: str) -> None:
    with pytest.raises(error, match=message):
        make(dense_pit(), **changes)


@pytest.mark.parametrize(("changes", "error", "message"), WRONG_AT_TRAIN, ids=lambda v: str(v)[:30])
def test_wrong_data_before_the_first_step(changes: dict[str, Any], error: type[OneshotError], message: str) -> None:
    pit = dense_pit()
    before = copy.deepcopy(pit)
    trainer = make(pit, **changes)
    with pytest.raises(error, match=message):
        trainer.train()
    assert equal_states(before, pit)


def test_the_wrong_kind_of_model_and_of_export() -> None:
    with pytest.raises(InputTypeError, match=r"a Sequential is no PIT network; wrap it, PITTrainer\(PIT\(model"):
        PITTrainer(dense(), loss=nn.CrossEntropyLoss(), metrics=None, optimizer=torch.optim.Adam, strength=1.0)
    with pytest.raises(UnsupportedModelError, match="no choices; search its masks with PITTrainer"):
        proxyless(dense_pit())
    trainer = make(dense_pit())
    with pytest.raises(ConfigurationError, match="targets="):
        trainer.export(budget={"params": 20})
    with pytest.raises(ConfigurationError, match=r"cost 'macs': this network has \['params'\]"):
        trainer.cost_model("macs")
    assert trainer.cost_model("params").of({"0": [3, 4]}) == 7 * 2 + 2
    assert proxyless(tiny()).export()


def test_a_cost_that_is_not_searched_for_is_reported() -> None:
    pit = PIT(dense(), input_shape=(4,), cost="macs")
    pit.decide({"0": [0, 7]})
    report = make(pit).report()
    assert [(row.name, row.unit, row.target, row.predicted) for row in report.rows] == [
        ("params", "parameters", None, 7 * 2 + 2),
        ("macs", "MAC", None, 4 * 2 + 2 * 2),
    ]
