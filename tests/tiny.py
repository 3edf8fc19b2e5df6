"""A small search model with every kind of layer that can go wrong in a step, and data for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from oneshot import DARTSTrainer, LabelSmoothingLoss, LayerChoice, ProxylessTrainer, Repeat, SPOSTrainer, accuracy
from oneshot.data import digits
from oneshot.trainers.supernet import SuperNetTrainer

WIDTH = 6


class Block(nn.Module):
    """Convolution, BatchNorm (statistics that must not move by accident) and dropout (random numbers)."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, kernel, padding=kernel // 2)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(torch.relu(self.norm(self.conv(x))))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.one = LayerChoice({"k1": Block(1), "k3": Block(3), "k5": Block(5), "skip": nn.Identity()}, label="one")
        self.two = LayerChoice([Block(3), Block(5), nn.Sequential(Block(1), Block(1))])
        self.deep = Repeat(lambda i: Block(1), depth=(1, 2), label="depth")
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.deep(self.two(self.one(self.stem(x)))).mean((2, 3)))


def tiny(seed: int = 0) -> Tiny:
    torch.manual_seed(seed)
    return Tiny()


def digit_data(n: int = 256) -> TensorDataset:
    data = digits()
    return TensorDataset(data.images[:n].float() / 255, data.targets[:n])


def equal_states(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def common(model: nn.Module) -> dict[str, Any]:
    """1 + 2 epochs with 6 weight steps each; a fifth of the data is for the alphas."""
    return {
        "loss": LabelSmoothingLoss(),
        "metrics": lambda output, target: accuracy(output, target, topk=(1, 5)),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3),
        "num_epochs": 2,
        "warmup_epochs": 1,
        "dataset": digit_data(),
        "arch_fraction": 0.2,
        "batch_size": 32,
        "workers": 0,
        "device": "cpu",
        "cost": "macs",
        "dummy_input": (1, 1, 8, 8),
        "log_frequency": 1,
        "progress": False,
    }


def proxyless(model: nn.Module, **changes: Any) -> ProxylessTrainer:
    """A trainer with arch steps after every second weight step."""
    settings: dict[str, Any] = {
        "arch_every": 2,
        "skip_first_epoch": False,
        "arc_learning_rate": 0.05,
        "ref_latency": 10_000,
        "grad_reg_loss_params": {"lambda": 0.5},
    }
    return ProxylessTrainer(model, **{**common(model), **settings, **changes})


def supernet(model: nn.Module, **changes: Any) -> SuperNetTrainer:
    """A trainer with an arch step after every weight step."""
    settings: dict[str, Any] = {"strength": 1e-5, "arch_learning_rate": 0.05}
    return SuperNetTrainer(model, **{**common(model), **settings, **changes})


def gumbel(model: nn.Module, **changes: Any) -> SuperNetTrainer:
    """Likewise, along one path that is drawn in every step."""
    return supernet(model, **{"sampling": "gumbel", "hard": True, **changes})


def reinforce(model: nn.Module, **changes: Any) -> ProxylessTrainer:
    """As ``proxyless``, with six sampled networks in each arch step."""
    settings = {"arch_method": "reinforce", "rl_batch_size": 6, "grad_reg_loss_params": None, "cost_exponent": 0.3}
    return proxyless(model, **{**settings, **changes})


def darts(model: nn.Module, **changes: Any) -> DARTSTrainer:
    """A trainer with an arch step before every weight step."""
    settings = {"arc_learning_rate": 0.05, "ref_latency": 10_000, "grad_reg_loss_params": {"lambda": 0.5}}
    return DARTSTrainer(model, **{**common(model), **settings, **changes})


MACS_LIMIT = 70_000  # which 17 of the 24 architectures keep


def spos(model: nn.Module, **changes: Any) -> SPOSTrainer:
    """A trainer of uniform paths, with up to 5 generations of 4 architectures."""
    settings: dict[str, Any] = {
        "limits": {"macs": MACS_LIMIT},
        "population": 4,
        "generations": 5,
        "parents": 2,
        "recalibration_samples": 64,
    }
    return SPOSTrainer(model, **{**common(model), **settings, **changes})
