"""What the searching examples share: the learning rate, the networks to compare with, one recipe, one table."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from oneshot import CostModel, LabelSmoothingLoss
from oneshot.cost import time_modules
from oneshot.data import ArrayDataset


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """From the optimizer's learning rate down to 0 after ``steps`` steps."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def largest(cost: CostModel) -> dict[str, int]:
    """The most expensive option of every choice."""
    return {label: max(range(len(row)), key=row.__getitem__) for label, row in cost.table.items()}


def smallest(cost: CostModel) -> dict[str, int]:
    """The cheapest option of every choice."""
    return {label: min(range(len(row)), key=row.__getitem__) for label, row in cost.table.items()}


def random_feasible(cost: CostModel, target: float, rng: random.Random) -> dict[str, int]:
    """A network drawn uniformly among those of the space that keep the target."""
    while True:
        choices = {label: rng.randrange(n) for label, n in cost.sizes.items()}
        if cost.of(choices) <= target:
            return choices


def retrain(
    net: nn.Module,
    dataset: ArrayDataset,
    epochs: int,
    lr: float,
    batch: int,
    seed: int,
    augment: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Train from fresh weights, on the device where they are: the same recipe for every network of a table.

    ``augment``: a random change of a batch of float images (N, C, H, W) in [0, 1]; the dataset's own transform
    comes after it, for the whole batch at once.
    """
    torch.manual_seed(seed)
    device = next(net.parameters()).device
    n_batches = len(dataset) // batch
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=4e-5)
    schedule = cosine(optimizer, epochs * n_batches)
    loss_of = LabelSmoothingLoss()
    net.train()
    for _ in range(epochs):
        order = torch.randperm(len(dataset))
        for chosen in order.split(batch)[:n_batches]:
            images = _images(dataset, chosen, device, augment)
            optimizer.zero_grad()
            loss_of(net(images), dataset.targets[chosen].to(device)).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def test_accuracy(net: nn.Module, test: ArrayDataset) -> float:
    """Share of the test images whose class is the largest output; the network is left in eval mode."""
    net.eval()
    device = next(net.parameters()).device
    parts = torch.arange(len(test)).split(250)
    predicted = torch.cat([net(_images(test, part, device)).argmax(1) for part in parts])
    return float((predicted.cpu() == test.targets).float().mean())


def _images(
    dataset: ArrayDataset, chosen: Tensor, device: torch.device, augment: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    images = dataset.images[chosen].to(device).float() / 255
    if augment is not None:
        images = augment(images)
    return images if dataset.transform is None else dataset.transform(images)


def measured_ms(nets: Mapping[str, nn.Module], shape: tuple[int, ...]) -> dict[str, float]:
    """Median ms of an input of this shape on one thread; the networks take turns, so that the machine's mood meets
    all alike.
    """
    timings = time_modules(list(nets.values()), (torch.rand(shape),), rounds=7, min_run_time=0.05)
    return {name: timing.median_ms for name, timing in zip(nets, timings, strict=True)}


def table(
    choices: Mapping[str, Mapping[str, int]],
    correct: Mapping[str, float],
    took: Mapping[str, float],
    *,
    params: CostModel,
    macs: CostModel,
    latency: CostModel,
) -> list[dict[str, Any]]:
    """One row per network, for ``markdown_table``: what it reaches, what it costs, and what it takes here."""
    return [
        {
            "network": name,
            "test accuracy": correct[name],
            "parameters": int(params.of(chosen)),
            "MACs": int(macs.of(chosen)),
            "predicted ms": latency.of(chosen),
            "measured ms": took[name],
        }
        for name, chosen in choices.items()
    ]
