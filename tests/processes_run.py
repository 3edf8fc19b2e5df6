"""Searches by every trainer in the processes of a launcher: torchrun ... processes_run.py FOLDER, written to FOLDER.

In one process, ``everything(64)`` is the same searches on the same global batches.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny import WIDTH, Tiny, common, darts, digit_data, gumbel, proxyless, reinforce, spos, supernet
from torch import Tensor, nn

from oneshot import DUCCIO, PIT, LayerChoice, PITSuperNetTrainer, PITTrainer, Trainer, accuracy, arch_parameters, sweep
from oneshot.errors import TrainingDivergedError

STEPS = 20


class Simple(nn.Module):
    """Choices without BatchNorm and dropout: nothing in it knows how many samples come at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.one = LayerChoice({"k1": conv(1), "k3": conv(3), "skip": nn.Identity()}, label="one")
        self.two = LayerChoice({"k3": conv(3), "k5": conv(5)}, label="two")
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(torch.relu(self.stem(x)))).mean((2, 3)))


def conv(kernel: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(WIDTH, WIDTH, kernel, padding=kernel // 2), nn.ReLU())


def plain() -> nn.Sequential:
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def of_masks(pit: PIT, **changes: Any) -> dict[str, Any]:
    settings = common(pit)
    for name in ("cost", "dummy_input", "arch_fraction"):
        del settings[name]
    return {**settings, "mask_learning_rate": 0.02, "targets": {"params": 400}, **changes}


def pit(model: nn.Module, **changes: Any) -> PITTrainer:
    network = PIT(plain(), (1, 8, 8))
    network.network.load_state_dict(model.state_dict())
    return PITTrainer(network, **of_masks(network, **changes))


def pit_supernet(model: nn.Module, **changes: Any) -> PITSuperNetTrainer:
    network = PIT(model, (1, 8, 8))
    return PITSuperNetTrainer(network, **of_masks(network, **{"arch_learning_rate": 0.05, **changes}))


SEARCHES: dict[str, tuple[Callable[..., Trainer], dict[str, Any]]] = {
    "proxyless": (proxyless, {}),
    "proxyless, mul#log, targets": (
        proxyless,
        {
            "grad_reg_loss_type": "mul#log",
            "grad_reg_loss_params": {"alpha": 1.0, "beta": 0.6},
            "targets": {"macs": 60_000},
        },
    ),
    "reinforce": (reinforce, {"metrics": None}),
    "supernet": (supernet, {"targets": {"macs": 60_000}, "arch_fraction": 0.0}),
    "supernet in turns": (supernet, {"regularizer": DUCCIO({"macs": 60_000}, task_loss=2.0)}),
    "gumbel": (gumbel, {}),
    "darts": (darts, {}),
    "darts, second order": (darts, {"order": 2}),
    "spos": (spos, {"limits": {"macs": 60_000}}),
    "pit": (pit, {}),
    "pit, smaller": (pit, {"shrink_every": 1}),
    "pit and choices": (pit_supernet, {"targets": {"params": 500}}),
}


def search(name: str, batch_size: int, model: nn.Module | None = None, **changes: Any) -> dict[str, Any]:
    """One epoch of 20 steps; what was found, and the alphas after every step."""
    build, settings = SEARCHES[name]
    first = plain() if build is pit else Simple()
    for parameter in first.parameters() if model is None else ():
        values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        parameter.data = values * 0.3 if parameter.requires_grad and parameter.dim() else parameter.data
    for alpha in arch_parameters(first):
        alpha.data.zero_()
    is_joint = build in (pit, pit_supernet) or settings.get("arch_fraction") == 0.0
    n = 64 * STEPS if is_joint else 64 * STEPS * 5 // 4
    trainer = build(
        first if model is None else model,
        **{
            "num_epochs": 1,
            "warmup_epochs": 0,
            "dataset": digit_data(n),
            "valid_dataset": torch.utils.data.Subset(digit_data(1797), range(1700, 1777)),
            "batch_size": batch_size,
            "metrics": lambda output, target: accuracy(output, target, topk=(1,)),
            "optimizer": lambda weights: torch.optim.SGD(weights, lr=0.02),
            "checkpoint_dir": None,
            **settings,
            **changes,
        },
    )
    alphas: list[Tensor] = []
    loss = trainer.loss

    def watched(output: Tensor, target: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # a step; of the batches of an evaluation one process may have more
            alphas.append(torch.cat([p.detach().flatten() for p in arch_parameters(trainer.model)]))
        return loss(output, target)

    trainer.loss = watched
    history = trainer.train()
    weights = [p.detach().clone() for p in trainer.model.parameters()]
    return {
        "steps": trainer.step,
        "history": history,
        "alphas": torch.stack(alphas),
        "weights": torch.cat([w.flatten() for w in weights]),
        "arch": trainer.export(),
        "evaluated": trainer.evaluate(),
    }


def everything(batch_size: int) -> dict[str, dict[str, Any]]:
    return {name: search(name, batch_size) for name in SEARCHES}


def of_every_step(folder: Path) -> dict[str, Any]:
    """BatchNorm, dropout, a latency of this machine; a checkpoint in the middle of an epoch, and what follows it."""
    settings = {"batch_size": 16, "cost": None, "applied_hardware": "this-machine", "ref_latency": 0.1}
    model = Tiny()
    trainer = proxyless(model, **settings, checkpoint_dir=folder, checkpoint_every=8, log_frequency=1)
    kept = folder / "kept.ckpt"

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if trainer.step == 9 and not kept.exists() and trainer.fabric.global_rank == 0:
            kept.write_bytes((folder / "last.ckpt").read_bytes())
        return nn.functional.cross_entropy(output, target)

    trainer.loss = loss
    history = trainer.train()
    trainer.processes.wait()
    again = proxyless(Tiny(), **settings)
    again.loss = nn.functional.cross_entropy
    again.resume(kept)
    resumed = again.train()
    states = model.state_dict(), again.model.state_dict()
    same = all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    table = trainer.latency_table
    assert table is not None
    return {"history": history, "resumed": resumed, "same": same, "steps": again.step, "table": str(table.by_place)}


class Skipping(nn.Sequential):
    """A layer that is left out by chance, in each process by its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and float(torch.rand(())) < 0.5 else x + super().forward(x)


def of_one_process_alone(folder: Path) -> dict[str, Any]:
    """What begins, happens or goes wrong in one process only."""
    rank = int(os.environ["RANK"])
    data = {"dataset": digit_data(160), "valid_dataset": digit_data(90), "batch_size": 16}

    torch.manual_seed(rank)
    averaged = pit_of(plain(), **data, ema_decay=0.9, finetune_epochs=1, targets={"params": 600})
    before = averaged.evaluate()  # each of its own network, and of all samples
    history = averaged.train()

    skipping = nn.Sequential(nn.Conv2d(1, 8, 3), Skipping(nn.Conv2d(8, 8, 3, padding=1)), nn.AdaptiveAvgPool2d(1))
    skipped = pit_of(nn.Sequential(skipping, nn.Flatten(), nn.Linear(8, 10)), **data, targets=None)
    skipped.train()

    started = proxyless(Simple(), **data, warmup_epochs=1)
    started.warm_up(folder / "warmup.ckpt")
    second = proxyless(Simple(), **data, warmup_epochs=1)
    second.start_from(folder / "warmup.ckpt")  # the first process has written it

    diverging = proxyless(Simple(), **data)
    calls = 0

    def loss(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        value = nn.functional.cross_entropy(output, target)
        return value * float("nan") if rank == 1 and calls == 5 else value

    diverging.loss = loss
    try:
        diverging.train()
        error = ""
    except TrainingDivergedError as failure:
        error = str(failure)
    return {
        "names before": sorted(before),
        "history": history,
        "skipped": [p.detach().sum().item() for p in skipped.model.parameters()],
        "started": second.step,
        "error": error,
    }


def pit_of(model: nn.Module, **changes: Any) -> PITTrainer:
    network = PIT(model, (1, 8, 8))
    return PITTrainer(network, **of_masks(network, **changes))


def swept(folder: Path) -> list[dict[str, float]]:
    """One search after the other, each by all processes."""

    def factory(checkpoint_dir: str, **point: Any) -> PITTrainer:
        changes = {"dataset": digit_data(128), "checkpoint_dir": checkpoint_dir, "targets": None, **point}
        return pit(plain(), **changes, mask_learning_rate=0.3)

    front = sweep(factory, strengths=[0.0, 1.0], directory=folder / "sweep", evaluate_on=digit_data(128))
    return [dict(row.costs) for row in front.rows]


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
    torch.manual_seed(rank)  # each begins with weights of its own; those of the first one count
    found: dict[str, Any] = {**everything(32), "in the middle": of_every_step(folder)}
    found["sweep"] = swept(folder)
    found["alone"] = of_one_process_alone(folder)
    torch.save(found, folder / f"process{rank}.pt")
