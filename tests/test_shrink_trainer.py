"""Searches that get smaller while they run, by the trainers: what is found, written, resumed and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import common, digit_data, equal_states, supernet
from torch import nn

from oneshot import (
    PIT,
    BaseRegularizer,
    GroupLasso,
    LayerChoice,
    PITSuperNetTrainer,
    PITTrainer,
    SuperNetTrainer,
    count_params,
    count_peak_memory,
    decisions,
    fixed,
)
from oneshot.errors import CheckpointError, ConfigurationError


def conv() -> nn.Sequential:
    """8 * 9 + 8 + 16 = 96, 8 * 12 * 9 + 12 + 24 = 900, 12 * 10 + 10 = 130: 1,126 parameters."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1)),
        *(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10)),
    )


def masked(**changes: Any) -> PITTrainer:
    """1 + 5 + 1 epochs of 4 steps."""
    pit = PIT(conv(), (1, 8, 8))
    settings = common(pit)
    for name in ("cost", "dummy_input", "arch_fraction"):
        del settings[name]
    mine = {
        "num_epochs": 5,
        "finetune_epochs": 1,
        "mask_learning_rate": 0.06,
        "targets": {"params": 400},
        "shrink_every": 1,
        "dataset": digit_data(128),
        "valid_dataset": digit_data(160),
        "log_frequency": None,
    }
    return PITTrainer(pit, **{**settings, **mine, **changes})


def sizes(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_the_network_loses_what_is_switched_off(tmp_path: Path) -> None:
    trainer = masked(checkpoint_dir=tmp_path)
    pit = trainer.model
    before, held = sizes(pit.network), [id(p) for p in pit.parameters()]
    optimizer = trainer.optimizer
    history = trainer.train()
    assert before == 1126
    assert sizes(pit.network) < before
    assert sum(record.get("removed", 0) for record in history) > 0
    assert [id(p) for p in pit.parameters()] == held  # the same objects
    for group in optimizer.param_groups:
        for p in group["params"]:
            for value in optimizer.state.get(p, {}).values():
                assert not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape == p.shape
    # all that is off left before the fine-tuning; kernels keep their taps until the export
    assert all(bool(mask.hard().bool().all()) for label, mask in pit.masks.items() if "." not in label)
    exported = trainer.export_model().eval()
    assert sizes(exported) == pit.hard_cost("params") <= 400
    arch = trainer.export(tmp_path / "arch.json")
    fresh = PIT(conv(), (1, 8, 8))
    fresh.check_arch(arch)
    rebuilt = fixed(fresh, tmp_path / "arch.json")
    assert sizes(rebuilt) == sizes(exported)
    assert json.loads((tmp_path / "arch.json").read_text())["costs"]["params"] == sizes(exported)
    x = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(pit.eval()(x), exported(x), rtol=1e-4, atol=1e-5)


CHANGES: list[dict[str, Any]] = [{}, {"ema_decay": 0.8}, {"arch_fraction": 0.25}, {"targets": None, "strength": 1e-3}]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(changes) or "targets")
def test_every_checkpoint_is_taken_up_bit_for_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer = masked(checkpoint_dir=tmp_path, checkpoint_every=3, **changes)
    saved: list[Path] = []
    write = trainer.save

    def keep(path: Path) -> None:
        write(path)
        saved.append(Path(shutil.copy(path, tmp_path / f"at{len(saved)}_{trainer.step}")))

    trainer.save = keep  # type: ignore[method-assign]
    history = trainer.train()
    expected, arch = trainer.model.state_dict(), trainer.export()
    assert sum(record.get("removed", 0) for record in history) > 0
    for path in saved[2::4]:
        again = masked(**changes)
        again.resume(path)
        assert again.train() == history
        assert equal_states(again.model.state_dict(), expected)
        assert again.export() == arch


def test_what_the_kept_epoch_has_stays(tmp_path: Path) -> None:
    """The kept epoch is exported after later ones have lost more, and computes what it did when it was kept."""
    trainer = masked(checkpoint_dir=tmp_path, finetune_epochs=0, num_epochs=6)
    history = trainer.train()
    good = [record for record in history if record["params_hard"] <= 400 and record["phase"] == "search"]
    best = min(good, key=lambda record: record["valid_loss"])
    assert trainer.evaluate()["loss"] == pytest.approx(best["valid_loss"], rel=1e-5)
    assert sizes(trainer.export_model()) == best["params_hard"]


def test_a_checkpoint_of_another_cadence_or_of_units_that_are_not_there(tmp_path: Path) -> None:
    masked(checkpoint_dir=tmp_path).train()
    with pytest.raises(CheckpointError, match="shrink_every 1 there and None here"):
        masked(shrink_every=None).resume(tmp_path)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["removed"]["units"]
    state["removed"]["units"]["0"] = [99]
    torch.save(state, tmp_path / "last.ckpt")
    trainer = masked()
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(CheckpointError, match="removed"):
        trainer.resume(tmp_path)
    assert equal_states(trainer.model.state_dict(), before)


