"""What every concrete trainer keeps, whatever its algorithm."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Tiny, darts, digit_data, equal_states, gumbel, proxyless, reinforce, spos, supernet, tiny
from torch import Tensor, nn

from oneshot import Argmax, SPOSTrainer, Trainer, arch_parameters, fixed, load_fixed, set_sampler, weight_parameters
from oneshot.errors import ConfigurationError, ExportError, TrainingDivergedError, UnsupportedModelError
from oneshot.export import read_arch
from oneshot.loggers import read_json_lines

Factory = Callable[..., Trainer]
TRAINERS: dict[str, Factory] = {
    "proxyless": proxyless,
    "reinforce": reinforce,
    "supernet": supernet,
    "gumbel": gumbel,
    "darts": darts,
    "spos": spos,
}


@pytest.fixture(params=TRAINERS)
def build(request: pytest.FixtureRequest) -> Factory:
    return TRAINERS[request.param]


def test_train_moves_weights_and_alphas_and_keeps_the_keys(build: Factory) -> None:
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    history = build(model).train()
    after = model.state_dict()
    assert list(before) == list(after)
    arch = {id(p) for p in arch_parameters(model)}
    for name, p in model.named_parameters():
        assert not torch.equal(before[name], after[name]), f"{name} did not move"
        assert p.requires_grad, name
    assert len(arch) == 3
    assert [record["phase"] for record in history] == ["warmup", "search", "search"]
    assert [record["step"] for record in history] == [6, 12, 18]


def test_warmup_leaves_alphas(build: Factory) -> None:
    model = tiny()
    build(model, num_epochs=0, warmup_epochs=1).train()
    assert all(not p.detach().any() for p in arch_parameters(model))


def test_same_seed_same_run_and_another_seed_another(build: Factory) -> None:
    runs = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        model = tiny()
        runs[name] = (build(model, seed=seed).train(), model.state_dict())
    assert runs["a"][0] == runs["b"][0]
    assert equal_states(runs["a"][1], runs["b"][1])
    assert runs["a"][0] != runs["c"][0]


def test_the_users_objects_and_random_numbers_are_left_alone(build: Factory) -> None:
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = (torch.rand(1), random.random(), np.random.rand())
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    trainer = build(model, optimizer=optimizer)
    trainer.train()
    assert (torch.rand(1), random.random(), np.random.rand()) == expected
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == held
    assert groups == [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    assert not optimizer.state


def test_optimizer_is_taken_over_without_the_alphas(build: Factory) -> None:
    model = tiny()
    other = list(model.head.parameters())
    rest = [p for p in model.parameters() if not any(p is o for o in other)]
    optimizer = torch.optim.AdamW([{"params": rest, "lr": 1e-3}, {"params": other, "weight_decay": 0.5}], lr=2e-3)
    own = build(model, optimizer=optimizer).optimizer
    assert type(own) is torch.optim.AdamW
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in own.param_groups] == [
        (1e-3, 1e-2, len(rest) - 3),
        (2e-3, 0.5, 2),
    ]
    mine = {id(p) for g in own.param_groups for p in g["params"]}
    assert mine == {id(p) for p in weight_parameters(model)}
    made = build(model, optimizer=lambda parameters: torch.optim.RMSprop(parameters, lr=0.1)).optimizer
    assert type(made) is torch.optim.RMSprop


def test_two_runs_of_one_model_by_two_trainers(build: Factory) -> None:
    model = tiny()
    build(model).train()
    history = build(model, seed=3).train()
    assert len(history) == 3


def test_evaluate_changes_nothing_and_counts_every_sample(build: Factory) -> None:
    model = tiny()
    trainer = build(model)
    trainer.train()
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    found = trainer.evaluate(digit_data(70))
    assert set(found) == {"loss", "acc1", "acc5"}
    assert equal_states(state, model.state_dict())
    assert modes == [m.training for m in model.modules()]
    # by hand: argmax path, batch statistics, batches of 24, 23 and 23 of the 70 samples, mixed
    set_sampler(model, Argmax())
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    correct = 0
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    images, labels = (tensor[order] for tensor in digit_data(70).tensors)
    for rows in (slice(0, 23), slice(23, 47), slice(47, 70)):
        with torch.no_grad():
            correct += int((model(images[rows]).argmax(1) == labels[rows]).sum())
    assert found["acc1"] == pytest.approx(correct / 70)


def test_export_is_argmax_and_equals_the_rebuilt_network(build: Factory, tmp_path: Path) -> None:
    model = tiny()
    trainer = build(model)
    trainer.train()
    arch = trainer.export(tmp_path / "arch.json")
    for label, decision in trainer.decisions.items():
        assert decision.options[int(decision.alpha.argmax())] == arch[label]
    file = read_arch(tmp_path / "arch.json")
    assert dict(file.arch) == arch
    plain = trainer.export_model()
    assert not any(type(m).__module__.startswith("oneshot") for m in plain.modules())
    x = torch.rand(3, 1, 8, 8)
    set_sampler(model, Argmax())
    model.eval(), plain.eval()
    assert torch.equal(model(x), plain(x))
    fresh = load_fixed(Tiny, tmp_path / "arch.json")
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert equal_states(fixed(model, arch).state_dict(), plain.state_dict())


def test_export_that_differs_is_refused_and_the_old_file_stays(build: Factory, tmp_path: Path) -> None:
    class Peeking(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2 if hasattr(self.one, "alpha") else 1)

    path = tmp_path / "arch.json"
    path.write_text("old")
    trainer = build(Peeking())
    with pytest.raises(ExportError, match="differs"):
        trainer.train()
    assert trainer.step == 0
    with pytest.raises(ExportError, match="differs"):
        trainer.export(path)
    assert path.read_text() == "old"


def test_fit_is_train(build: Factory) -> None:
    assert len(build(tiny(), num_epochs=1).fit()) == 2


def test_logs_and_files_of_a_run(build: Factory, tmp_path: Path) -> None:
    trainer = build(tiny(), checkpoint_dir=tmp_path, valid_dataset=digit_data(64))
    history = trainer.train()
    records = read_json_lines(tmp_path / "log.jsonl")
    assert [r["step"] for r in records if r["kind"] == "step"] == list(range(1, 19))
    epochs = [r for r in records if r["kind"] == "epoch"]
    assert [{k: v for k, v in r.items() if k != "kind"} for r in epochs] == history
    assert {"loss", "acc1", "entropy", "changed", "macs_soft", "macs_hard", "valid_acc1"} <= set(history[-1])
    files = {p.name for p in tmp_path.iterdir()}
    if isinstance(trainer, SPOSTrainer):  # a cost is a limit of its evolution, and has no gradient
        assert files == {"candidates.json", "last.ckpt", "log.jsonl", "previous.ckpt", "tensorboard"}
    else:
        assert 0 < history[-1]["cost_share"] < 1
        assert files == {"last.ckpt", "log.jsonl", "previous.ckpt", "tensorboard"}


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_epochs": -1}, ConfigurationError, "num_epochs=-1"),
    ({"num_epochs": 2.5}, ConfigurationError, "num_epochs=2.5"),
    ({"batch_size": 0}, ConfigurationError, "batch_size=0"),
    ({"workers": -1}, ConfigurationError, "workers=-1"),
    ({"log_frequency": 0}, ConfigurationError, "log_frequency=0"),
    ({"precision": "8"}, ConfigurationError, "precision='8'"),
    ({"precision": "64-true"}, ConfigurationError, "precision='64-true'"),
    ({"strategy": "fsdp"}, ConfigurationError, "strategy='fsdp'.*one path.*checkpoint_blocks"),
    ({"strategy": "ddp_spawn"}, ConfigurationError, "strategy='ddp_spawn'.*lose"),
    ({"accelerator": "abacus"}, ConfigurationError, "accelerator='abacus'"),
    ({"accelerator": "cuda"}, ConfigurationError, "device='cpu' and accelerator='cuda'"),
    ({"devices": 0}, ConfigurationError, "devices=0"),
    ({"device": "mps"}, ConfigurationError, "device='mps'.*float64"),
    ({"optimizer": torch.optim.LBFGS}, ConfigurationError, "LBFGS"),
    ({"accumulate": 0}, ConfigurationError, "accumulate=0"),
    ({"accumulate": 33}, ConfigurationError, "accumulate=33: more parts than the 32 samples"),
    ({"grad_clip": -1.0}, ConfigurationError, "grad_clip=-1.0"),
    ({"grad_clip": {"masks": 1.0}}, ConfigurationError, "weights.*arch"),
    ({"ema_decay": 1.0}, ConfigurationError, "decay=1.0"),
    ({"checkpoint_blocks": ["onne"]}, ConfigurationError, "onne.*one"),
    ({"compile": "gcc"}, ConfigurationError, "no backend 'gcc'"),
    ({"compile": True, "checkpoint_blocks": ["one"]}, ConfigurationError, "give one of them"),
    ({"optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)}, ConfigurationError, "none of its param"),
]
WRONG_AT_TRAIN: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"dataset": None}, ConfigurationError, "dataset=None"),
    ({"batch_size": 300}, ConfigurationError, "205 samples do not fill one batch of 300"),
    ({"arch_fraction": -0.1}, ConfigurationError, "fraction"),
    ({"arch_fraction": 1.5}, ConfigurationError, "fraction"),
    ({"arch_dataset": digit_data(10)}, ConfigurationError, "256 samples and arch_dataset 10"),
    ({"loss": lambda output, target: output}, ConfigurationError, "one number"),
    ({"loss": lambda output, target: output @ target}, UnsupportedModelError, "does not run"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG, ids=lambda v: str(v)[:30])
def test_wrong_arguments_at_construction(
    build: Factory, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build(tiny(), **changes)


@pytest.mark.parametrize("name", [name for name in TRAINERS if name != "spos"])
def test_the_part_for_the_alphas_fills_a_batch(name: str) -> None:
    """205 samples for the weights and 51 for the alphas, which SPOS only evaluates on."""
    with pytest.raises(ConfigurationError, match="51 samples do not fill one batch of 200"):
        TRAINERS[name](tiny(), batch_size=200).train()


@pytest.mark.parametrize(("changes", "error", "message"), WRONG_AT_TRAIN, ids=lambda v: str(v)[:30])
def test_wrong_data_before_the_first_step(
    build: Factory, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    trainer = build(model, **changes)
    with pytest.raises(error, match=message):
        trainer.train()
    assert equal_states(before, model.state_dict())


def test_nothing_to_search(build: Factory) -> None:
    with pytest.raises(UnsupportedModelError, match="nothing to search"):
        build(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))


def test_nan_loss_stops_with_step_terms_and_last_checkpoint(build: Factory, tmp_path: Path) -> None:
    calls = 0

    def loss(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        value = nn.functional.cross_entropy(output, target)
        return value * float("nan") if calls == 10 else value

    model = tiny()
    trainer = build(model, loss=loss, checkpoint_dir=tmp_path, checkpoint_every=2)
    with pytest.raises(TrainingDivergedError, match=r"step \d+ \(search, epoch 1\): .*nan.*last\.ckpt"):
        trainer.train()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_bfloat16_trains_and_alphas_stay_in_float32(build: Factory) -> None:
    model = tiny()
    seen: set[torch.dtype] = set()
    model.one.register_forward_hook(lambda m, a, output: seen.add(output.dtype))
    history = build(model, precision="bf16-mixed").train()
    assert torch.bfloat16 in seen
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(p.detach().any() for p in arch_parameters(model))
    assert history[-1]["loss"] < 3