def test_groups_of_the_whole_network_are_refused() -> None:
    pit = PIT(conv(), (1, 8, 8))
    settings = {**common(pit), "shrink_every": 1}
    for name in ("cost", "dummy_input", "arch_fraction"):
        del settings[name]
    lasso = GroupLasso("output_channels", 0.1)
    with pytest.raises(ConfigurationError, match=r"shrink_every=1.*GroupLasso"):
        PITTrainer(pit, **settings, regularizer=lasso)
    PITTrainer(pit, **settings, regularizer=BaseRegularizer("params", 1e-6))
    with pytest.raises(ConfigurationError, match="shrink_every=0"):
        PITTrainer(pit, **{**settings, "shrink_every": 0})


class Choosing(nn.Module):
    """What the one choice returns, another reads; the 5 x 5 kernels cost the most."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        kernels = {f"k{k}": k for k in (1, 3, 5)}
        self.one = LayerChoice({n: nn.Conv2d(6, 6, k, padding=k // 2) for n, k in kernels.items()}, label="one")
        self.two = LayerChoice([nn.Conv2d(6, 6, k, padding=k // 2) for k in (1, 3, 5)], label="two")
        self.head = nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.two(torch.relu(self.one(torch.relu(self.stem(x)))))).mean((2, 3)))


def choosing(**changes: Any) -> SuperNetTrainer:
    """A strength that only the cheapest candidates survive, and alphas that move by 0.5 in a step."""
    torch.manual_seed(0)
    model = Choosing()
    settings = {"cost": "params", "strength": 1.0, "arch_learning_rate": 0.5, "num_epochs": 4, "shrink_every": 1}
    return supernet(model, **{**settings, "dataset": digit_data(160), **changes})


def test_candidates_that_have_become_improbable_go(tmp_path: Path) -> None:
    trainer = choosing(checkpoint_dir=tmp_path, checkpoint_every=3)
    history = trainer.train()
    assert sum(record.get("removed", 0) for record in history) == 4
    assert {label: d.options for label, d in trainer.decisions.items()} == {"one": ("k1",), "two": (0,)}
    arch = trainer.export(tmp_path / "arch.json")
    assert arch == {"one": "k1", "two": 0}
    # 6 * 9 + 6, twice 6 * 6 + 6, 6 * 10 + 10
    assert sizes(fixed(Choosing(), tmp_path / "arch.json")) == 60 + 42 + 42 + 70 == history[-1]["params_hard"]
    again = choosing()
    again.resume(tmp_path / "previous.ckpt")
    assert again.train() == history
    assert again.export() == arch
    assert again.searched.removed() == {"one": ["k3", "k5"], "two": [1, 2]}


def test_a_cost_of_ones_own_is_narrowed_also_after_a_resume(tmp_path: Path) -> None:
    """As by name; it was counted with all candidates, and cannot be counted again."""

    def own(**changes: Any) -> SuperNetTrainer:
        torch.manual_seed(0)
        model = Choosing()
        settings = {"cost": {"params": count_params(model)}, "strength": 1.0, "arch_learning_rate": 0.5}
        return supernet(
            model, **{**settings, "num_epochs": 4, "shrink_every": 1, "dataset": digit_data(160), **changes}
        )

    trainer = own(checkpoint_dir=tmp_path, checkpoint_every=3)
    history = trainer.train()
    assert sum(record.get("removed", 0) for record in history) == 4
    assert history[-1]["params_hard"] == 60 + 42 + 42 + 70
    again = own()
    again.resume(tmp_path / "previous.ckpt")
    assert again.train() == history
    memory = count_peak_memory(Choosing(), (torch.zeros(1, 1, 8, 8),))
    with pytest.raises(ConfigurationError, match=r"shrink_every=1: the cost \['peak_memory'\]"):
        own(cost=memory, strength=0.0)


def test_masks_and_choices_of_one_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pit = PIT(Choosing(), (1, 8, 8))
    settings = common(pit)
    for name in ("cost", "dummy_input", "arch_fraction"):
        del settings[name]
    mine = {"targets": {"params": 120}, "mask_learning_rate": 0.05, "arch_learning_rate": 0.5, "num_epochs": 6}
    trainer = PITSuperNetTrainer(pit, **{**settings, **mine, "shrink_every": 1, "checkpoint_dir": tmp_path})
    history = trainer.train()
    assert sum(record.get("removed", 0) for record in history) > 0
    assert set(decisions(pit)) >= {"one", "two"}
    arch = trainer.export(tmp_path / "arch.json")
    torch.manual_seed(0)
    fresh = PIT(Choosing(), (1, 8, 8))
    assert sizes(fixed(fresh, tmp_path / "arch.json")) == sizes(trainer.export_model()) <= 120
    fresh.check_arch(arch)
